"""What the Gluon kernels for Hopper share: a ring of operand tiles in shared memory.

One warp loads into the ring, two groups of four warps multiply 64 rows of a tile each, left and
right columns apart, so that a group can finish the right columns of one tile behind the first
products of the next.
"""

from __future__ import annotations

import functools

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

# Registers of a thread: what the loading warp leaves to those that hold a tile of 64 x 256.
MULTIPLYING = gl.constexpr(240)
LOADING = gl.constexpr(24)


@gluon.jit
def ring_barriers(STAGES: gl.constexpr):
    """Two barriers a slot: its operands have arrived; both groups have read them."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    return ready, free


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The slot of the next step, and the phase of its barriers, which turns with every round."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def multiply_rest(
    left,
    right,
    buffers,
    slot,
    phase,
    num_steps,
    MULTIPLY_HALF: gl.constexpr,
    WHO: gl.constexpr,
    STAGES: gl.constexpr,
):
    """All steps of a tile's product but the first, which both halves have begun in `slot`.

    `MULTIPLY_HALF` begins one step of one half. Returns both halves, complete, and the slot and
    phase of the next tile's first step.
    """
    left_operands, right_operands, ready, free = buffers
    # Waits for nothing: only makes of both what the loop carries.
    left, right = warpgroup_mma_wait(num_outstanding=2, deps=(left, right))
    for _ in range(num_steps - 1):
        last = slot
        slot, phase = next_slot(slot, phase, STAGES)
        mbarrier.wait(ready.index(slot), phase)
        left = MULTIPLY_HALF(left, left_operands, right_operands, slot, False, WHO, 0)
        right = MULTIPLY_HALF(right, left_operands, right_operands, slot, False, WHO, 1)
        # One step stays in flight; the one before it has read its operands.
        left, right = warpgroup_mma_wait(num_outstanding=2, deps=(left, right))
        mbarrier.arrive(free.index(last), count=1)
    left, right = warpgroup_mma_wait(num_outstanding=0, deps=(left, right))
    mbarrier.arrive(free.index(slot), count=1)
    slot, phase = next_slot(slot, phase, STAGES)
    return left, right, slot, phase


def descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """A tensor descriptor of a matrix that one can address, in the layout of its products."""
    return TensorDescriptor.from_tensor(matrix, block, _layout(*block, str(matrix.dtype)[6:]))


@functools.cache
def _layout(rows: int, columns: int, dtype: str) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], getattr(gl, dtype))
