"""From the sums of its tiles to the statistics of a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_fused_head.kernels.epilogue import LOWEST
from hf_fused_head.kernels.operands import Head, RowOutputs, RowSums
from hf_fused_head.kernels.product import LOG2E
from hf_fused_head.kernels.tuning import cdiv
from hf_fused_head.objective import RowWeights

# Above this sum of exp(z - z_y), 44 nats of loss, a row is made again around its maximum: exponents
# and their products with weights stay far inside bfloat16's and float32's range.
OVERFLOW = 2.0**64
_OVERFLOW = tl.constexpr(OVERFLOW)


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
    total,
    entropy_sum,
    anchor,
    label_logit,
    label_slope_ptr,
    logit_scale,
    nll_weight_ptr,
    smooth_weight_ptr,
    z_weight_ptr,
    nll_ptr,
    lse_ptr,
    entropy_ptr,
    factor_ptr,
    correction_ptr,
    labels_ptr,
    store_ptr,
    stride_store_t,
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
    offset = tl.where(counts, label_logit - anchor, 0.0)
    exp_label = tl.exp2(offset * LOG2E)
    # The entropy is the small difference of two of these: float64 is spent on rows only.
    wide_total = total.to(tl.float64)
    wide = wide_total + exp_label
    # Around its own label a row keeps the digits of a tiny loss; around its maximum it is large.
    wide_nll = tl.where(offset == 0.0, _log1p(wide_total), tl.log(wide) - offset)
    nll = tl.where(counts, wide_nll, absent).to(tl.float32)
    wide_lse = label_logit + wide_nll
    lse = tl.where(counts, wide_lse, absent).to(tl.float32)
    tl.store(nll_ptr + offs_t, nll, mask=mask_t)
    tl.store(lse_ptr + offs_t, lse, mask=mask_t)
    if correction_ptr is not None:
        correction = tl.where(counts, tl.exp(lse - wide_lse), 0.0)
        tl.store(correction_ptr + offs_t, correction.to(tl.float32), mask=mask_t)
    if entropy_ptr is not None:
        mean = (entropy_sum + exp_label * offset) / wide
        entropy = tl.where(counts, tl.maximum(wide_nll + offset - mean, 0.0), 0.0)
        tl.store(entropy_ptr + offs_t, entropy.to(tl.float32), mask=mask_t)
    if factor_ptr is not None:
        beta = tl.load(nll_weight_ptr + offs_t, mask=mask_t, other=0.0)
        alpha = beta
        if smooth_weight_ptr is not None:
            # No class weights: with those, smoothing takes windows.
            alpha += tl.load(smooth_weight_ptr + offs_t, mask=mask_t, other=0.0)
        if z_weight_ptr is not None:
            alpha += 2.0 * tl.load(z_weight_ptr + offs_t, mask=mask_t, other=0.0) * lse
        # A row whose softmax terms cancel exactly would divide its label entry by zero.
        smallest = 1e-6 * tl.abs(beta)
        alpha = tl.where(tl.abs(alpha) < smallest, smallest, alpha)
        factor = tl.where(counts, alpha * logit_scale / wide.to(tl.float32), 0.0)
        tl.store(factor_ptr + offs_t, factor, mask=mask_t)
        entry = (alpha - beta) * exp_label - beta * total.to(tl.float32)
        entry = tl.where(alpha == 0.0, 0.0, entry / alpha)
        if label_slope_ptr is not None:
            entry *= tl.load(label_slope_ptr + offs_t, mask=mask_t & counts, other=0.0)
        place = store_ptr + offs_t.to(tl.int64) * stride_store_t + label
        entry = entry.to(store_ptr.dtype.element_ty)
        tl.store(place, entry, mask=mask_t & counts & (label < stored_vocab))


@triton.jit(do_not_specialize=["num_tokens", "vocab_size", "num_tiles_v", "stored_vocab"])
def _finish_kernel(
    total_ptr,
    entropy_sum_ptr,
    smooth_sum_ptr,
    best_ptr,
    target_shifted_ptr,
    shift_ptr,
    anchor_ptr,
    label_slope_ptr,
    class_total_ptr,
    nll_weight_ptr,
    smooth_weight_ptr,
    z_weight_ptr,
    labels_ptr,
    nll_ptr,
    lse_ptr,
    smooth_ptr,
    entropy_ptr,
    correct_ptr,
    factor_ptr,
    correction_ptr,
    overflowed_ptr,
    store_ptr,
    stride_store_t,
    stored_vocab,
    logit_scale,
    num_tokens,
    vocab_size,
    num_tiles_v,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program i owns rows [i * BLOCK_T, ...): adds the tiles' sums up and writes `RowOutputs`.

    It also writes the label's entry into the stored exponents.
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    # Sums over hundreds of tiles: in float64 they lose nothing of what the tiles know.
    total = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float64)
    entropy_sum = total
    smooth_sum = total
    best = tl.full((BLOCK_N, BLOCK_T), float("-inf"), dtype=tl.float32)
    for start in range(0, num_tiles_v, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        place = offs_n.to(tl.int64)[:, None] * num_tokens + offs_t[None, :]
        mask = (offs_n < num_tiles_v)[:, None] & mask_t[None, :]
        tile_total = tl.load(total_ptr + place, mask=mask, other=0.0)
        total += tile_total
        if smooth_sum_ptr is not None:
            smooth_sum += tl.load(smooth_sum_ptr + place, mask=mask, other=0.0)
        if best_ptr is not None:
            tile_best = tl.load(best_ptr + place, mask=mask, other=float("-inf"))
            best = tl.maximum(best, tile_best)
            if entropy_sum_ptr is not None:
                level = tl.maximum(tile_best, LOWEST).to(tl.float64)
                tile_entropy = tl.load(entropy_sum_ptr + place, mask=mask, other=0.0)
                entropy_sum += level * tile_total + tile_entropy
    shift = tl.load(shift_ptr + offs_t, mask=mask_t, other=0.0)
    anchor = tl.load(anchor_ptr + offs_t, mask=mask_t, other=0.0)
    counts = tl.load(labels_ptr + offs_t, mask=mask_t, other=-1) >= 0
    sums = tl.sum(total, 0)
    finish_rows(
        offs_t,
        mask_t,
        sums,
        tl.sum(entropy_sum, 0),
        shift,
        anchor,
        label_slope_ptr,
        logit_scale,
        nll_weight_ptr,
        smooth_weight_ptr,
        z_weight_ptr,
        nll_ptr,
        lse_ptr,
        entropy_ptr,
        factor_ptr,
        correction_ptr,
        labels_ptr,
        store_ptr,
        stride_store_t,
        stored_vocab,
    )
    overflowed = sums > _OVERFLOW
    tl.store(overflowed_ptr + offs_t, overflowed.to(tl.int32), mask=mask_t)
    if smooth_ptr is not None:
        # The part of an overflowed row's loss is added by the kernel that makes its loss.
        offset = tl.where(counts, anchor - shift, 0.0)
        above = tl.where(offset == 0.0, _log1p(sums), tl.log(sums + tl.exp2(offset * LOG2E)))
        above = tl.where(overflowed, 0.0, above)
        smooth = (tl.load(class_total_ptr) * above - tl.sum(smooth_sum, 0)) / vocab_size
        tl.store(smooth_ptr + offs_t, tl.where(counts, smooth, 0.0).to(tl.float32), mask=mask_t)
    if correct_ptr is not None:
        target = tl.load(target_shifted_ptr + offs_t, mask=mask_t & counts, other=float("-inf"))
        correct = counts & (tl.max(best, 0) <= target)
        tl.store(correct_ptr + offs_t, correct, mask=mask_t)


def launch_finish(
    head: Head,
    labels: Tensor,
    shift: Tensor,
    anchor: Tensor,
    slope: Tensor | None,
    sums: RowSums,
    vocab_size: int,
    class_total: Tensor | None,
    weights: RowWeights | None,
    outputs: RowOutputs,
    store: Tensor | None,
) -> None:
    """Completes rows from the sums of their tiles; `outputs.overflowed` says which it could not.

    Args:
        head: All rows that are here.
        labels: [T] int64, negative where none counts.
        shift: [T] float32, what the sums were made around: the anchor, or a larger logit.
        anchor: [T] float32, the logit of the label.
        slope: [T] float32, the softcap's derivative there; None without a softcap or a store.
        sums: Row sums of every vocabulary tile, of all ranks.
        vocab_size: Rows of the head on all ranks.
        class_total: [1] float32, sum of the class weights, or V; needed with smoothing only.
        weights: The objective; None when no gradient is made.
        outputs: Written; nothing in it needs to be zeroed.
        store: [T, kept columns], unit stride along V: the exponents of `launch_exponents`, whose
            label entries are written here; None when no gradient is made.
    """
    num_tokens = labels.shape[0]
    nll_weight, smooth_weight, z_weight = weights or (None, None, None)
    stride_store = 0 if store is None else store.stride(0)
    stored_vocab = 0 if store is None else store.shape[1]
    _finish_kernel[(cdiv(num_tokens, 32),)](
        *sums,
        shift,
        anchor,
        slope,
        class_total,
        nll_weight,
        smooth_weight,
        z_weight,
        labels,
        *outputs,
        store,
        stride_store,
        stored_vocab,
        float(head.logit_scale),
        num_tokens,
        vocab_size,
        sums.total.shape[0],
        BLOCK_T=32,
        # Loads in flight hide their latency: 32 tiles and four warps took twice as long (one H200).
        BLOCK_N=128,
        num_warps=8,
    )
