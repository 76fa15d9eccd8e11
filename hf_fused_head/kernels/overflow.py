"""Rows whose exponents overflowed, made again around their maximum."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_fused_head.kernels.operands import Head, RowOutputs
from hf_fused_head.kernels.product import LOG2E, accumulate_product, logits_of
from hf_fused_head.kernels.statistics import finish_rows
from hf_fused_head.kernels.tuning import (
    OVERFLOW_BLOCK,
    cdiv,
    interpreted,
    low_rank_block,
    product_precision,
)
from hf_fused_head.objective import RowWeights


@triton.jit
def _overflow_tile(
    hidden_ptr,
    weight_ptr,
    low_ptr,
    low_weight_ptr,
    bias_ptr,
    logit_scale,
    softcap,
    stride_hidden_t,
    stride_weight_v,
    stride_low_t,
    stride_low_weight_v,
    offs_t,
    offs_v,
    num_tokens,
    vocab_size,
    hidden_size,
    rank,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
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
        False,
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
    return logits_of(acc, offs_v, vocab_size, bias_ptr, logit_scale, softcap)


@triton.jit(do_not_specialize=["num_tokens", "vocab_size", "stored_vocab"])
def _overflow_kernel(
    hidden_ptr,
    weight_ptr,
    low_ptr,
    low_weight_ptr,
    bias_ptr,
    labels_ptr,
    anchor_ptr,
    label_slope_ptr,
    overflowed_ptr,
    class_total_ptr,
    nll_weight_ptr,
    smooth_weight_ptr,
    z_weight_ptr,
    nll_ptr,
    lse_ptr,
    smooth_ptr,
    entropy_ptr,
    factor_ptr,
    correction_ptr,
    store_ptr,
    stride_store_t,
    stored_vocab,
    logit_scale,
    softcap,
    num_tokens,
    vocab_size,
    hidden_size,
    rank,
    stride_hidden_t,
    stride_weight_v,
    stride_low_t,
    stride_low_weight_v,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program i owns BLOCK rows and all of V; without an overflowed row it ends at once.

    A running maximum makes the sums, a second sweep writes the exponents around it.
    """
    offs_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    redo = tl.load(overflowed_ptr + offs_t, mask=offs_t < num_tokens, other=0) != 0
    if tl.max(redo.to(tl.int32), 0) == 0:
        return
    label_logit = tl.load(anchor_ptr + offs_t, mask=redo, other=0.0)
    labels = tl.load(labels_ptr + offs_t, mask=redo, other=-1).to(tl.int32)
    peak = label_logit
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    entropy_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        logits, _ = _overflow_tile(
            hidden_ptr,
            weight_ptr,
            low_ptr,
            low_weight_ptr,
            bias_ptr,
            logit_scale,
            softcap,
            stride_hidden_t,
            stride_weight_v,
            stride_low_t,
            stride_low_weight_v,
            offs_t,
            offs_v,
            num_tokens,
            vocab_size,
            hidden_size,
            rank,
            BLOCK,
            BLOCK_H,
            BLOCK_R,
            PRECISION,
            UPCAST,
        )
        other = (offs_v[None, :] != labels[:, None]) & (offs_v < vocab_size)[None, :]
        new_peak = tl.maximum(peak, tl.max(tl.where(other, logits, float("-inf")), 1))
        shifted = logits - new_peak[:, None]
        exponents = tl.where(other, tl.exp2(shifted * LOG2E), 0.0)
        decay = tl.exp2((peak - new_peak) * LOG2E)
        weighted = tl.where(exponents > 0, exponents * shifted, 0.0)
        entropy_sum = decay * (entropy_sum + total * (peak - new_peak)) + tl.sum(weighted, 1)
        total = decay * total + tl.sum(exponents, 1)
        peak = new_peak
    if smooth_ptr is not None:
        exp_label = tl.exp2((label_logit - peak) * LOG2E)
        nll = tl.log(total + exp_label) - (label_logit - peak)
        smooth = tl.load(smooth_ptr + offs_t, mask=redo, other=0.0)
        smooth += tl.load(class_total_ptr) * nll / vocab_size
        tl.store(smooth_ptr + offs_t, smooth, mask=redo)
    if store_ptr is not None:
        for start in range(0, stored_vocab, BLOCK):
            offs_v = start + tl.arange(0, BLOCK)
            logits, slope = _overflow_tile(
                hidden_ptr,
                weight_ptr,
                low_ptr,
                low_weight_ptr,
                bias_ptr,
                logit_scale,
                softcap,
                stride_hidden_t,
                stride_weight_v,
                stride_low_t,
                stride_low_weight_v,
                offs_t,
                offs_v,
                num_tokens,
                vocab_size,
                hidden_size,
                rank,
                BLOCK,
                BLOCK_H,
                BLOCK_R,
                PRECISION,
                UPCAST,
            )
            tile = tl.exp2((logits - peak[:, None]) * LOG2E)
            if softcap is not None:
                tile *= slope
            place = store_ptr + offs_t.to(tl.int64)[:, None] * stride_store_t + offs_v[None, :]
            # The label's entry is another thread's store, below: this sweep leaves it out.
            other = (offs_v[None, :] != labels[:, None]) & (offs_v < stored_vocab)[None, :]
            tl.store(place, tile.to(store_ptr.dtype.element_ty), mask=redo[:, None] & other)
    finish_rows(
        offs_t,
        redo,
        total,
        entropy_sum,
        peak,
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
    )


def launch_overflow(
    head: Head,
    labels: Tensor,
    anchor: Tensor,
    slope: Tensor | None,
    class_total: Tensor | None,
    weights: RowWeights | None,
    outputs: RowOutputs,
    store: Tensor | None,
    allow_tf32: bool,
) -> None:
    """Completes what `launch_finish` could not; arguments as there.

    It looks at `outputs.overflowed` on the device, and ends at once where no row needs it.
    """
    num_tokens = labels.shape[0]
    nll_weight, smooth_weight, z_weight = weights or (None, None, None)
    stride_store = 0 if store is None else store.stride(0)
    stored_vocab = 0 if store is None else store.shape[1]
    softcap = None if head.softcap is None else float(head.softcap)
    hidden_size = head.hidden.shape[1]
    rank = 0 if head.low is None else head.low.shape[1]
    _overflow_kernel[(cdiv(num_tokens, OVERFLOW_BLOCK),)](
        head.hidden,
        head.weight,
        head.low,
        head.low_weight,
        head.bias,
        labels,
        anchor,
        slope,
        outputs.overflowed,
        class_total,
        nll_weight,
        smooth_weight,
        z_weight,
        outputs.nll,
        outputs.lse,
        outputs.smooth,
        outputs.entropy,
        outputs.factor,
        outputs.correction,
        store,
        stride_store,
        stored_vocab,
        float(head.logit_scale),
        softcap,
        num_tokens,
        head.weight.shape[0],
        hidden_size,
        rank,
        head.hidden.stride(0),
        head.weight.stride(0),
        0 if head.low is None else head.low.stride(0),
        0 if head.low_weight is None else head.low_weight.stride(0),
        BLOCK=OVERFLOW_BLOCK,
        BLOCK_H=32,
        BLOCK_R=low_rank_block(rank),
        PRECISION=product_precision(allow_tf32),
        UPCAST=interpreted(),
        num_warps=4,
        num_stages=2,
    )
