"""What happens to a tile of logits in registers: row sums and exponents, or its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fused_head.kernels.product import LOG2E, logits_of, softcap_slope


@triton.jit
def level_of(total):
    """What a tile's shifted logits are counted from in its entropy sum: near those that matter.

    Counted from the anchor, which may lie 40 nats below, the entropy would be the small difference
    of two sums, each with the rounding of its own order of summation.
    """
    return tl.where((total > 0) & (total < float("inf")), tl.log(total), 0.0)


@triton.jit
def _store_sums(
    logits,
    exponents,
    shifted,
    at_label,
    offs_t,
    offs_v,
    pid_v,
    labels,
    num_tokens,
    vocab_size,
    class_weight_ptr,
    total_ptr,
    entropy_ptr,
    smooth_ptr,
    best_ptr,
    target_ptr,
):
    """Writes this tile's row sums at [pid_v, offs_t]; see `RowSums`."""
    place = pid_v.to(tl.int64) * num_tokens + offs_t
    mask_t = offs_t < num_tokens
    total = tl.sum(exponents, 1)
    tl.store(total_ptr + place, total, mask=mask_t)
    if entropy_ptr is not None:
        # exp(-inf) * -inf would be nan: a column without mass adds nothing.
        around = shifted - level_of(total)[:, None]
        weighted = tl.where(exponents > 0, exponents * around, 0.0)
        tl.store(entropy_ptr + place, tl.sum(weighted, 1), mask=mask_t)
    if smooth_ptr is not None:
        inside = (offs_v < vocab_size)[None, :]
        if class_weight_ptr is not None:
            weight = tl.load(class_weight_ptr + offs_v, mask=offs_v < vocab_size, other=0.0)
            spread = tl.where(inside, shifted * weight.to(tl.float32)[None, :], 0.0)
        else:
            spread = tl.where(inside, shifted, 0.0)
        tl.store(smooth_ptr + place, tl.sum(spread, 1), mask=mask_t)
    if best_ptr is not None:
        other = (offs_v < vocab_size)[None, :] & (at_label == 0)
        tl.store(best_ptr + place, tl.max(tl.where(other, logits, float("-inf")), 1), mask=mask_t)
        here = mask_t & (labels >= tl.min(offs_v, 0)) & (labels <= tl.max(offs_v, 0))
        # A label beyond V is another rank's.
        here = here & (labels < vocab_size)
        tl.store(target_ptr + offs_t, tl.sum(tl.where(at_label, logits, 0.0), 1), mask=here)


@triton.jit
def epilogue(
    acc,
    offs_t,
    offs_v,
    pid_v,
    num_tokens,
    vocab_size,
    vocab_start,
    labels_ptr,
    bias_ptr,
    class_weight_ptr,
    logit_scale,
    softcap,
    shift_ptr,
    total_ptr,
    entropy_sum_ptr,
    smooth_sum_ptr,
    best_ptr,
    target_logit_ptr,
    alpha_ptr,
    target_ptr,
    gamma_ptr,
    eta_ptr,
    entropy_ptr,
):
    """Turns accumulated products into the tile to be stored, float32, and writes the row sums.

    Without `alpha_ptr` the tile holds exp(z - anchor), zero at the label and times the softcap's
    slope; with it, the gradient of the accumulated products.
    """
    mask_t = offs_t < num_tokens
    shift = tl.load(shift_ptr + offs_t, mask=mask_t, other=0.0)
    labels = (tl.load(labels_ptr + offs_t, mask=mask_t, other=-1) - vocab_start).to(tl.int32)
    at_label = offs_v[None, :] == labels[:, None]
    logits = logits_of(acc, offs_v, vocab_size, bias_ptr, logit_scale, softcap)
    shifted = logits - shift[:, None]
    scaled = shifted * LOG2E
    if alpha_ptr is None:
        # Few tiles hold a label of one of their rows, and only the last ones columns beyond V:
        # the others are spared two comparisons and a choice an element.
        first_v = tl.min(offs_v, 0)
        last_v = tl.max(offs_v, 0)
        holds_label = tl.max(((labels >= first_v) & (labels <= last_v)).to(tl.int32), 0)
        if (holds_label > 0) | (last_v >= vocab_size):
            outside = at_label | (offs_v >= vocab_size)[None, :]
            scaled = tl.where(outside, float("-inf"), scaled)
        tile = tl.exp2(scaled)
        if total_ptr is not None:
            _store_sums(
                logits,
                tile,
                shifted,
                at_label,
                offs_t,
                offs_v,
                pid_v,
                labels,
                num_tokens,
                vocab_size,
                class_weight_ptr,
                total_ptr,
                entropy_sum_ptr,
                smooth_sum_ptr,
                best_ptr,
                target_logit_ptr,
            )
        if softcap is not None:
            tile *= softcap_slope(logits, softcap)
    else:
        exponents = tl.exp2(scaled)
        alpha = tl.load(alpha_ptr + offs_t, mask=mask_t, other=0.0)
        target = tl.load(target_ptr + offs_t, mask=mask_t, other=0.0)
        if eta_ptr is not None:
            eta = tl.load(eta_ptr + offs_t, mask=mask_t, other=0.0)
            entropy = tl.load(entropy_ptr + offs_t, mask=mask_t, other=0.0)
            # -inf * 0 would be nan: a column without mass has no entropy gradient either.
            log_p = tl.where(exponents > 0, shifted, 0.0)
            tile = exponents * (alpha[:, None] - eta[:, None] * (log_p + entropy[:, None]))
        else:
            tile = exponents * alpha[:, None]
        tile = tl.where(at_label, target[:, None], tile)
        if gamma_ptr is not None:
            gamma = tl.load(gamma_ptr + offs_t, mask=mask_t, other=0.0)
            if class_weight_ptr is not None:
                weight = tl.load(class_weight_ptr + offs_v, mask=offs_v < vocab_size, other=0.0)
                tile -= gamma[:, None] * weight.to(tl.float32)[None, :]
            else:
                tile -= gamma[:, None]
        if softcap is not None:
            tile *= softcap_slope(logits, softcap)
        if logit_scale is not None:
            tile *= logit_scale
    return tile
