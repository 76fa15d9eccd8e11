"""What the Gluon kernels for Hopper share: a ring of operand tiles in shared memory.

The kernels are cooperative in CUTLASS's sense: a producer warp fills the ring, and two consumer
warp groups of four warps share every tile, 64 rows each. A consumer multiplies the left and the
right columns of its rows separately, so that it can finish the right columns of one tile while the
first products of the next one run.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Renamed in Triton 3.8; both take the same arguments.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

# Registers a thread: a consumer holds 64 x 256 sums in four warps, the producer addresses only.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


class Ring(NamedTuple):
    """Slots of shared memory for the operands of one step each, and their barriers."""

    left: Any  # operands that give the rows of a tile
    right: Any  # operands that give its columns
    ready: Any  # a slot's operands have arrived
    free: Any  # both consumers have read them


class Output(NamedTuple):
    """How finished columns of a tile leave: a descriptor, None to store none, and its buffers."""

    desc: Any
    buffers: Any  # one for each half of the columns of each consumer


@gluon.jit
def ring_barriers(STAGES: gl.constexpr):
    """The barriers `ready` and `free` of a `Ring`."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    return ready, free


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The slot of the next step, and the phase of its barriers, which flips every round."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def multiply_rest(
    left,
    right,
    ring,
    slot,
    phase,
    num_steps,
    MULTIPLY_HALF: gl.constexpr,
    CONSUMER: gl.constexpr,
    STAGES: gl.constexpr,
):
    """All steps of a tile's product after the first, which is under way for both halves in `slot`.

    `MULTIPLY_HALF` starts one step of one half. Returns both halves, complete, and the slot and
    phase of the next tile's first step.
    """
    # Waits for nothing: it makes asynchronous results of both, which the loop carries.
    left, right = warpgroup_mma_wait(num_outstanding=2, deps=(left, right))
    for _ in range(num_steps - 1):
        last = slot
        slot, phase = next_slot(slot, phase, STAGES)
        mbarrier.wait(ring.ready.index(slot), phase)
        left = MULTIPLY_HALF(left, ring, slot, False, CONSUMER, 0)
        right = MULTIPLY_HALF(right, ring, slot, False, CONSUMER, 1)
        # One step stays in flight; the one before it has read its operands.
        left, right = warpgroup_mma_wait(num_outstanding=2, deps=(left, right))
        mbarrier.arrive(ring.free.index(last), count=1)
    left, right = warpgroup_mma_wait(num_outstanding=0, deps=(left, right))
    mbarrier.arrive(ring.free.index(slot), count=1)
    slot, phase = next_slot(slot, phase, STAGES)
    return left, right, slot, phase


def descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """A tensor descriptor of a matrix that one can address, in the layout of its products."""
    return TensorDescriptor.from_tensor(matrix, block, _layout(*block, str(matrix.dtype)[6:]))


@functools.cache
def _layout(rows: int, columns: int, dtype: str) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], getattr(gl, dtype))
