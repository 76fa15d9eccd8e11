"""The statistics of a row, from the sums of its tiles."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from hf_fused_head.kernels.arguments import StoredTile, stored_tile
from hf_fused_head.kernels.epilogue import LOWEST, exponential
from hf_fused_head.kernels.operands import Head, RowOutputs, RowSums
from hf_fused_head.kernels.product import LOG2E
from hf_fused_head.kernels.tuning import cdiv
from hf_fused_head.objective import RowWeights

# Above this sum of exp(z - z_y), 44 nats of loss, a row is computed again around its maximum, so
# that exponents and their products with weights stay far inside the range of bfloat16 and float32.
OVERFLOW = 2.0**64
_OVERFLOW = tl.constexpr(OVERFLOW)
# Squares are added in units of exp of twice this: those of a row's largest terms, up to 44 nats
# above the anchor, stay in float32's range; what leaves it below is nothing beside the label's.
_SQUARES_LEVEL = tl.constexpr(22.0)
_SQUARES_SCALE = tl.constexpr(math.exp(2 * 22.0))
NO_WEIGHTS = RowWeights(None, None, None)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, to float32's digits: six terms of the series below 1/32."""
    tail = 0.2 - x * (1.0 / 6.0)
    series = x * (1.0 - x * (0.5 - x * (1.0 / 3.0 - x * (0.25 - x * tail))))
    return tl.where(x < 0.03125, series, tl.log(1.0 + x))


@triton.jit
def finish_rows(
    offs_t,
    mask_t,
    sum_exp,
    entropy_sum,
    square_sum,
    anchor,
    target_logit,
    target_slope_ptr,
    labels_ptr,
    logit_scale,
    weights,
    outputs,
    store,
    stored_vocab,
):
    """Writes what follows from a row's sums: statistics, gradient factor, stored label entry.

    With e_j = exp(z_j - anchor), S their sum over j != y and e_y the label's own: p_j = e_j / (S +
    e_y). The gradient of the logits is `factor * stored`, where stored is e_j off the label. All of
    it is zero where no label counts; the loss of a label out of range is NaN.
    """
    label = tl.load(labels_ptr + offs_t, mask=mask_t, other=-1)
    counts = label >= 0
    absent = tl.where(label == -2, float("nan"), 0.0)
    offset = tl.where(counts, target_logit - anchor, 0.0)
    exp_label = tl.exp2(offset * LOG2E)
    # The entropy is the small difference of two of these: float64 is spent on rows only.
    wide_sum_exp = sum_exp.to(tl.float64)
    wide = wide_sum_exp + exp_label
    # Around its own label a row keeps the digits of a tiny loss; around its maximum it is large.
    wide_nll = tl.where(offset == 0.0, _log1p(wide_sum_exp), tl.log(wide) - offset)
    nll = tl.where(counts, wide_nll, absent).to(tl.float32)
    wide_lse = target_logit + wide_nll
    lse = tl.where(counts, wide_lse, absent).to(tl.float32)
    tl.store(outputs.nll + offs_t, nll, mask=mask_t)
    tl.store(outputs.lse + offs_t, lse, mask=mask_t)
    if outputs.correction is not None:
        correction = tl.where(counts, tl.exp(lse - wide_lse), 0.0)
        tl.store(outputs.correction + offs_t, correction.to(tl.float32), mask=mask_t)
    if outputs.entropy is not None:
        mean = (entropy_sum + exp_label * offset) / wide
        entropy = tl.where(counts, tl.maximum(wide_nll + offset - mean, 0.0), 0.0)
        tl.store(outputs.entropy + offs_t, entropy.to(tl.float32), mask=mask_t)
    if outputs.log_sum_sq is not None:
        squares = square_sum.to(tl.float64) + exp_label.to(tl.float64) * exp_label
        log_sum_sq = tl.where(counts, tl.log(squares) - 2.0 * tl.log(wide), 0.0)
        tl.store(outputs.log_sum_sq + offs_t, log_sum_sq.to(tl.float32), mask=mask_t)
    if outputs.factor is not None:
        beta = tl.load(weights.nll + offs_t, mask=mask_t, other=0.0)
        alpha = beta
        if weights.smooth is not None:
            # No class weights: with them, smoothing is computed in windows.
            alpha += tl.load(weights.smooth + offs_t, mask=mask_t, other=0.0)
        if weights.z is not None:
            alpha += 2.0 * tl.load(weights.z + offs_t, mask=mask_t, other=0.0) * lse
        # A row whose softmax terms cancel exactly would divide its label entry by zero.
        smallest = 1e-6 * tl.abs(beta)
        alpha = tl.where(tl.abs(alpha) < smallest, smallest, alpha)
        scaled = alpha
        if logit_scale is not None:
            scaled *= logit_scale
        factor = tl.where(counts, scaled / wide.to(tl.float32), 0.0)
        tl.store(outputs.factor + offs_t, factor, mask=mask_t)
        entry = (alpha - beta) * exp_label - beta * sum_exp.to(tl.float32)
        entry = tl.where(alpha == 0.0, 0.0, entry / alpha)
        if target_slope_ptr is not None:
            entry *= tl.load(target_slope_ptr + offs_t, mask=mask_t & counts, other=0.0)
        place = store.ptr + offs_t.to(tl.int64) * store.stride_t + label
        entry = entry.to(store.ptr.dtype.element_ty)
        tl.store(place, entry, mask=mask_t & counts & (label < stored_vocab))


@triton.jit(
    do_not_specialize=["stored_vocab", "num_tokens", "vocab_size", "num_tiles_v", "tile_columns"]
)
def _finish_kernel(
    sums,
    anchor_ptr,
    target_logit_ptr,
    target_slope_ptr,
    labels_ptr,
    class_total_ptr,
    logit_scale,
    weights,
    outputs,
    store,
    stored_vocab,
    num_tokens,
    vocab_size,
    num_tiles_v,
    tile_columns,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program i owns rows [i * BLOCK_T, ...): adds up their tiles' sums and writes `RowOutputs`.

    It also writes the label's entry into the stored exponents.
    """
    sums, weights, outputs = RowSums(*sums), RowWeights(*weights), RowOutputs(*outputs)
    if store is not None:
        store = StoredTile(*store)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    # Sums over hundreds of tiles: in float64 they keep the digits of the tiles' sums.
    sum_exp = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float64)
    entropy_sum = sum_exp
    smooth_sum = sum_exp
    square_sum = tl.zeros((BLOCK_T,), dtype=tl.float64)
    larger = tl.zeros((BLOCK_T,), dtype=tl.int32)
    labels = tl.load(labels_ptr + offs_t, mask=mask_t, other=-1)
    counts = labels >= 0
    if outputs.correct is not None:
        target = tl.load(sums.target + offs_t, mask=mask_t & counts, other=float("inf"))
    for start in range(0, num_tiles_v, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        place = offs_n.to(tl.int64)[:, None] * num_tokens + offs_t[None, :]
        mask = (offs_n < num_tiles_v)[:, None] & mask_t[None, :]
        tile_sum_exp = tl.load(sums.sum_exp + place, mask=mask, other=0.0)
        sum_exp += tile_sum_exp
        if sums.smooth is not None:
            smooth_sum += tl.load(sums.smooth + place, mask=mask, other=0.0)
        if sums.row_max is not None:
            tile_max = tl.load(sums.row_max + place, mask=mask, other=float("-inf"))
            if outputs.correct is not None:
                # Of equal logits the first is the largest, so earlier tiles win a tie.
                earlier = ((offs_n + 1) * tile_columns)[:, None] <= labels[None, :]
                tied = earlier & (tile_max == target[None, :])
                larger |= tl.max((tied | (tile_max > target[None, :])).to(tl.int32), 0)
            if sums.entropy is not None:
                level = tl.maximum(tile_max, LOWEST).to(tl.float64)
                tile_entropy = tl.load(sums.entropy + place, mask=mask, other=0.0)
                entropy_sum += level * tile_sum_exp + tile_entropy
            if sums.squares is not None:
                tile_squares = tl.load(sums.squares + place, mask=mask, other=0.0)
                level = exponential(2.0 * (tile_max - _SQUARES_LEVEL), True)
                square_sum += tl.sum((level * tile_squares).to(tl.float64), 0)
    anchor = tl.load(anchor_ptr + offs_t, mask=mask_t, other=0.0)
    target_logit = tl.load(target_logit_ptr + offs_t, mask=mask_t, other=0.0)
    row_sum_exp = tl.sum(sum_exp, 0)
    finish_rows(
        offs_t,
        mask_t,
        row_sum_exp,
        tl.sum(entropy_sum, 0),
        square_sum * _SQUARES_SCALE,
        anchor,
        target_logit,
        target_slope_ptr,
        labels_ptr,
        logit_scale,
        weights,
        outputs,
        store,
        stored_vocab,
    )
    overflowed = row_sum_exp > _OVERFLOW
    tl.store(outputs.overflowed + offs_t, overflowed.to(tl.int32), mask=mask_t)
    if outputs.smooth is not None:
        # For an overflowed row this term is added by the kernel that computes its loss.
        offset = tl.where(counts, target_logit - anchor, 0.0)
        exp_label = tl.exp2(offset * LOG2E)
        above = tl.where(offset == 0.0, _log1p(row_sum_exp), tl.log(row_sum_exp + exp_label))
        above = tl.where(overflowed, 0.0, above)
        smooth = (tl.load(class_total_ptr) * above - tl.sum(smooth_sum, 0)) / vocab_size
        smooth = tl.where(counts, smooth, 0.0).to(tl.float32)
        tl.store(outputs.smooth + offs_t, smooth, mask=mask_t)
    if outputs.correct is not None:
        correct = counts & (larger == 0)
        tl.store(outputs.correct + offs_t, correct, mask=mask_t)


def launch_finish(
    head: Head,
    labels: Tensor,
    anchor: Tensor,
    target_logit: Tensor,
    target_slope: Tensor | None,
    sums: RowSums,
    vocab_size: int,
    class_total: Tensor | None,
    weights: RowWeights | None,
    outputs: RowOutputs,
    store: Tensor | None,
    tile_columns: int,
) -> None:
    """Completes rows from the sums of their tiles; marks those that it cannot as overflowed.

    Args:
        head: All rows and columns that are on this rank.
        labels: [T] int64, contiguous, negative where none counts.
        anchor: [T] float32, contiguous, what the sums were made around: the label's logit, or a
            larger one.
        target_logit: [T] float32, contiguous, the label's logit.
        target_slope: [T] float32, contiguous, the softcap's derivative there; None without a
            softcap or a store.
        sums: Row sums of every vocabulary tile, of all ranks.
        vocab_size: Rows of the head on all ranks.
        class_total: [1] float32, sum of the class weights, or V; needed with smoothing only.
        weights: The objective, contiguous; None when no gradient is made.
        outputs: Contiguous, written; nothing in it has to be zeroed.
        store: [T, kept columns], unit stride along V: the exponents of `launch_exponents`, whose
            label entries are written here; None when no gradient is made.
        tile_columns: Columns of a tile of `sums`.
    """
    num_tokens = labels.shape[0]
    _finish_kernel[(cdiv(num_tokens, 32),)](
        tuple(sums),
        anchor,
        target_logit,
        target_slope,
        labels,
        class_total,
        None if head.logit_scale == 1.0 else float(head.logit_scale),
        tuple(weights or NO_WEIGHTS),
        tuple(outputs),
        stored_tile(store),
        stored_vocab=0 if store is None else store.shape[1],
        num_tokens=num_tokens,
        vocab_size=vocab_size,
        num_tiles_v=sums.sum_exp.shape[0],
        tile_columns=tile_columns,
        BLOCK_T=32,
        # Loads in flight hide their latency: 32 tiles and four warps took twice as long (one H200).
        # With squares, half as many: no register is spilled on any card.
        BLOCK_N=128 if sums.squares is None else 64,
        num_warps=8,
    )
