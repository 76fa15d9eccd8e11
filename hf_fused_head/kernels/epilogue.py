"""What happens to a tile of logits in registers: row sums and exponents, or its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fused_head.kernels.operands import RowSums
from hf_fused_head.kernels.product import LOG2E, logits_of

# exp of this is zero in float32: lower values count as this where a logarithm has to be finite.
LOWEST = tl.constexpr(-200.0)
# log(2) in two parts, the first of so few bits that small multiples of it are exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """exp(x); if `EXACT`, to float32's digits also where `x * log2(e)` is rounded to fewer."""
    if EXACT:
        # No maximum, which would hide a NaN.
        x = tl.where(x < LOWEST, LOWEST, x)
        octaves = tl.floor(x * LOG2E + 0.5)
        rest = x - octaves * _LN2_HIGH - octaves * _LN2_LOW
        return tl.exp2(octaves) * tl.exp2(rest * LOG2E)
    return tl.exp2(x * LOG2E)


@triton.jit
def _smooth_sum(shifted, offs_v, local_vocab_size, class_weight_ptr):
    """Row sums of the logits minus the anchor, times the class weights; over all columns."""
    inside = offs_v < local_vocab_size
    spread = shifted
    if class_weight_ptr is not None:
        weight = tl.load(class_weight_ptr + offs_v, mask=inside, other=0.0)
        spread *= weight.to(tl.float32)[None, :]
    return tl.sum(tl.where(inside[None, :], spread, 0.0), 1)


@triton.jit
def _entropy_sum(shifted, exponents, row_max):
    """A tile's term of the entropy, counted from its own row maxima.

    Counted from the anchor, which may lie 40 nats below, the entropy would be the small difference
    of two large sums, each with rounding errors of its own.
    """
    around = tl.maximum(shifted, LOWEST) - tl.maximum(row_max, LOWEST)[:, None]
    return tl.sum(exponents * around, 1)


@triton.jit
def _next_smaller(x):
    """A float32 below `x` by one or two units in the last place."""
    return x - tl.maximum(tl.abs(x) * 1.1920929e-7, 1.1754944e-38)


@triton.jit
def _square_sum(shifted, row_max):
    """A tile's sum of squared exponents, counted from its own row maxima.

    Counted from the anchor, 44 nats below, the squares would leave float32's range.
    """
    around = tl.exp2((shifted - tl.maximum(row_max, LOWEST)[:, None]) * LOG2E)
    return tl.sum(around * around, 1)


@triton.jit
def store_sums(tile_sums, launch, offs_t, first_v, WIDTH):
    """Writes the row sums that `epilogue` returned of a tile of `WIDTH` columns."""
    sums = launch.sums
    mask_t = offs_t < launch.num_tokens
    place = (first_v // WIDTH).to(tl.int64) * launch.num_tokens + offs_t
    if sums.sum_exp is not None:
        tl.store(sums.sum_exp + place, tile_sums.sum_exp, mask=mask_t)
    if sums.entropy is not None:
        tl.store(sums.entropy + place, tile_sums.entropy, mask=mask_t)
    if sums.smooth is not None:
        tl.store(sums.smooth + place, tile_sums.smooth, mask=mask_t)
    if sums.row_max is not None:
        tl.store(sums.row_max + place, tile_sums.row_max, mask=mask_t)
    if sums.squares is not None:
        tl.store(sums.squares + place, tile_sums.squares, mask=mask_t)


@triton.jit
def load_rows(launch, offs_t):
    """Labels of rows, int64, and their anchors. The loads overlap what does not depend on them."""
    mask_t = offs_t < launch.num_tokens
    labels = tl.load(launch.labels + offs_t, mask=mask_t, other=-1)
    return labels, tl.load(launch.anchor + offs_t, mask=mask_t, other=0.0)


@triton.jit
def labels_among(labels, first_v, end_v, vocab_start):
    """Whether columns `first_v` to `end_v` hold the label of one of these rows: few tiles do."""
    labels = (labels - vocab_start).to(tl.int32)
    return tl.max(((labels >= first_v) & (labels < end_v)).to(tl.int32), 0) > 0


@triton.jit
def epilogue(
    acc,
    launch,
    offs_t,
    offs_v,
    first_v,
    labels,
    anchor,
    holds_label,
    EXACT: tl.constexpr = False,
    TIES: tl.constexpr = False,
):
    """Turns a tile of accumulated products into exponents, or into the gradient of the products.

    Without row factors in `launch.gradient` the tile is exp(z - anchor), zero at the label and
    times the softcap's slope, and `launch.sums.target` is written; with them, the gradient.

    `labels` and `anchor` come from `load_rows`, `holds_label` from `labels_among`; `first_v` is the
    first of `offs_v`. `EXACT` is for float32 operands, whose results show how exponents were
    rounded; `TIES` tells equal logits of a tile apart, where registers are not short.
    Returns the tile, float32, and its row sums for `store_sums`.
    """
    num_tokens, local_vocab_size = launch.num_tokens, launch.local_vocab_size
    logit_options, sums, gradient = launch.logit_options, launch.sums, launch.gradient
    mask_t = offs_t < num_tokens
    labels = (labels - launch.vocab_start).to(tl.int32)
    end_v = first_v + offs_v.shape[0]
    logits, slope = logits_of(acc, offs_v, local_vocab_size, logit_options, EXACT)
    if logit_options.row_scale is not None:
        row_scale = tl.load(logit_options.row_scale + offs_t, mask=mask_t, other=1.0)
        logits *= row_scale[:, None]
    shifted = logits - anchor[:, None]
    # Placeholders for sums without memory: Triton 3.6 cannot return None inside a tuple.
    sum_exp, entropy_sum, smooth_sum, row_max, squares = anchor, anchor, anchor, anchor, anchor
    if gradient.alpha is None:
        if sums.smooth is not None:
            smooth_sum = _smooth_sum(shifted, offs_v, local_vocab_size, logit_options.class_weight)
        # Most tiles hold no label, and only the last ones columns beyond V: the others skip two
        # comparisons and a choice an element.
        if holds_label | (end_v > local_vocab_size):
            at_label = offs_v[None, :] == labels[:, None]
            if sums.target is not None:
                # A label beyond V is another rank's.
                own = mask_t & (labels >= first_v) & (labels < end_v) & (labels < local_vocab_size)
                target = tl.sum(tl.where(at_label, shifted, 0.0), 1)
                if TIES:
                    # Of equal logits the first is the largest: the label's counts as less.
                    earlier = (offs_v[None, :] < labels[:, None]) & (shifted == target[:, None])
                    tied = tl.max(earlier.to(tl.int32), 1) > 0
                    target = tl.where(tied, _next_smaller(target), target)
                tl.store(sums.target + offs_t, target, mask=own)
            outside = at_label | (offs_v >= local_vocab_size)[None, :]
            shifted = tl.where(outside, float("-inf"), shifted)
        tile = exponential(shifted, EXACT)
        if sums.sum_exp is not None:
            sum_exp = tl.sum(tile, 1)
        if sums.row_max is not None:
            row_max = tl.max(shifted, 1)
        if sums.entropy is not None:
            entropy_sum = _entropy_sum(shifted, tile, row_max)
        if sums.squares is not None:
            squares = _square_sum(shifted, row_max)
        if logit_options.softcap is not None:
            tile *= slope
    else:
        exponents = exponential(shifted, EXACT)
        alpha = tl.load(gradient.alpha + offs_t, mask=mask_t, other=0.0)
        if gradient.eta is not None:
            eta = tl.load(gradient.eta + offs_t, mask=mask_t, other=0.0)
            entropy = tl.load(gradient.entropy + offs_t, mask=mask_t, other=0.0)
            # A column without mass has no entropy gradient either.
            log_p = tl.maximum(shifted, LOWEST)
            tile = exponents * (alpha[:, None] - eta[:, None] * (log_p + entropy[:, None]))
        else:
            tile = exponents * alpha[:, None]
        if holds_label:
            target = tl.load(gradient.target + offs_t, mask=mask_t, other=0.0)
            tile = tl.where(offs_v[None, :] == labels[:, None], target[:, None], tile)
        if gradient.gamma is not None:
            gamma = tl.load(gradient.gamma + offs_t, mask=mask_t, other=0.0)
            if logit_options.class_weight is not None:
                inside = offs_v < local_vocab_size
                weight = tl.load(logit_options.class_weight + offs_v, mask=inside, other=0.0)
                tile -= gamma[:, None] * weight.to(tl.float32)[None, :]
            else:
                tile -= gamma[:, None]
        if logit_options.softcap is not None:
            tile *= slope
        if logit_options.logit_scale is not None:
            tile *= logit_options.logit_scale
    return tile, RowSums(sum_exp, entropy_sum, smooth_sum, row_max, squares, anchor)


@triton.jit
def finish_tile(acc, launch, offs_t, offs_v, first_v, EXACT: tl.constexpr):
    """Writes the row sums of a tile of accumulated products; returns the tile to be stored."""
    labels, anchor = load_rows(launch, offs_t)
    width = offs_v.shape[0]
    holds_label = labels_among(labels, first_v, first_v + width, launch.vocab_start)
    rows = (labels, anchor, holds_label)
    tile, tile_sums = epilogue(acc, launch, offs_t, offs_v, first_v, *rows, EXACT, True)
    store_sums(tile_sums, launch, offs_t, first_v, width)
    return tile
