"""What a row of the logits' gradient is made of: factors of its probabilities, [T] each."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fused_head.kernels.call import Call
from hf_fused_head.kernels.operands import RowGradient

# float16 gradients of logits are stored with their largest row factor at this power of two.
_HALF_PEAK = 2.0**14


def in_half_range(call: Call, gradient: RowGradient) -> tuple[RowGradient, Tensor]:
    """Row factors whose gradients fit float16's range, and the scalar that undoes it."""
    terms = [gradient.alpha.abs(), gradient.target.abs()]
    if gradient.gamma is not None:
        largest = 1.0 if call.class_weight is None else call.class_weight.max()
        terms.append(gradient.gamma.abs() * largest)
    if gradient.eta is not None and gradient.entropy is not None:
        # p log p lies in [-1/e, 0], and p times the entropy below the entropy.
        terms.append(gradient.eta.abs() * (gradient.entropy + 1.0))
    largest = torch.stack(terms).max() * abs(call.head.logit_scale)
    scale = _HALF_PEAK / largest.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = {
        name: value * scale
        for name in ("alpha", "target", "gamma", "eta")
        if (value := getattr(gradient, name)) is not None
    }
    return gradient._replace(**scaled), 1.0 / scale


def row_gradient(
    call: Call,
    nll: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    correction: Tensor | None,
    g_nll: Tensor,
    g_lse: Tensor,
    g_smooth: Tensor | None,
    g_entropy: Tensor | None,
) -> RowGradient:
    """Row factors of the logits' gradient from the upstream gradients of the row objective.

    Args:
        call: All rows.
        nll: Minus the log-probability of the labels.
        lse: Log-sum-exp of the logits.
        entropy: Needed with `g_entropy`.
        correction: See `RowOutputs`.
        g_nll: Upstream gradient of nll.
        g_lse: Upstream gradient of lse.
        g_smooth: Upstream gradient of the smoothing term.
        g_entropy: Upstream gradient of the entropy.
    """
    alpha, eta, gamma = g_nll + g_lse, g_entropy, None
    if g_smooth is not None:
        gamma = g_smooth / call.vocab_total
        alpha = alpha + gamma * call.class_total()
    # alpha p - beta, with 1 - p from the loss: a confident row keeps its digits.
    label_p = torch.exp(-nll)
    target = (alpha - g_nll) * label_p + g_nll * torch.expm1(-nll)
    if eta is not None:
        target = target - eta * label_p * (entropy - nll)
    if correction is not None:
        # Both multiply p, which the kernel makes from the rounded lse.
        alpha = alpha * correction
        eta = None if eta is None else eta * correction
    return RowGradient(lse, alpha, target, gamma, eta, None if eta is None else entropy)


def gamma_of(call: Call, smooth_weight: Tensor | None) -> Tensor | None:
    """What smoothing subtracts from every column of the stored exponents' gradient."""
    if smooth_weight is None:
        return None
    gamma = smooth_weight * (call.head.logit_scale / call.vocab_total)
    return gamma.masked_fill_(call.labels < 0, 0.0)
