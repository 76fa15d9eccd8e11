"""What happens to a tile of logits in registers: row sums and exponents, or its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fused_head.kernels.product import LOG2E, logits_of

# exp of this is zero in float32: what lies lower counts as this where a logarithm has to be finite.
LOWEST = tl.constexpr(-200.0)
# log(2) in two parts, the first of so few bits that small multiples of it are exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)


@triton.jit
def _exponential(x, EXACT: tl.constexpr):
    """exp(x); if `EXACT` with float32's digits also where `x * log2(e)` is rounded to fewer."""
    if EXACT:
        # No maximum, which would hide a NaN.
        x = tl.where(x < LOWEST, LOWEST, x)
        octaves = tl.floor(x * LOG2E + 0.5)
        rest = x - octaves * _LN2_HIGH - octaves * _LN2_LOW
        return tl.exp2(octaves) * tl.exp2(rest * LOG2E)
    return tl.exp2(x * LOG2E)


@triton.jit
def _smooth_sum(shifted, offs_v, vocab_size, class_weight_ptr):
    """The row sums of the shifted logits, weighted; the label's among them."""
    inside = offs_v < vocab_size
    spread = shifted
    if class_weight_ptr is not None:
        weight = tl.load(class_weight_ptr + offs_v, mask=inside, other=0.0)
        spread *= weight.to(tl.float32)[None, :]
    return tl.sum(tl.where(inside[None, :], spread, 0.0), 1)


@triton.jit
def _entropy_sum(shifted, exponents, best):
    """A tile's part of the entropy, counted from its own row maxima.

    Counted from the anchor, which may lie 40 nats below, the entropy would be the small difference
    of two sums, each with the rounding of its own order of summation.
    """
    around = tl.maximum(shifted, LOWEST) - tl.maximum(best, LOWEST)[:, None]
    return tl.sum(exponents * around, 1)


@triton.jit
def store_sums(
    sums, offs_t, first_v, WIDTH, num_tokens, total_ptr, entropy_sum_ptr, smooth_sum_ptr, best_ptr
):
    """Writes the row sums of a tile of `WIDTH` columns that `epilogue` returned."""
    total, entropy_sum, smooth_sum, best = sums
    mask_t = offs_t < num_tokens
    place = (first_v // WIDTH).to(tl.int64) * num_tokens + offs_t
    if total_ptr is not None:
        tl.store(total_ptr + place, total, mask=mask_t)
    if entropy_sum_ptr is not None:
        tl.store(entropy_sum_ptr + place, entropy_sum, mask=mask_t)
    if smooth_sum_ptr is not None:
        tl.store(smooth_sum_ptr + place, smooth_sum, mask=mask_t)
    if best_ptr is not None:
        tl.store(best_ptr + place, best, mask=mask_t)


@triton.jit
def load_rows(labels_ptr, shift_ptr, offs_t, num_tokens):
    """Labels of rows, int64, and what their logits are counted from; nothing waits for them yet."""
    mask_t = offs_t < num_tokens
    labels = tl.load(labels_ptr + offs_t, mask=mask_t, other=-1)
    return labels, tl.load(shift_ptr + offs_t, mask=mask_t, other=0.0)


@triton.jit
def labels_among(labels, first_v, end_v, vocab_start):
    """Whether a tile of these columns holds the label of one of its rows: few tiles do."""
    labels = (labels - vocab_start).to(tl.int32)
    return tl.max(((labels >= first_v) & (labels < end_v)).to(tl.int32), 0) > 0


@triton.jit
def epilogue(
    acc,
    offs_t,
    offs_v,
    first_v,
    labels,
    shift,
    holds_label,
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
    EXACT: tl.constexpr = False,
):
    """Turns accumulated products into the tile to be stored, float32, and its row sums.

    `labels` and `shift` are what `load_rows` returns; `first_v` is the first of `offs_v`, and
    `holds_label` what `labels_among` says of them. Without `alpha_ptr` the tile holds
    exp(z - anchor), zero at the label and times the softcap's slope; with it, the gradient of the
    accumulated products. The sums are for `store_sums`; those without a pointer mean nothing.
    `EXACT` is for float32 operands, whose results show how exponents were rounded.
    """
    mask_t = offs_t < num_tokens
    labels = (labels - vocab_start).to(tl.int32)
    end_v = first_v + offs_v.shape[0]
    logits, slope = logits_of(acc, offs_v, vocab_size, bias_ptr, logit_scale, softcap)
    shifted = logits - shift[:, None]
    total, entropy_sum, smooth_sum, best = shift, shift, shift, shift
    if alpha_ptr is None:
        if smooth_sum_ptr is not None:
            smooth_sum = _smooth_sum(shifted, offs_v, vocab_size, class_weight_ptr)
        # Most tiles hold no label, and only the last ones columns beyond V: the others are spared
        # two comparisons and a choice an element.
        if holds_label | (end_v > vocab_size):
            at_label = offs_v[None, :] == labels[:, None]
            if target_shifted_ptr is not None:
                # A label beyond V is another rank's.
                own = mask_t & (labels >= first_v) & (labels < end_v) & (labels < vocab_size)
                target_shifted = tl.sum(tl.where(at_label, shifted, 0.0), 1)
                tl.store(target_shifted_ptr + offs_t, target_shifted, mask=own)
            outside = at_label | (offs_v >= vocab_size)[None, :]
            shifted = tl.where(outside, float("-inf"), shifted)
        tile = _exponential(shifted, EXACT)
        if total_ptr is not None:
            total = tl.sum(tile, 1)
        if best_ptr is not None:
            best = tl.max(shifted, 1)
        if entropy_sum_ptr is not None:
            entropy_sum = _entropy_sum(shifted, tile, best)
        if softcap is not None:
            tile *= slope
    else:
        exponents = _exponential(shifted, EXACT)
        alpha = tl.load(alpha_ptr + offs_t, mask=mask_t, other=0.0)
        if eta_ptr is not None:
            eta = tl.load(eta_ptr + offs_t, mask=mask_t, other=0.0)
            entropy = tl.load(entropy_ptr + offs_t, mask=mask_t, other=0.0)
            # A column without mass has no entropy gradient either.
            log_p = tl.maximum(shifted, LOWEST)
            tile = exponents * (alpha[:, None] - eta[:, None] * (log_p + entropy[:, None]))
        else:
            tile = exponents * alpha[:, None]
        if holds_label:
            target = tl.load(target_ptr + offs_t, mask=mask_t, other=0.0)
            tile = tl.where(offs_v[None, :] == labels[:, None], target[:, None], tile)
        if gamma_ptr is not None:
            gamma = tl.load(gamma_ptr + offs_t, mask=mask_t, other=0.0)
            if class_weight_ptr is not None:
                weight = tl.load(class_weight_ptr + offs_v, mask=offs_v < vocab_size, other=0.0)
                tile -= gamma[:, None] * weight.to(tl.float32)[None, :]
            else:
                tile -= gamma[:, None]
        if softcap is not None:
            tile *= slope
        if logit_scale is not None:
            tile *= logit_scale
    return tile, (total, entropy_sum, smooth_sum, best)
