"""Rows whose exponents overflowed, computed again around their maximum."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_fused_head.kernels.arguments import (
    LogitOptions,
    MatrixPair,
    StoredTile,
    low_pair_of,
    options_of,
    pair_of,
    stored_tile,
)
from hf_fused_head.kernels.operands import Head, RowOutputs
from hf_fused_head.kernels.product import LOG2E, accumulate_product, logits_of
from hf_fused_head.kernels.statistics import NO_WEIGHTS, finish_rows
from hf_fused_head.kernels.tuning import (
    OVERFLOW_BLOCK,
    cdiv,
    interpreted,
    low_rank_block,
)
from hf_fused_head.objective import RowWeights


@triton.jit
def _overflow_tile(
    pair,
    low_pair,
    logit_options,
    offs_t,
    offs_v,
    num_tokens,
    vocab_size,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Logits of some rows and columns, [BLOCK, BLOCK], and the softcap's derivative there."""
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    acc = accumulate_product(
        acc,
        pair,
        offs_t,
        offs_v,
        num_tokens,
        vocab_size,
        BLOCK_H,
        False,
        UPCAST,
    )
    if low_pair is not None:
        acc = accumulate_product(
            acc,
            low_pair,
            offs_t,
            offs_v,
            num_tokens,
            vocab_size,
            BLOCK_R,
            False,
            UPCAST,
        )
    EXACT: tl.constexpr = MatrixPair(*pair).hidden.dtype.element_ty == tl.float32
    logits, slope = logits_of(acc, offs_v, vocab_size, logit_options, EXACT)
    if logit_options.row_scale is not None:
        row_scale = tl.load(logit_options.row_scale + offs_t, mask=offs_t < num_tokens, other=1.0)
        logits *= row_scale[:, None]
    return logits, slope


@triton.jit(do_not_specialize=["stored_vocab", "num_tokens", "vocab_size"])
def _overflow_kernel(
    pair,
    low_pair,
    logit_options,
    labels_ptr,
    target_logit_ptr,
    target_slope_ptr,
    class_total_ptr,
    weights,
    outputs,
    store,
    stored_vocab,
    num_tokens,
    vocab_size,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program i owns BLOCK rows and all of V; writes `RowOutputs` and stored exponents.

    Only overflowed rows are written; without one the program ends at once. A first sweep over V
    sums around a running maximum, a second one writes the exponents around that maximum.
    """
    logit_options = LogitOptions(*logit_options)
    weights, outputs = RowWeights(*weights), RowOutputs(*outputs)
    if store is not None:
        store = StoredTile(*store)
    offs_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    redo = tl.load(outputs.overflowed + offs_t, mask=offs_t < num_tokens, other=0) != 0
    if tl.max(redo.to(tl.int32), 0) == 0:
        return
    target_logit = tl.load(target_logit_ptr + offs_t, mask=redo, other=0.0)
    labels = tl.load(labels_ptr + offs_t, mask=redo, other=-1).to(tl.int32)
    row_max = target_logit
    sum_exp = tl.zeros((BLOCK,), dtype=tl.float32)
    entropy_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    square_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        logits, _ = _overflow_tile(
            pair,
            low_pair,
            logit_options,
            offs_t,
            offs_v,
            num_tokens,
            vocab_size,
            BLOCK,
            BLOCK_H,
            BLOCK_R,
            UPCAST,
        )
        other = (offs_v[None, :] != labels[:, None]) & (offs_v < vocab_size)[None, :]
        new_max = tl.maximum(row_max, tl.max(tl.where(other, logits, float("-inf")), 1))
        shifted = logits - new_max[:, None]
        exponents = tl.where(other, tl.exp2(shifted * LOG2E), 0.0)
        rescale = tl.exp2((row_max - new_max) * LOG2E)
        weighted = tl.where(exponents > 0, exponents * shifted, 0.0)
        entropy_sum = rescale * (entropy_sum + sum_exp * (row_max - new_max)) + tl.sum(weighted, 1)
        sum_exp = rescale * sum_exp + tl.sum(exponents, 1)
        square_sum = rescale * rescale * square_sum + tl.sum(exponents * exponents, 1)
        row_max = new_max
    if outputs.smooth is not None:
        exp_label = tl.exp2((target_logit - row_max) * LOG2E)
        nll = tl.log(sum_exp + exp_label) - (target_logit - row_max)
        smooth = tl.load(outputs.smooth + offs_t, mask=redo, other=0.0)
        smooth += tl.load(class_total_ptr) * nll / vocab_size
        tl.store(outputs.smooth + offs_t, smooth, mask=redo)
    if store is not None:
        for start in range(0, stored_vocab, BLOCK):
            offs_v = start + tl.arange(0, BLOCK)
            logits, slope = _overflow_tile(
                pair,
                low_pair,
                logit_options,
                offs_t,
                offs_v,
                num_tokens,
                vocab_size,
                BLOCK,
                BLOCK_H,
                BLOCK_R,
                UPCAST,
            )
            tile = tl.exp2((logits - row_max[:, None]) * LOG2E)
            if logit_options.softcap is not None:
                tile *= slope
            place = store.ptr + offs_t.to(tl.int64)[:, None] * store.stride_t + offs_v[None, :]
            # `finish_rows` stores the label's entry, from another thread: it is left out here.
            other = (offs_v[None, :] != labels[:, None]) & (offs_v < stored_vocab)[None, :]
            tl.store(place, tile.to(store.ptr.dtype.element_ty), mask=redo[:, None] & other)
    finish_rows(
        offs_t,
        redo,
        sum_exp,
        entropy_sum,
        square_sum,
        row_max,
        target_logit,
        target_slope_ptr,
        labels_ptr,
        logit_options.logit_scale,
        weights,
        outputs,
        store,
        stored_vocab,
    )


def launch_overflow(
    head: Head,
    labels: Tensor,
    target_logit: Tensor,
    target_slope: Tensor | None,
    class_total: Tensor | None,
    weights: RowWeights | None,
    outputs: RowOutputs,
    store: Tensor | None,
) -> None:
    """Completes the rows that `launch_finish` marked as overflowed; arguments as there.

    The marks are read on the device, and where there is none the kernel ends at once. With a head
    that is sharded along the vocabulary no row may be marked: this kernel sees one shard only.
    """
    num_tokens = labels.shape[0]
    _overflow_kernel[(cdiv(num_tokens, OVERFLOW_BLOCK),)](
        pair_of(head),
        low_pair_of(head),
        options_of(head),
        labels,
        target_logit,
        target_slope,
        class_total,
        tuple(weights or NO_WEIGHTS),
        tuple(outputs),
        stored_tile(store),
        stored_vocab=0 if store is None else store.shape[1],
        num_tokens=num_tokens,
        vocab_size=head.weight.shape[0],
        BLOCK=OVERFLOW_BLOCK,
        BLOCK_H=32,
        BLOCK_R=low_rank_block(0 if head.low is None else head.low.shape[1]),
        UPCAST=interpreted(),
        num_warps=4,
        num_stages=2,
    )
