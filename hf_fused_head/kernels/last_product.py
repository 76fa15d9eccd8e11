"""On Hopper, the product that completes a float32 sum, rounded on its way out.

cuBLAS adds to a sum in the sum's dtype, so that rounding it takes one more pass over float32
memory. This kernel multiplies `tile.T @ hidden`, whose operands both lie along their depth T, adds
the sum to its result in registers, and writes 16 bits.

It is cooperative, as the head's product in `cooperative` is: one producer warp, two consumers with
64 rows of every tile each, and the right columns of a tile finished while the first products of the
next one run.
"""

from __future__ import annotations

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

from hf_fused_head.kernels.cooperative import tile_position
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
from hf_fused_head.kernels.tuning import TileConfig, cdiv


class _Grid(NamedTuple):
    """The tiles of the result, and the steps of the product of each."""

    num_tiles: Any
    num_tiles_v: Any
    num_tiles_h: Any
    num_steps: Any


class _Total(NamedTuple):
    """The float32 sum that the product completes: [V, H], unit stride along H."""

    ptr: Any
    stride_v: Any


@gluon.jit
def _load_operands(tile_desc, hidden_desc, ring, grid, STAGES: gl.constexpr, GROUP_H: gl.constexpr):
    """The producer warp: fills the ring with the operands of every step, each in two halves."""
    BLOCK_T: gl.constexpr = tile_desc.block_shape[0]
    ROWS: gl.constexpr = tile_desc.block_shape[1]
    COLUMNS: gl.constexpr = hidden_desc.block_shape[1]
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), grid.num_tiles, gl.num_programs(0)):
        pid_h, pid_v = tile_position(tile, grid.num_tiles_h, grid.num_tiles_v, GROUP_H)
        for step in range(grid.num_steps):
            bar = ring.ready.index(slot)
            mbarrier.wait(ring.free.index(slot), phase)
            mbarrier.expect(
                bar, 2 * tile_desc.block_type.nbytes + 2 * hidden_desc.block_type.nbytes
            )
            first_t = step * BLOCK_T
            for half in gl.static_range(2):
                first_v = (2 * pid_v + half) * ROWS
                async_load(tile_desc, [first_t, first_v], bar, ring.left.index(2 * slot + half))
            for half in gl.static_range(2):
                first_h = (2 * pid_h + half) * COLUMNS
                async_load(hidden_desc, [first_t, first_h], bar, ring.right.index(2 * slot + half))
            slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _multiply_half(acc, ring, slot, fresh, CONSUMER: gl.constexpr, HALF: gl.constexpr):
    """Starts one step of a consumer's product with the left (0) or right (1) half of a tile."""
    rows = ring.left.index(2 * slot + CONSUMER).permute((1, 0))
    columns = ring.right.index(2 * slot + HALF)
    return warpgroup_mma(rows, columns, acc, use_acc=not fresh, is_async=True)


@gluon.jit
def _finish_half(
    acc,
    first_v,
    first_h,
    total,
    output,
    vocab_size,
    hidden_size,
    CONSUMER: gl.constexpr,
    HALF: gl.constexpr,
):
    """Adds the sum to half of a product's columns and writes them."""
    offs_v = first_v + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
    offs_h = first_h + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
    total_ptrs = total.ptr + offs_v.to(gl.int64)[:, None] * total.stride_v + offs_h[None, :]
    inside = (offs_v < vocab_size)[:, None] & (offs_h < hidden_size)[None, :]
    acc += gl.load(total_ptrs, mask=inside, other=0.0)
    # As in `cooperative`: the right half may leave the left one in flight.
    tma.store_wait(HALF)
    buffer = output.buffers.index(2 * CONSUMER + HALF)
    buffer.store(acc.to(output.desc.dtype))
    fence_async_shared()
    async_store(output.desc, [first_v, first_h], buffer)


@gluon.jit
def _multiply(
    total,
    output,
    ring,
    grid,
    vocab_size,
    hidden_size,
    CONSUMER: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_H: gl.constexpr,
):
    """One of two consumers: rows `CONSUMER * 64` to `CONSUMER * 64 + 63` of every tile."""
    ROWS: gl.constexpr = ring.left.type.shape[2]
    COLUMNS: gl.constexpr = ring.right.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    sizes = (vocab_size, hidden_size)
    # No tile comes before the first: its right half lies beyond the result.
    right = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
    right_v = 0
    right_h = hidden_size
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), grid.num_tiles, gl.num_programs(0)):
        pid_h, pid_v = tile_position(tile, grid.num_tiles_h, grid.num_tiles_v, GROUP_H)
        first_v = (2 * pid_v + CONSUMER) * ROWS
        first_h = pid_h * 2 * COLUMNS
        left = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
        mbarrier.wait(ring.ready.index(slot), phase)
        left = _multiply_half(left, ring, slot, True, CONSUMER, 0)
        # The right half is complete; the compiler does not see that across the loop.
        right = warpgroup_mma_wait(num_outstanding=1, deps=(right,))
        # The last tile may have no column in its right half.
        if right_h < hidden_size:
            _finish_half(right, right_v, right_h, total, output, *sizes, CONSUMER, 1)
        right = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
        right = _multiply_half(right, ring, slot, True, CONSUMER, 1)
        left, right, slot, phase = multiply_rest(
            left, right, ring, slot, phase, grid.num_steps, _multiply_half, CONSUMER, STAGES
        )
        _finish_half(left, first_v, first_h, total, output, *sizes, CONSUMER, 0)
        right_v = first_v
        right_h = first_h + COLUMNS
    if right_h < hidden_size:
        _finish_half(right, right_v, right_h, total, output, *sizes, CONSUMER, 1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["vocab_size", "num_tokens"])
def _last_product_kernel(
    tile_desc,
    hidden_desc,
    out_desc,
    total_ptr,
    stride_total_v,
    vocab_size,
    hidden_size,
    num_tokens,
    STAGES: gl.constexpr,
    GROUP_H: gl.constexpr,
):
    """Persistent: program i owns tiles i, i + programs, ... of 128 x 256 elements of the result.

    Writes `total + tile.T @ hidden`, rounded. `GROUP_H` column tiles follow each other, so that the
    large operand is read once.
    """
    BLOCK_T: gl.constexpr = tile_desc.block_shape[0]
    ROWS: gl.constexpr = tile_desc.block_shape[1]
    COLUMNS: gl.constexpr = hidden_desc.block_shape[1]
    num_tiles_v = gl.cdiv(vocab_size, 2 * ROWS)
    num_tiles_h = gl.cdiv(hidden_size, 2 * COLUMNS)
    num_steps = gl.cdiv(num_tokens, BLOCK_T)
    grid = _Grid(num_tiles_v * num_tiles_h, num_tiles_v, num_tiles_h, num_steps)

    dtype: gl.constexpr = tile_desc.dtype
    tile_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_T, ROWS], tile_desc.layout)
    hidden_bufs = gl.allocate_shared_memory(
        dtype, [2 * STAGES, BLOCK_T, COLUMNS], hidden_desc.layout
    )
    out_bufs = gl.allocate_shared_memory(dtype, [4, ROWS, COLUMNS], out_desc.layout)
    ready, free = ring_barriers(STAGES)

    ring = Ring(tile_bufs, hidden_bufs, ready, free)
    output = Output(out_desc, out_bufs)
    total = _Total(total_ptr, stride_total_v)
    gl.warp_specialize(
        [
            (_multiply, (total, output, ring, grid, vocab_size, hidden_size, 0, STAGES, GROUP_H)),
            (_multiply, (total, output, ring, grid, vocab_size, hidden_size, 1, STAGES, GROUP_H)),
            (_load_operands, (tile_desc, hidden_desc, ring, grid, STAGES, GROUP_H)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def launch_last_product(
    tile: Tensor, hidden: Tensor, total: Tensor, out: Tensor, config: TileConfig
) -> None:
    """`out = total + tile.T @ hidden`, summed in float32 and rounded once.

    Args:
        tile: [T, V] of 16 bits, as a descriptor can address it.
        hidden: [T, H] of its dtype, likewise.
        total: [V, H] float32, unit stride along H; only read.
        out: [V, H] of the operands' dtype, likewise; written, and does not have to be zeroed.
        config: A cooperative tile; two of it, side by side, are one of this kernel's.
    """
    rows, columns, depth = config.block_t // 2, config.block_v, config.block_h
    vocab_size, hidden_size = out.shape
    num_tiles = cdiv(vocab_size, 2 * rows) * cdiv(hidden_size, 2 * columns)
    _last_product_kernel[(min(config.num_programs, num_tiles),)](
        descriptor(tile, [depth, rows]),
        descriptor(hidden, [depth, columns]),
        descriptor(out, [rows, columns]),
        total,
        total.stride(0),
        vocab_size,
        hidden_size,
        num_tokens=tile.shape[0],
        STAGES=config.num_stages,
        GROUP_H=config.group_t,
        num_warps=4,
    )
