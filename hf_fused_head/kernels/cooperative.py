"""The head's product on Hopper: a cooperative kernel, half of whose epilogue runs behind a product.

By the rates of the units, the exponentials of a tile take an eighth (hidden size 1024) to a
thirtieth (4096) of the time of its product on the tensor cores, and a warp that computes them
cannot start the next product. Here one producer warp loads, and two consumer warp groups multiply
64 rows of every tile each, left and right columns separately. Before a consumer finishes the right
columns of one tile, it starts the product of the left columns of the next (see `hopper`).

That one consumer multiplies while the other one computes exponentials, as in CUTLASS's ping-pong
kernels, is not relied on. Both wait for the same loads: by the clocks of a prototype they finished
a product 300 cycles apart on average, and with one forced a step behind the other it was slower
(8192x1024x151936, one H100).

Triton cannot express this; Gluon, its lower-level dialect, can. The epilogue is written once: the
source of its Triton functions is compiled as Gluon, with Gluon's language in place of Triton's.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hf_fused_head.kernels import epilogue as tile_epilogue
from hf_fused_head.kernels import product
from hf_fused_head.kernels.arguments import Launch, LogitOptions
from hf_fused_head.kernels.hopper import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    Output,
    Ring,
    async_load,
    async_store,
    descriptor,
    multiply_rest,
    next_slot,
    ring_barriers,
)
from hf_fused_head.kernels.operands import Head, RowFactors, RowSums
from hf_fused_head.kernels.tuning import TileConfig, cdiv


def _in_gluon(function: Any, **names: Any) -> Any:
    """A Triton function's source as a Gluon function; `tl` and `names` stand for Gluon's there."""
    source = function.fn
    scope = {**source.__globals__, "tl": gl, **names}
    copy = types.FunctionType(source.__code__, scope, source.__name__, source.__defaults__)
    return gluon.jit(functools.update_wrapper(copy, source))


tile_position = _in_gluon(product.tile_position)
_logits_of = _in_gluon(product.logits_of, tanh_and_slope=_in_gluon(product.tanh_and_slope))
_load_rows = _in_gluon(tile_epilogue.load_rows)
_labels_among = _in_gluon(tile_epilogue.labels_among)
_store_sums = _in_gluon(tile_epilogue.store_sums)
_epilogue = _in_gluon(
    tile_epilogue.epilogue,
    logits_of=_logits_of,
    exponential=_in_gluon(tile_epilogue.exponential),
    _smooth_sum=_in_gluon(tile_epilogue._smooth_sum),
    _entropy_sum=_in_gluon(tile_epilogue._entropy_sum),
    _square_sum=_in_gluon(tile_epilogue._square_sum),
)


class _Grid(NamedTuple):
    """The tiles of the logits, and the steps of the product of each."""

    num_tiles: Any  # 0 where the launch is skipped
    num_tiles_t: Any
    num_tiles_v: Any
    num_steps: Any
    num_low_steps: Any  # over the low-rank pair, after the others


class _Half(NamedTuple):
    """The left or right columns of one consumer's rows of a tile: where they are, their rows."""

    first_t: Any
    first_v: Any
    labels: Any
    anchor: Any
    holds_label: Any


@gluon.jit
def _load_operands(
    hidden_desc,
    weight_desc,
    low_desc,
    low_weight_desc,
    ring,
    grid,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
):
    """The producer warp: fills the ring with the operands of every step of the program's tiles."""
    ROWS: gl.constexpr = hidden_desc.block_shape[0]
    BLOCK_V: gl.constexpr = weight_desc.block_shape[0]
    BLOCK_H: gl.constexpr = weight_desc.block_shape[1]
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), grid.num_tiles, gl.num_programs(0)):
        pid_t, pid_v = tile_position(tile, grid.num_tiles_t, grid.num_tiles_v, GROUP_T)
        first_t = pid_t * 2 * ROWS
        for step in range(grid.num_steps + grid.num_low_steps):
            bar = ring.ready.index(slot)
            mbarrier.wait(ring.free.index(slot), phase)
            mbarrier.expect(bar, 2 * hidden_desc.block_type.nbytes + weight_desc.block_type.nbytes)
            upper, lower = ring.left.index(2 * slot), ring.left.index(2 * slot + 1)
            if step < grid.num_steps:
                first_h = step * BLOCK_H
                async_load(hidden_desc, [first_t, first_h], bar, upper)
                async_load(hidden_desc, [first_t + ROWS, first_h], bar, lower)
                async_load(weight_desc, [pid_v * BLOCK_V, first_h], bar, ring.right.index(slot))
            else:
                first_h = (step - grid.num_steps) * BLOCK_H
                async_load(low_desc, [first_t, first_h], bar, upper)
                async_load(low_desc, [first_t + ROWS, first_h], bar, lower)
                async_load(low_weight_desc, [pid_v * BLOCK_V, first_h], bar, ring.right.index(slot))
            slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _multiply_half(acc, ring, slot, fresh, CONSUMER: gl.constexpr, HALF: gl.constexpr):
    """Starts one step of a consumer's product with the left (0) or right (1) half of a tile."""
    COLUMNS: gl.constexpr = ring.right.type.shape[1] // 2
    weight = ring.right.index(slot).slice(HALF * COLUMNS, COLUMNS, 0).permute((1, 0))
    hidden = ring.left.index(2 * slot + CONSUMER)
    return warpgroup_mma(hidden, weight, acc, use_acc=not fresh, is_async=True)


@gluon.jit
def _finish_half(acc, half, launch, output, CONSUMER: gl.constexpr, HALF: gl.constexpr):
    """Writes the row sums of half of a product's columns and, with an output, the tile itself."""
    COLUMNS: gl.constexpr = acc.shape[1]
    offs_t = half.first_t + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
    offs_v = half.first_v + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, acc.type.layout))
    rows = (half.labels, half.anchor, half.holds_label)
    tile, tile_sums = _epilogue(acc, launch, offs_t, offs_v, half.first_v, *rows)
    if output.desc is not None:
        # What this half wrote one tile ago has left its buffer. The right half may leave the left
        # one in flight; the left waits for all, since the tile before may have had no right half.
        tma.store_wait(HALF)
        buffer = output.buffers.index(2 * CONSUMER + HALF)
        buffer.store(tile.to(output.desc.dtype))
        fence_async_shared()
        async_store(output.desc, [half.first_t, half.first_v], buffer)
    # After the fence, which would wait for these stores.
    _store_sums(tile_sums, launch, offs_t, half.first_v, COLUMNS)


@gluon.jit
def _multiply(
    output,
    ring,
    grid,
    launch,
    CONSUMER: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
):
    """One of two consumers: rows `CONSUMER * 64` to `CONSUMER * 64 + 63` of every tile."""
    ROWS: gl.constexpr = ring.left.type.shape[1]
    COLUMNS: gl.constexpr = ring.right.type.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    # Every warp holds all rows, so that it finds their labels without an exchange between warps.
    every_warp: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [4], [0])
    # No tile comes before the first: its right half lies beyond the vocabulary.
    right = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
    right_t = 0
    right_v = launch.local_vocab_size
    right_labels = gl.zeros((ROWS,), dtype=gl.int64, layout=rows_layout)
    right_anchor = gl.zeros((ROWS,), dtype=gl.float32, layout=rows_layout)
    right_holds = False
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), grid.num_tiles, gl.num_programs(0)):
        pid_t, pid_v = tile_position(tile, grid.num_tiles_t, grid.num_tiles_v, GROUP_T)
        first_t = pid_t * 2 * ROWS + CONSUMER * ROWS
        first_v = pid_v * 2 * COLUMNS
        # Loaded before they are needed: they arrive during the product.
        offs_t = first_t + gl.arange(0, ROWS, layout=rows_layout)
        labels, anchor = _load_rows(launch, offs_t)
        offs_t = first_t + gl.arange(0, ROWS, layout=every_warp)
        all_labels = gl.load(launch.labels + offs_t, mask=offs_t < launch.num_tokens, other=-1)

        left = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
        mbarrier.wait(ring.ready.index(slot), phase)
        left = _multiply_half(left, ring, slot, True, CONSUMER, 0)
        # The right half is complete; the compiler does not see that across the loop.
        right = warpgroup_mma_wait(num_outstanding=1, deps=(right,))
        # The last tile may have no column of the vocabulary in its right half.
        if right_v < launch.local_vocab_size:
            half = _Half(right_t, right_v, right_labels, right_anchor, right_holds)
            _finish_half(right, half, launch, output, CONSUMER, 1)
        right = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
        right = _multiply_half(right, ring, slot, True, CONSUMER, 1)
        middle = first_v + COLUMNS
        left_holds = _labels_among(all_labels, first_v, middle, launch.vocab_start)
        right_holds = _labels_among(all_labels, middle, middle + COLUMNS, launch.vocab_start)
        left, right, slot, phase = multiply_rest(
            left,
            right,
            ring,
            slot,
            phase,
            grid.num_steps + grid.num_low_steps,
            _multiply_half,
            CONSUMER,
            STAGES,
        )
        half = _Half(first_t, first_v, labels, anchor, left_holds)
        _finish_half(left, half, launch, output, CONSUMER, 0)
        right_t = first_t
        right_v = middle
        right_labels = labels
        right_anchor = anchor
    if right_v < launch.local_vocab_size:
        half = _Half(right_t, right_v, right_labels, right_anchor, right_holds)
        _finish_half(right, half, launch, output, CONSUMER, 1)
    if output.desc is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens", "local_vocab_size", "vocab_start"])
def _head_cooperative_kernel(
    hidden_desc,
    weight_desc,
    low_desc,
    low_weight_desc,
    store_desc,
    labels_ptr,
    anchor_ptr,
    sums,
    gradient,
    skip_ptr,
    logit_options,
    num_tokens,
    local_vocab_size,
    vocab_start,
    hidden_size,
    rank,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
):
    """Persistent: program i owns tiles i, i + programs, ... of 128 x 256 logits.

    Writes as `head._head_descriptor_kernel` does, with row sums of every 128 columns.
    """
    ROWS: gl.constexpr = hidden_desc.block_shape[0]
    BLOCK_V: gl.constexpr = weight_desc.block_shape[0]
    BLOCK_H: gl.constexpr = weight_desc.block_shape[1]
    num_tiles_t = gl.cdiv(num_tokens, 2 * ROWS)
    num_tiles_v = gl.cdiv(local_vocab_size, BLOCK_V)
    num_tiles = num_tiles_t * num_tiles_v
    if skip_ptr is not None:
        num_tiles = gl.where(gl.load(skip_ptr) != 0, 0, num_tiles)
    num_steps = gl.cdiv(hidden_size, BLOCK_H)
    num_low_steps = gl.cdiv(rank, BLOCK_H)
    grid = _Grid(num_tiles, num_tiles_t, num_tiles_v, num_steps, num_low_steps)

    dtype: gl.constexpr = hidden_desc.dtype
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_V // 2], dtype)
    hidden_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, ROWS, BLOCK_H], hidden_desc.layout)
    weight_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_V, BLOCK_H], weight_desc.layout)
    out_bufs = gl.allocate_shared_memory(
        dtype, [4, ROWS, BLOCK_V // 2] if store_desc is not None else [4, 8, 64], out_layout
    )
    ready, free = ring_barriers(STAGES)
    ring = Ring(hidden_bufs, weight_bufs, ready, free)
    output = Output(store_desc, out_bufs)
    sums, gradient = RowSums(*sums), RowFactors(*gradient)
    launch = Launch(
        num_tokens,
        local_vocab_size,
        labels_ptr,
        anchor_ptr if gradient.lse is None else gradient.lse,
        vocab_start,
        LogitOptions(*logit_options),
        sums,
        gradient,
    )
    gl.warp_specialize(
        [
            (_multiply, (output, ring, grid, launch, 0, STAGES, GROUP_T)),
            (_multiply, (output, ring, grid, launch, 1, STAGES, GROUP_T)),
            (
                _load_operands,
                (
                    hidden_desc,
                    weight_desc,
                    low_desc,
                    low_weight_desc,
                    ring,
                    grid,
                    STAGES,
                    GROUP_T,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def launch_cooperative(
    head: Head, store: Tensor | None, arguments: dict[str, Any], config: TileConfig
) -> None:
    """Launches the kernel; see `head._launch`, which decides when.

    Args:
        head: The head, whose matrices descriptors can address.
        store: [T, V] of their dtype, likewise; None to store nothing.
        arguments: Those that the kernels in `head` take too, by name.
        config: The tile; two of it, side by side, are one of this kernel's.
    """
    rows, columns, depth = config.block_t // 2, 2 * config.block_v, config.block_h
    hidden, weight = head.hidden, head.weight
    # Without a low-rank pair the kernel takes no steps over it, but needs descriptors.
    low, low_weight, rank = hidden, weight, 0
    if head.low is not None and head.low_weight is not None:
        low, low_weight, rank = head.low, head.low_weight, head.low.shape[1]
    num_tiles = cdiv(hidden.shape[0], config.block_t) * cdiv(weight.shape[0], columns)
    _head_cooperative_kernel[(min(config.num_programs, num_tiles),)](
        descriptor(hidden, [rows, depth]),
        descriptor(weight, [columns, depth]),
        descriptor(low, [rows, depth]),
        descriptor(low_weight, [columns, depth]),
        None if store is None else descriptor(store, [rows, columns // 2]),
        hidden_size=hidden.shape[1],
        rank=rank,
        STAGES=config.num_stages,
        GROUP_T=config.group_t,
        num_warps=4,
        **arguments,
    )
