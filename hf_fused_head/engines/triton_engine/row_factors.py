"""From `objective.row_gradient` to what the kernels take: layout, smoothing, float16's range."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fused_head import objective
from hf_fused_head.engines.triton_engine.call import HeadCall
from hf_fused_head.kernels.operands import RowFactors
from hf_fused_head.objective import RowStats, Upstream

# float16 gradients of logits are stored with their largest row factor at this power of two.
_HALF_PEAK = 2.0**14


def row_gradient(call: HeadCall, stats: RowStats, upstream: Upstream) -> RowFactors:
    """The factors of every row's gradient, as the kernels take them.

    Args:
        call: All rows.
        stats: Their statistics.
        upstream: The gradient with respect to each.
    """
    factors = objective.row_gradient(stats, upstream, call.vocab_size, call.class_weight)
    if call.head.row_scale is not None:
        factors = factors.scaled(call.head.row_scale)
    entropy = None if factors.eta is None else stats.entropy
    return RowFactors(stats.lse, *factors, entropy)


def in_half_range(call: HeadCall, gradient: RowFactors) -> tuple[RowFactors, Tensor]:
    """Row factors whose gradients fit float16's range, and the scalar that undoes the scaling."""
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


def smoothing_factor(call: HeadCall, smooth_weight: Tensor | None) -> Tensor | None:
    """What smoothing subtracts from every column of the stored exponents' gradient."""
    if smooth_weight is None:
        return None
    gamma = smooth_weight * (call.head.logit_scale / call.vocab_size)
    if call.head.row_scale is not None:
        gamma = gamma * call.head.row_scale
    return gamma.masked_fill_(call.labels < 0, 0.0)
