"""The head's product with the loss in its epilogue: two kernels and their launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_fused_head.kernels.epilogue import epilogue, labels_among, load_rows, store_sums
from hf_fused_head.kernels.operands import Head, RowGradient, RowSums
from hf_fused_head.kernels.product import accumulate_product, tile_position
from hf_fused_head.kernels.tuning import (
    TileConfig,
    cdiv,
    interpreted,
    low_rank_block,
    product_precision,
)

# Sizes that change from batch to batch or from window to window must not compile a kernel each.
_VARYING = ["num_tokens", "vocab_size", "vocab_start"]


@triton.jit(do_not_specialize=_VARYING)
def _head_descriptor_kernel(
    hidden_desc,
    weight_desc,
    store_desc,
    low_ptr,
    low_weight_ptr,
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
    stride_low_t,
    stride_low_weight_v,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    HALVES: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Persistent: program i owns tiles i, i + NUM_PROGRAMS, ... of the logits.

    Loads go through tensor descriptors, which fill with zero outside the matrices; the finished
    tile leaves through one too (clipped there), in two halves when shared memory is short.
    """
    num_tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    num_tiles_v = tl.cdiv(vocab_size, BLOCK_V)
    # A second tile counter for the epilogue lets the loads of the next tile run ahead of it.
    tile_done = tl.program_id(0) - NUM_PROGRAMS
    num_tiles = num_tiles_t * num_tiles_v
    if skip_ptr is not None:
        num_tiles = tl.where(tl.load(skip_ptr) != 0, 0, num_tiles)
    for tile_id in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS, flatten=FLATTEN):
        pid_t, pid_v = tile_position(tile_id, num_tiles_t, num_tiles_v, GROUP_T)
        acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
        for step in range(tl.cdiv(hidden_size, BLOCK_H)):
            hidden = hidden_desc.load([pid_t * BLOCK_T, step * BLOCK_H])
            weight = weight_desc.load([pid_v * BLOCK_V, step * BLOCK_H])
            if UPCAST:
                hidden = hidden.to(tl.float32)
                weight = weight.to(tl.float32)
            acc = tl.dot(hidden, weight.T, acc, input_precision=PRECISION)

        tile_done += NUM_PROGRAMS
        pid_t, pid_v = tile_position(tile_done, num_tiles_t, num_tiles_v, GROUP_T)
        offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
        offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
        if low_ptr is not None:
            acc = accumulate_product(
                acc,
                low_ptr,
                low_weight_ptr,
                stride_low_t,
                stride_low_weight_v,
                offs_t,
                offs_v,
                num_tokens,
                vocab_size,
                rank,
                BLOCK_R,
                False,
                PRECISION,
                UPCAST,
            )
        first_v = pid_v * BLOCK_V
        labels, shift = load_rows(labels_ptr, shift_ptr, offs_t, num_tokens)
        tile, sums = epilogue(
            acc,
            offs_t,
            offs_v,
            first_v,
            labels,
            shift,
            labels_among(labels, first_v, first_v + BLOCK_V, vocab_start),
            num_tokens,
            vocab_size,
            vocab_start,
            bias_ptr,
            class_weight_ptr,
            logit_scale,
            softcap,
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
            EXACT,
        )
        pointers = (total_ptr, entropy_sum_ptr, smooth_sum_ptr, best_ptr)
        store_sums(sums, offs_t, first_v, BLOCK_V, num_tokens, *pointers)
        if store_desc is not None:
            out = tile.to(store_desc.dtype)
            if HALVES:
                pairs = tl.permute(tl.reshape(out, (BLOCK_T, 2, BLOCK_V // 2)), (0, 2, 1))
                left, right = tl.split(pairs)
                store_desc.store([pid_t * BLOCK_T, pid_v * BLOCK_V], left)
                store_desc.store([pid_t * BLOCK_T, pid_v * BLOCK_V + BLOCK_V // 2], right)
            else:
                store_desc.store([pid_t * BLOCK_T, pid_v * BLOCK_V], out)


@triton.jit(do_not_specialize=_VARYING)
def _head_pointer_kernel(
    hidden_ptr,
    weight_ptr,
    store_ptr,
    low_ptr,
    low_weight_ptr,
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
    stride_low_t,
    stride_low_weight_v,
    stride_hidden_t,
    stride_weight_v,
    stride_store_t,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Any card: one program owns one tile of the logits, loads and stores through pointers."""
    # Nested, since an absent pointer cannot be loaded from, also not behind `and`.
    if skip_ptr is not None:  # noqa: SIM102
        if tl.load(skip_ptr) != 0:
            return
    num_tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    num_tiles_v = tl.cdiv(vocab_size, BLOCK_V)
    pid_t, pid_v = tile_position(tl.program_id(0), num_tiles_t, num_tiles_v, GROUP_T)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    acc = accumulate_product(
        acc,
        hidden_ptr,
        weight_ptr,
        stride_hidden_t,
        stride_weight_v,
        offs_t,
        offs_v,
        num_tokens,
        vocab_size,
        hidden_size,
        BLOCK_H,
        EVEN_H,
        PRECISION,
        UPCAST,
    )
    if low_ptr is not None:
        acc = accumulate_product(
            acc,
            low_ptr,
            low_weight_ptr,
            stride_low_t,
            stride_low_weight_v,
            offs_t,
            offs_v,
            num_tokens,
            vocab_size,
            rank,
            BLOCK_R,
            False,
            PRECISION,
            UPCAST,
        )
    first_v = pid_v * BLOCK_V
    labels, shift = load_rows(labels_ptr, shift_ptr, offs_t, num_tokens)
    tile, sums = epilogue(
        acc,
        offs_t,
        offs_v,
        first_v,
        labels,
        shift,
        labels_among(labels, first_v, first_v + BLOCK_V, vocab_start),
        num_tokens,
        vocab_size,
        vocab_start,
        bias_ptr,
        class_weight_ptr,
        logit_scale,
        softcap,
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
        EXACT,
    )
    pointers = (total_ptr, entropy_sum_ptr, smooth_sum_ptr, best_ptr)
    store_sums(sums, offs_t, first_v, BLOCK_V, num_tokens, *pointers)
    if store_ptr is not None:
        store_ptrs = store_ptr + offs_t.to(tl.int64)[:, None] * stride_store_t + offs_v[None, :]
        mask = (offs_t < num_tokens)[:, None] & (offs_v < vocab_size)[None, :]
        tl.store(store_ptrs, tile.to(store_ptr.dtype.element_ty), mask=mask)


def describable(matrix: Tensor | None) -> bool:
    """Whether a tensor descriptor can address `matrix`, if there is one: 16-byte base and rows."""
    if matrix is None:
        return True
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and row_bytes % 16 == 0 and matrix.numel() > 0


def launch_exponents(
    head: Head,
    labels: Tensor,
    vocab_start: int,
    anchor: Tensor,
    sums: RowSums,
    store: Tensor | None,
    config: TileConfig,
    allow_tf32: bool,
    skip: Tensor | None = None,
) -> None:
    """One pass over the head: exponents around the anchors, their row sums, and maybe themselves.

    Args:
        head: The head, or a window of it that starts at `vocab_start`.
        labels: [T] int64, contiguous, of the whole vocabulary; negative where none counts.
        vocab_start: First vocabulary row of the window.
        anchor: [T] float32, contiguous.
        sums: Row sums of the window's tiles, `ceil(window / config.block_v)` of them, contiguous;
            nothing has to be zeroed.
        store: [T, window] of the hidden states' dtype, unit stride along V: exponents times the
            softcap's slope, zero at the labels; None to store nothing.
        config: The tile.
        allow_tf32: Whether float32 products may round their operands to tf32.
        skip: One int32 on the device; where it is not 0 nothing is done and nothing written.
    """
    _launch(head, labels, vocab_start, anchor, sums, None, store, config, allow_tf32, skip)


def launch_gradient(
    head: Head,
    labels: Tensor,
    vocab_start: int,
    gradient: RowGradient,
    store: Tensor,
    config: TileConfig,
    allow_tf32: bool,
) -> None:
    """One pass over the head that writes the gradient of `hidden @ weight.T`.

    Args:
        head: The head, or a window of it that starts at `vocab_start`.
        labels: [T] int64, contiguous, of the whole vocabulary.
        vocab_start: First vocabulary row of the window.
        gradient: The row factors, contiguous.
        store: [T, window], unit stride along V, written.
        config: The tile.
        allow_tf32: Whether float32 products may round their operands to tf32.
    """
    _launch(head, labels, vocab_start, gradient.lse, None, gradient, store, config, allow_tf32)


def _launch(
    head: Head,
    labels: Tensor,
    vocab_start: int,
    shift: Tensor,
    sums: RowSums | None,
    gradient: RowGradient | None,
    store: Tensor | None,
    config: TileConfig,
    allow_tf32: bool,
    skip: Tensor | None = None,
) -> None:
    num_tokens, hidden_size = head.hidden.shape
    vocab_size = head.weight.shape[0]
    upcast = interpreted()
    rank = 0 if head.low is None else head.low.shape[1]
    total, entropy_sum, smooth_sum, best, target_shifted = sums or (None,) * 5
    _, alpha, target, gamma, eta, entropy = gradient or (None,) * 6
    pointers = (
        head.low,
        head.low_weight,
        labels,
        head.bias,
        head.class_weight,
        shift,
        total,
        entropy_sum,
        smooth_sum,
        best,
        target_shifted,
        alpha,
        target,
        gamma,
        eta,
        entropy,
        skip,
        None if head.logit_scale == 1.0 else float(head.logit_scale),
        None if head.softcap is None else float(head.softcap),
        num_tokens,
        vocab_size,
        vocab_start,
        hidden_size,
        rank,
        0 if head.low is None else head.low.stride(0),
        0 if head.low_weight is None else head.low_weight.stride(0),
    )
    tiles = {
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_H": config.block_h,
        "BLOCK_R": low_rank_block(rank),
        "GROUP_T": config.group_t,
        "PRECISION": product_precision(allow_tf32),
        "UPCAST": upcast,
        "EXACT": head.hidden.dtype == torch.float32,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    matrices = (head.hidden, head.weight, head.low, head.low_weight, store)
    if config.pingpong and all(map(describable, matrices)):
        # Imported where it runs: the interpreter, and Triton's older versions, have no such Gluon.
        from hf_fused_head.kernels.pingpong import launch_pingpong

        launch_pingpong(matrices, pointers[2:-2], config)
        return
    num_tiles = cdiv(num_tokens, config.block_t) * cdiv(vocab_size, config.block_v)
    descriptors = bool(config.num_programs) and not config.pingpong
    if descriptors and all(map(describable, (head.hidden, head.weight, store))):
        store_block = [config.block_t, config.block_v // (2 if config.halves else 1)]
        _head_descriptor_kernel[(min(config.num_programs, num_tiles),)](
            TensorDescriptor.from_tensor(head.hidden, [config.block_t, config.block_h]),
            TensorDescriptor.from_tensor(head.weight, [config.block_v, config.block_h]),
            None if store is None else TensorDescriptor.from_tensor(store, store_block),
            *pointers,
            NUM_PROGRAMS=config.num_programs,
            HALVES=config.halves,
            FLATTEN=config.flatten,
            **tiles,
        )
        return
    _head_pointer_kernel[(num_tiles,)](
        head.hidden,
        head.weight,
        store,
        *pointers,
        head.hidden.stride(0),
        head.weight.stride(0),
        0 if store is None else store.stride(0),
        EVEN_H=hidden_size % config.block_h == 0,
        **tiles,
    )
