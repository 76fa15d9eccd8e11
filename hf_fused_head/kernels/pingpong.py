"""The head's product on Hopper, part of its exponents behind the product of the next tile.

By their rates, the exponentials keep a multiprocessor's special function units busy for an eighth
(hidden size 1024) to a thirtieth (4096) of the time that its tensor cores need for the product, and
warps that make them cannot start the next product. Here one warp loads, and two groups of four
multiply 64 rows of every tile each, left and right columns apart: before a group finishes the right
columns of one tile, it begins the left columns of the next.

It does not rely on one group multiplying while the other makes exponents. Both wait for the same
loads: clocks in a prototype had them finish a product 300 cycles from each other on average, and
with one forced a step behind it was slower (8192x1024x151936, one H100).

Triton has no word for this; Gluon, its lower dialect, has. The epilogue is written once: Gluon
reads the source of the Triton functions with its own language in place of Triton's.
"""

from __future__ import annotations

import functools
import types
from typing import Any

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
from hf_fused_head.kernels.tuning import TileConfig, cdiv


def _in_gluon(function: Any, **names: Any) -> Any:
    """A Triton function's source as a Gluon function, where `tl` and `names` mean Gluon's."""
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
    _exponential=_in_gluon(tile_epilogue._exponential),
    _smooth_sum=_in_gluon(tile_epilogue._smooth_sum),
    _entropy_sum=_in_gluon(tile_epilogue._entropy_sum),
)


@gluon.jit
def _load_operands(operands, buffers, grid, STAGES: gl.constexpr, GROUP_T: gl.constexpr):
    """The loading warp: fills the ring of operand tiles, the low-rank pair's after the first's."""
    hidden_desc, weight_desc, low_desc, low_weight_desc = operands
    hidden_bufs, weight_bufs, ready, free = buffers
    num_tiles, num_tiles_t, num_tiles_v, num_steps, num_low_steps = grid
    ROWS: gl.constexpr = hidden_desc.block_shape[0]
    BLOCK_V: gl.constexpr = weight_desc.block_shape[0]
    BLOCK_H: gl.constexpr = weight_desc.block_shape[1]
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        pid_t, pid_v = tile_position(tile, num_tiles_t, num_tiles_v, GROUP_T)
        first_t = pid_t * 2 * ROWS
        for step in range(num_steps + num_low_steps):
            bar = ready.index(slot)
            mbarrier.wait(free.index(slot), phase)
            mbarrier.expect(bar, 2 * hidden_desc.block_type.nbytes + weight_desc.block_type.nbytes)
            upper, lower = hidden_bufs.index(2 * slot), hidden_bufs.index(2 * slot + 1)
            if step < num_steps:
                first_h = step * BLOCK_H
                async_load(hidden_desc, [first_t, first_h], bar, upper)
                async_load(hidden_desc, [first_t + ROWS, first_h], bar, lower)
                async_load(weight_desc, [pid_v * BLOCK_V, first_h], bar, weight_bufs.index(slot))
            else:
                first_h = (step - num_steps) * BLOCK_H
                async_load(low_desc, [first_t, first_h], bar, upper)
                async_load(low_desc, [first_t + ROWS, first_h], bar, lower)
                async_load(
                    low_weight_desc, [pid_v * BLOCK_V, first_h], bar, weight_bufs.index(slot)
                )
            slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _multiply_half(
    acc, hidden_bufs, weight_bufs, slot, fresh, WHO: gl.constexpr, HALF: gl.constexpr
):
    """Begins one step of a group's product with the left (0) or right (1) half of a tile."""
    COLUMNS: gl.constexpr = weight_bufs.type.shape[1] // 2
    weight = weight_bufs.index(slot).slice(HALF * COLUMNS, COLUMNS, 0).permute((1, 0))
    hidden = hidden_bufs.index(2 * slot + WHO)
    return warpgroup_mma(hidden, weight, acc, use_acc=not fresh, is_async=True)


@gluon.jit
def _finish_half(
    acc,
    first_t,
    first_v,
    labels,
    shift,
    holds_label,
    store,
    sizes,
    epilogue,
    WHO: gl.constexpr,
    HALF: gl.constexpr,
):
    """Row sums and, with a store, the stored tile of half of a product's columns."""
    COLUMNS: gl.constexpr = acc.shape[1]
    offs_t = first_t + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
    offs_v = first_v + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, acc.type.layout))
    rows = (labels, shift, holds_label)
    options, sum_ptrs, row_ptrs = epilogue
    tile, sums = _epilogue(
        acc, offs_t, offs_v, first_v, *rows, *sizes, *options, *sum_ptrs, *row_ptrs
    )
    store_desc, out_bufs = store
    if store_desc is not None:
        # What this half wrote one tile ago has left its buffer. The second half lets the first one
        # be under way; the first waits for all, since the tile before may have had no second.
        tma.store_wait(HALF)
        out_buf = out_bufs.index(2 * WHO + HALF)
        out_buf.store(tile.to(store_desc.dtype))
        fence_async_shared()
        async_store(store_desc, [first_t, first_v], out_buf)
    # Behind the fence, which would wait for them.
    num_tokens, _ = sizes
    _store_sums(sums, offs_t, first_v, COLUMNS, num_tokens, *sum_ptrs)


@gluon.jit
def _multiply(
    store,
    buffers,
    grid,
    sizes,
    rows,
    epilogue,
    WHO: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
):
    """One of the two groups that multiply: rows `WHO * 64` to `WHO * 64 + 63` of every tile."""
    num_tokens, vocab_size = sizes
    labels_ptr, shift_ptr = rows
    vocab_start = epilogue[0][0]
    hidden_bufs, weight_bufs, ready, _ = buffers
    num_tiles, num_tiles_t, num_tiles_v, num_steps, num_low_steps = grid
    ROWS: gl.constexpr = hidden_bufs.type.shape[1]
    COLUMNS: gl.constexpr = weight_bufs.type.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    # Every warp holds all rows: it finds their labels without a word to the others.
    every_warp: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [4], [0])
    # What the tile before the first owes: the right half of nothing.
    right = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
    right_t = 0
    right_v = vocab_size
    right_labels = gl.zeros((ROWS,), dtype=gl.int64, layout=rows_layout)
    right_shift = gl.zeros((ROWS,), dtype=gl.float32, layout=rows_layout)
    right_holds = False
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        pid_t, pid_v = tile_position(tile, num_tiles_t, num_tiles_v, GROUP_T)
        first_t = pid_t * 2 * ROWS + WHO * ROWS
        first_v = pid_v * 2 * COLUMNS
        # Loaded before they are needed: they arrive behind the product.
        offs_t = first_t + gl.arange(0, ROWS, layout=rows_layout)
        labels, shift = _load_rows(labels_ptr, shift_ptr, offs_t, num_tokens)
        offs_t = first_t + gl.arange(0, ROWS, layout=every_warp)
        all_labels = gl.load(labels_ptr + offs_t, mask=offs_t < num_tokens, other=-1)

        left = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
        mbarrier.wait(ready.index(slot), phase)
        left = _multiply_half(left, hidden_bufs, weight_bufs, slot, True, WHO, 0)
        # Says that the right half is complete, which the compiler does not see across the loop.
        right = warpgroup_mma_wait(num_outstanding=1, deps=(right,))
        # The last tile may have no column of the vocabulary in its right half.
        if right_v < vocab_size:
            half = (right_t, right_v, right_labels, right_shift, right_holds)
            _finish_half(right, *half, store, sizes, epilogue, WHO, 1)
        right = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
        right = _multiply_half(right, hidden_bufs, weight_bufs, slot, True, WHO, 1)
        middle = first_v + COLUMNS
        left_holds = _labels_among(all_labels, first_v, middle, vocab_start)
        right_holds = _labels_among(all_labels, middle, middle + COLUMNS, vocab_start)
        left, right, slot, phase = multiply_rest(
            left,
            right,
            buffers,
            slot,
            phase,
            num_steps + num_low_steps,
            _multiply_half,
            WHO,
            STAGES,
        )
        half = (first_t, first_v, labels, shift, left_holds)
        _finish_half(left, *half, store, sizes, epilogue, WHO, 0)
        right_t = first_t
        right_v = middle
        right_labels = labels
        right_shift = shift
    if right_v < vocab_size:
        half = (right_t, right_v, right_labels, right_shift, right_holds)
        _finish_half(right, *half, store, sizes, epilogue, WHO, 1)
    if store[0] is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens", "vocab_size", "vocab_start"])
def _head_pingpong_kernel(
    hidden_desc,
    weight_desc,
    low_desc,
    low_weight_desc,
    store_desc,
    labels_ptr,
    bias_ptr,
    class_weight_ptr,
    shift_ptr,
    total_ptr,
    entropy_sum_ptr,
    smooth_sum_ptr,
    best_ptr,
    target_shifted_ptr,
    alpha_ptr,
    target_ptr,
    gamma_ptr,
    eta_ptr,
    entropy_ptr,
    skip_ptr,
    logit_scale,
    softcap,
    num_tokens,
    vocab_size,
    vocab_start,
    hidden_size,
    rank,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
):
    """Persistent: program i owns tiles i, i + programs, ... of 128 x 256 logits.

    As `head._head_descriptor_kernel`, with row sums of every 128 columns.
    """
    ROWS: gl.constexpr = hidden_desc.block_shape[0]
    BLOCK_V: gl.constexpr = weight_desc.block_shape[0]
    BLOCK_H: gl.constexpr = weight_desc.block_shape[1]
    num_tiles_t = gl.cdiv(num_tokens, 2 * ROWS)
    num_tiles_v = gl.cdiv(vocab_size, BLOCK_V)
    num_tiles = num_tiles_t * num_tiles_v
    if skip_ptr is not None:
        num_tiles = gl.where(gl.load(skip_ptr) != 0, 0, num_tiles)
    num_steps = gl.cdiv(hidden_size, BLOCK_H)
    num_low_steps = gl.cdiv(rank, BLOCK_H)
    grid = (num_tiles, num_tiles_t, num_tiles_v, num_steps, num_low_steps)

    dtype: gl.constexpr = hidden_desc.dtype
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_V // 2], dtype)
    hidden_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, ROWS, BLOCK_H], hidden_desc.layout)
    weight_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_V, BLOCK_H], weight_desc.layout)
    out_bufs = gl.allocate_shared_memory(
        dtype, [4, ROWS, BLOCK_V // 2] if store_desc is not None else [4, 8, 64], out_layout
    )
    ready, free = ring_barriers(STAGES)

    operands = (hidden_desc, weight_desc, low_desc, low_weight_desc)
    buffers = (hidden_bufs, weight_bufs, ready, free)
    rows = (labels_ptr, shift_ptr)
    options = (vocab_start, bias_ptr, class_weight_ptr, logit_scale, softcap)
    sum_ptrs = (total_ptr, entropy_sum_ptr, smooth_sum_ptr, best_ptr)
    row_ptrs = (target_shifted_ptr, alpha_ptr, target_ptr, gamma_ptr, eta_ptr, entropy_ptr)
    epilogue = (options, sum_ptrs, row_ptrs)
    store = (store_desc, out_bufs)
    sizes = (num_tokens, vocab_size)
    gl.warp_specialize(
        [
            (_multiply, (store, buffers, grid, sizes, rows, epilogue, 0, STAGES, GROUP_T)),
            (_multiply, (store, buffers, grid, sizes, rows, epilogue, 1, STAGES, GROUP_T)),
            (_load_operands, (operands, buffers, grid, STAGES, GROUP_T)),
        ],
        [4, 1],
        [MULTIPLYING, LOADING],
    )


def launch_pingpong(
    matrices: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    pointers: tuple[Any, ...],
    config: TileConfig,
) -> None:
    """Launches the kernel; see `head._launch`, which knows when it may.

    Args:
        matrices: Hidden states, weight, the low-rank pair and the store, as descriptors can
            address them; the last three may be None.
        pointers: What the kernel takes after them.
        config: Two tiles of it, side by side, are one of the kernel's.
    """
    rows, columns, depth = config.block_t // 2, 2 * config.block_v, config.block_h
    blocks = ([rows, depth], [columns, depth], [rows, depth], [columns, depth])
    hidden, weight, low, low_weight, store = matrices
    # Without a low-rank pair the kernel takes no steps over it, but has to have descriptors.
    pairs = (hidden, weight, hidden, weight) if low is None else (hidden, weight, low, low_weight)
    descriptors = [descriptor(*pair) for pair in zip(pairs, blocks, strict=True)]
    descriptors.append(None if store is None else descriptor(store, [rows, columns // 2]))
    num_tiles = cdiv(hidden.shape[0], config.block_t) * cdiv(weight.shape[0], columns)
    _head_pingpong_kernel[(min(config.num_programs, num_tiles),)](
        *descriptors,
        *pointers,
        STAGES=config.num_stages,
        GROUP_T=config.group_t,
        num_warps=4,
    )
