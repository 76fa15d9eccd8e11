"""The divergence of two predictions as a sum over classes, and its derivative, stated once.

With p the student's probabilities, q the teacher's, `d = log p - log q`, `0 < beta < 1` and the
mixture `m = beta q + (1 - beta) p`, whose logarithm is `log q + a = log p + b`,

    beta = 0    KL(q || p)     sum_j q_j (expm1(d_j) - d_j)
    beta = 1    KL(p || q)     sum_j p_j (expm1(-d_j) + d_j)
    between     beta KL(q || m) + (1 - beta) KL(p || m)
                               sum_j beta q_j (expm1(a_j) - a_j) + (1 - beta) p_j (expm1(b_j) - b_j)

The `expm1` terms sum to nothing, since p, q and m each sum to 1. They make every term non-negative
and as small as the divergence itself, so nearly equal predictions keep their digits.

The derivative of a term with respect to `log p_j` is `s_j = p_j - q_j`, `p_j d_j`, or
`-(1 - beta) p_j b_j`, and that of the sum with respect to the student's logits

    dz_k = s_k - p_k sum_j s_j                                         (sum_j s_j = 0 at beta = 0).
"""

from __future__ import annotations

import torch
from torch import Tensor


def divergence_terms(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The divergence class by class, none of it negative; the last dimension sums to it.

    Args:
        log_p: Log-probabilities of the student, -inf for none.
        log_q: Log-probabilities of the teacher, of the same shape.
        beta: Which divergence, 0 to 1.
    """
    p, q, d = log_p.exp(), log_q.exp(), _log_ratio(log_p, log_q)
    if beta == 0:
        return _excess(q, d, p)
    if beta == 1:
        return _excess(p, -d, q)
    m = beta * q + (1 - beta) * p
    a, b = mixture_ratios(d, beta)
    return beta * _excess(q, a, m) + (1 - beta) * _excess(p, b, m)


def divergence_slope(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The derivative of every term with respect to its own `log_p`.

    Args:
        log_p: As for `divergence_terms`.
        log_q: As for `divergence_terms`.
        beta: Which divergence, 0 to 1.
    """
    p, d = log_p.exp(), _log_ratio(log_p, log_q)
    if beta == 0:
        q = log_q.exp()
        return torch.where(d < 1, q * torch.expm1(d.clamp(max=1)), p - q)
    ratio = d if beta == 1 else -(1 - beta) * mixture_ratios(d, beta)[1]
    return _times(p, ratio)


def mixture_ratios(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`log m - log q` and `log m - log p`, without overflow for any `d = log p - log q`."""
    share = (d > 0).to(d.dtype) * (2 * beta - 1) + (1 - beta)
    near = torch.log1p(share * torch.expm1(-d.abs()))
    return near + d.clamp(min=0), near + (-d).clamp(min=0)


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`log_p - log_q`; 0 for a class that neither has."""
    neither = (log_p == float("-inf")) & (log_q == float("-inf"))
    return torch.where(neither, 0.0, log_p - log_q)


def _excess(weight: Tensor, ratio: Tensor, other: Tensor) -> Tensor:
    """`weight (expm1(ratio) - ratio)` where `other = weight exp(ratio)`, which cannot overflow."""
    near = weight * (torch.expm1(ratio.clamp(max=1)) - ratio)
    return torch.where(ratio < 1, near, other - weight - _times(weight, ratio))


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """The product, 0 without weight."""
    return torch.where(weight > 0, weight * value, 0.0)
