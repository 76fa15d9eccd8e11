"""On Hopper, the product that completes a float32 sum, rounded on its way out.

cuBLAS leaves a sum in the dtype in which it found it, so that rounding it is one more pass over
float32 memory. This kernel multiplies `tile.T @ hidden`, of operands that both lie along their
depth T, adds the sum to what it has in registers, and writes 16 bits.

Its shape is that of `pingpong`: one warp loads, two groups of four multiply 64 rows of a tile each,
and the right columns of a tile are finished behind the first products of the next.
"""

from __future__ import annotations

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

from hf_fused_head.kernels.hopper import (
    LOADING,
    MULTIPLYING,
    async_load,
    async_store,
    descriptor,
    multiply_rest,
    next_slot,
    ring_barriers,
)
from hf_fused_head.kernels.pingpong import tile_position
from hf_fused_head.kernels.tuning import TileConfig, cdiv


@gluon.jit
def _load_operands(descs, buffers, grid, STAGES: gl.constexpr, GROUP_H: gl.constexpr):
    """The loading warp: fills the ring of operand tiles, each in two halves."""
    tile_desc, hidden_desc = descs
    tile_bufs, hidden_bufs, ready, free = buffers
    num_tiles, num_tiles_v, num_tiles_h, num_steps = grid
    BLOCK_T: gl.constexpr = tile_desc.block_shape[0]
    ROWS: gl.constexpr = tile_desc.block_shape[1]
    COLUMNS: gl.constexpr = hidden_desc.block_shape[1]
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        pid_h, pid_v = tile_position(tile, num_tiles_h, num_tiles_v, GROUP_H)
        for step in range(num_steps):
            bar = ready.index(slot)
            mbarrier.wait(free.index(slot), phase)
            mbarrier.expect(
                bar, 2 * tile_desc.block_type.nbytes + 2 * hidden_desc.block_type.nbytes
            )
            first_t = step * BLOCK_T
            for half in gl.static_range(2):
                first_v = (2 * pid_v + half) * ROWS
                async_load(tile_desc, [first_t, first_v], bar, tile_bufs.index(2 * slot + half))
            for half in gl.static_range(2):
                first_h = (2 * pid_h + half) * COLUMNS
                async_load(hidden_desc, [first_t, first_h], bar, hidden_bufs.index(2 * slot + half))
            slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _multiply_half(acc, tile_bufs, hidden_bufs, slot, fresh, WHO: gl.constexpr, HALF: gl.constexpr):
    """Begins one step of a group's product with the left (0) or right (1) half of the columns."""
    rows = tile_bufs.index(2 * slot + WHO).permute((1, 0))
    columns = hidden_bufs.index(2 * slot + HALF)
    return warpgroup_mma(rows, columns, acc, use_acc=not fresh, is_async=True)


@gluon.jit
def _finish_half(acc, first_v, first_h, sums, out, sizes, WHO: gl.constexpr, HALF: gl.constexpr):
    """Adds the sum to half of a product's columns and sends them out."""
    total_ptr, stride_total_v = sums
    out_desc, out_bufs = out
    vocab_size, hidden_size = sizes
    offs_v = first_v + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
    offs_h = first_h + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
    total_ptrs = total_ptr + offs_v.to(gl.int64)[:, None] * stride_total_v + offs_h[None, :]
    inside = (offs_v < vocab_size)[:, None] & (offs_h < hidden_size)[None, :]
    acc += gl.load(total_ptrs, mask=inside, other=0.0)
    # As in `pingpong`: the second half lets the first one be under way.
    tma.store_wait(HALF)
    out_buf = out_bufs.index(2 * WHO + HALF)
    out_buf.store(acc.to(out_desc.dtype))
    fence_async_shared()
    async_store(out_desc, [first_v, first_h], out_buf)


@gluon.jit
def _multiply(
    sums,
    out,
    buffers,
    grid,
    sizes,
    WHO: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_H: gl.constexpr,
):
    """One of the two groups that multiply: rows `WHO * 64` to `WHO * 64 + 63` of every tile."""
    tile_bufs, hidden_bufs, ready, _ = buffers
    num_tiles, num_tiles_v, num_tiles_h, num_steps = grid
    _, hidden_size = sizes
    ROWS: gl.constexpr = tile_bufs.type.shape[2]
    COLUMNS: gl.constexpr = hidden_bufs.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    # What the tile before the first owes: the right half of nothing.
    right = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
    right_v = 0
    right_h = hidden_size
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        pid_h, pid_v = tile_position(tile, num_tiles_h, num_tiles_v, GROUP_H)
        first_v = (2 * pid_v + WHO) * ROWS
        first_h = pid_h * 2 * COLUMNS
        left = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
        mbarrier.wait(ready.index(slot), phase)
        left = _multiply_half(left, tile_bufs, hidden_bufs, slot, True, WHO, 0)
        # Says that the right half is complete, which the compiler does not see across the loop.
        right = warpgroup_mma_wait(num_outstanding=1, deps=(right,))
        # The last tile may have no column in its right half.
        if right_h < hidden_size:
            _finish_half(right, right_v, right_h, sums, out, sizes, WHO, 1)
        right = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
        right = _multiply_half(right, tile_bufs, hidden_bufs, slot, True, WHO, 1)
        left, right, slot, phase = multiply_rest(
            left, right, buffers, slot, phase, num_steps, _multiply_half, WHO, STAGES
        )
        _finish_half(left, first_v, first_h, sums, out, sizes, WHO, 0)
        right_v = first_v
        right_h = first_h + COLUMNS
    if right_h < hidden_size:
        _finish_half(right, right_v, right_h, sums, out, sizes, WHO, 1)
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

    `GROUP_H` column tiles follow each other, so that the large operand is read once.
    """
    BLOCK_T: gl.constexpr = tile_desc.block_shape[0]
    ROWS: gl.constexpr = tile_desc.block_shape[1]
    COLUMNS: gl.constexpr = hidden_desc.block_shape[1]
    num_tiles_v = gl.cdiv(vocab_size, 2 * ROWS)
    num_tiles_h = gl.cdiv(hidden_size, 2 * COLUMNS)
    grid = (num_tiles_v * num_tiles_h, num_tiles_v, num_tiles_h, gl.cdiv(num_tokens, BLOCK_T))

    dtype: gl.constexpr = tile_desc.dtype
    tile_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_T, ROWS], tile_desc.layout)
    hidden_bufs = gl.allocate_shared_memory(
        dtype, [2 * STAGES, BLOCK_T, COLUMNS], hidden_desc.layout
    )
    out_bufs = gl.allocate_shared_memory(dtype, [4, ROWS, COLUMNS], out_desc.layout)
    ready, free = ring_barriers(STAGES)

    buffers = (tile_bufs, hidden_bufs, ready, free)
    descs = (tile_desc, hidden_desc)
    sums = (total_ptr, stride_total_v)
    out = (out_desc, out_bufs)
    sizes = (vocab_size, hidden_size)
    gl.warp_specialize(
        [
            (_multiply, (sums, out, buffers, grid, sizes, 0, STAGES, GROUP_H)),
            (_multiply, (sums, out, buffers, grid, sizes, 1, STAGES, GROUP_H)),
            (_load_operands, (descs, buffers, grid, STAGES, GROUP_H)),
        ],
        [4, 1],
        [MULTIPLYING, LOADING],
    )


def launch_last_product(
    tile: Tensor, hidden: Tensor, total: Tensor, out: Tensor, config: TileConfig
) -> None:
    """`out = total + tile.T @ hidden`, summed in float32 and rounded once.

    Args:
        tile: [T, V] of 16 bits, as a descriptor can address it.
        hidden: [T, H] of its dtype, likewise.
        total: [V, H] float32, unit stride along H.
        out: [V, H] of the operands' dtype, likewise; written.
        config: As of the ping-pong kernel: two tiles of it, side by side, are one here.
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
        tile.shape[0],
        STAGES=config.num_stages,
        GROUP_H=config.group_t,
        num_warps=4,
    )
