"""What happens to a tile of logits in registers: row sums and exponents, or its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fused_head.kernels.product import LOG2E, logits_of, softcap_slope


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
    tl.store(total_ptr + place, tl.sum(exponents, 1), mask=mask_t)
    if entropy_ptr is not None:
        # exp(-inf) * -inf would be nan: a column without mass adds nothing.
        weighted = tl.where(exponents > 0, exponents * shifted, 0.0)
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
    exponents = tl.exp2(shifted * LOG2E)
    if alpha_ptr is None:
        outside = at_label | (offs_v >= vocab_size)[None, :]
        tile = tl.where(outside, 0.0, exponents)
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
        tile *= logit_scale
    return tile
