"""Kernels over rows: which labels count, the label's logit, scaling by a factor a row or by one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fused_head.kernels.arguments import (
    LogitOptions,
    MatrixPair,
    low_pair_of,
    options_of,
    pair_of,
)
from hf_fused_head.kernels.operands import Head
from hf_fused_head.kernels.product import tanh_and_slope
from hf_fused_head.kernels.tuning import cdiv, low_rank_block, power_of_2

# Rows whose label does not count are computed like the others while they are fewer than one in so
# many: to leave them out costs a copy of the hidden states and a wait of the host for their number.
_FEW = tl.constexpr(32)


@triton.jit(do_not_specialize=["num_tokens", "ignore_index", "vocab_size"])
def _count_kernel(
    labels_ptr,
    plain_ptr,
    rows_ptr,
    counts_ptr,
    num_tokens,
    ignore_index,
    vocab_size,
    BLOCK_T: tl.constexpr,
):
    """One program owns all rows; writes what `launch_count` returns."""
    counted = 0
    wrong = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for start in range(0, num_tokens, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < num_tokens
        labels = tl.load(labels_ptr + offs_t, mask=mask_t, other=0)
        inside = (labels >= 0) & (labels < vocab_size)
        kept = mask_t & (labels != ignore_index)
        counts = (kept & inside).to(tl.int32)
        place = counted + tl.cumsum(counts, 0) - 1
        tl.store(rows_ptr + place, offs_t.to(tl.int64), mask=counts != 0)
        counted += tl.sum(counts, 0)
        wrong += (kept & (inside == 0)).to(tl.int32)
        plain = tl.where(kept, tl.where(inside, labels, -2), -1)
        tl.store(plain_ptr + offs_t, plain, mask=mask_t)
    tl.store(counts_ptr, tl.sum(wrong, 0))
    tl.store(counts_ptr + 1, (num_tokens - counted > num_tokens // _FEW).to(tl.int32))
    tl.store(counts_ptr + 2, counted)


@triton.jit
def _dot(pair, row, label, BLOCK_H: tl.constexpr):
    """Dot product of a row of each matrix of a pair, float32."""
    pair = MatrixPair(*pair)
    hidden_ptr = pair.hidden + row * pair.stride_hidden_t
    weight_ptr = pair.weight + label * pair.stride_weight_v
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for start in range(0, pair.size, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)
        mask = offs_h < pair.size
        hidden = tl.load(hidden_ptr + offs_h, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offs_h, mask=mask, other=0.0).to(tl.float32)
        total += hidden * weight
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["local_vocab_size"])
def _anchor_kernel(
    pair,
    low_pair,
    logit_options,
    labels_ptr,
    anchor_ptr,
    slope_ptr,
    skip_ptr,
    local_vocab_size,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program t owns row t: writes the logit of its label, a dot product of H terms.

    Infinity where no label counts: every exponent of such a row is then exp(-inf), zero. Zero where
    the label is another rank's, which adds its logit. With `slope_ptr` it also writes the softcap's
    derivative there, for a label of this rank.
    """
    # Nested, since an absent pointer cannot be loaded from, also not behind `and`.
    if skip_ptr is not None:  # noqa: SIM102
        if tl.load(skip_ptr) != 0:
            return
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    if label < 0:
        tl.store(anchor_ptr + row, float("inf"))
        return
    if label >= local_vocab_size:
        tl.store(anchor_ptr + row, 0.0)
        return
    logit_options = LogitOptions(*logit_options)
    logit = _dot(pair, row, label, BLOCK_H)
    if low_pair is not None:
        logit += _dot(low_pair, row, label, BLOCK_R)
    if logit_options.bias is not None:
        logit += tl.load(logit_options.bias + label).to(tl.float32)
    if logit_options.logit_scale is not None:
        logit *= logit_options.logit_scale
    if logit_options.softcap is not None:
        EXACT: tl.constexpr = MatrixPair(*pair).hidden.dtype.element_ty == tl.float32
        tangent, slope = tanh_and_slope(logit / logit_options.softcap, EXACT)
        logit = logit_options.softcap * tangent
        if slope_ptr is not None:
            tl.store(slope_ptr + row, slope)
    if logit_options.row_scale is not None:
        logit *= tl.load(logit_options.row_scale + row)
    tl.store(anchor_ptr + row, logit)


@triton.jit
def _scale_rows_kernel(
    source_ptr,
    out_ptr,
    factor_ptr,
    gamma_ptr,
    direction_ptr,
    size,
    stride_source_t,
    stride_out_t,
    BLOCK_H: tl.constexpr,
):
    """Program (t, i) owns block i of row t; writes `source * factor - gamma * direction`."""
    row = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = offs_h < size
    values = tl.load(source_ptr + row * stride_source_t + offs_h, mask=mask, other=0.0)
    values = values.to(tl.float32) * tl.load(factor_ptr + row)
    if gamma_ptr is not None:
        direction = tl.load(direction_ptr + offs_h, mask=mask, other=0.0)
        values -= tl.load(gamma_ptr + row) * direction
    tl.store(out_ptr + row * stride_out_t + offs_h, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _multiply_kernel(values_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """Program i owns blocks i, i + programs, ...: multiplied in place, unless the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < size
        values = tl.load(values_ptr + offs, mask=mask, other=0.0).to(tl.float32) * factor
        tl.store(values_ptr + offs, values.to(values_ptr.dtype.element_ty), mask=mask)


def launch_count(
    labels: Tensor, ignore_index: int, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which labels count, found on the device: the host does not wait.

    Args:
        labels: [T] int64, contiguous.
        ignore_index: The label of rows that do not count.
        vocab_size: Labels that count lie in `[0, vocab_size)`.

    Returns:
        plain: [T] int64: the label where it counts, -1 where it does not, -2 where it is out of
            range, so that no kernel reads out of bounds.
        rows: [T] int64: the rows that count, in order; the rest is not written.
        counts: [3] int32: labels out of range; 1 if so many rows do not count that they should be
            left out before any product, else 0; rows that count.
    """
    plain, rows = torch.empty_like(labels), torch.empty_like(labels)
    counts = torch.empty((3,), dtype=torch.int32, device=labels.device)
    num_tokens = labels.shape[0]
    block = min(8192, max(64, power_of_2(num_tokens)))
    _count_kernel[(1,)](
        *(labels, plain, rows, counts, num_tokens, ignore_index, vocab_size),
        BLOCK_T=block,
        num_warps=16,
    )
    return plain, rows, counts


def launch_anchor(
    head: Head,
    labels: Tensor,
    anchor: Tensor,
    slope: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """Writes the logit of every row's label, infinity for a row without one, 0 for another rank's.

    Args:
        head: See `Head`.
        labels: [T] int64, contiguous, in [0, V), beyond for another rank's, negative where none
            counts.
        anchor: [T] float32, contiguous, written.
        slope: [T] float32, contiguous: the softcap's derivative at that logit, written for labels
            in [0, V); None without a softcap, or where it is not needed.
        skip: One int32 on the device; where it is not 0 nothing is done and nothing written.
    """
    hidden_size = head.hidden.shape[1]
    _anchor_kernel[(labels.shape[0],)](
        pair_of(head),
        low_pair_of(head),
        options_of(head),
        labels,
        anchor,
        slope,
        skip,
        local_vocab_size=head.weight.shape[0],
        BLOCK_H=min(1024, power_of_2(hidden_size)),
        BLOCK_R=low_rank_block(0 if head.low is None else head.low.shape[1]),
        num_warps=4,
    )


def launch_scale_rows(
    source: Tensor,
    out: Tensor,
    factor: Tensor,
    gamma: Tensor | None = None,
    direction: Tensor | None = None,
) -> None:
    """Writes `factor[:, None] * source - gamma[:, None] * direction`, computed in float32.

    Args:
        source: [T, H], unit stride along H.
        out: [T, H], unit stride along H, any float dtype, written; may be `source`.
        factor: [T] float32, contiguous.
        gamma: [T] float32, contiguous, or None.
        direction: [H] float32, contiguous, or None; needed with `gamma`.
    """
    num_tokens, size = source.shape
    block = min(2048, power_of_2(size))
    _scale_rows_kernel[(num_tokens, cdiv(size, block))](
        source,
        out,
        factor,
        gamma,
        direction,
        size,
        source.stride(0),
        out.stride(0),
        BLOCK_H=block,
        num_warps=4,
    )


def launch_multiply(values: Tensor, factor: Tensor) -> None:
    """`values *= factor`; the device tests the factor, and one of 1 costs no pass over the values.

    Args:
        values: Contiguous, any float dtype; written.
        factor: One element, any float dtype, on the same device.
    """
    size, block = values.numel(), 4096
    num_programs = min(cdiv(size, block), 2048)
    _multiply_kernel[(num_programs,)](values, factor, size, BLOCK=block, num_warps=8)
