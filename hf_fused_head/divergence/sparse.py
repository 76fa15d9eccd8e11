"""The divergence over K classes a token, from log-probabilities: plain torch, K is small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hf_fused_head.autograd import Gradients, may_be_differentiated
from hf_fused_head.divergence.reduction import item_sum, reduced
from hf_fused_head.divergence.validation import check_sparse, refuse_transforms
from hf_fused_head.kl_objective import divergence_slope, divergence_terms
from hf_fused_head.options import DivergenceOptions, Reduction, accumulation_dtype, item_count


def sparse_kl_div(
    log_probs: Tensor,
    teacher_log_probs: Tensor,
    *,
    beta: float = 0.0,
    tail: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Divergence of a student from a teacher over K classes a token, such as its top K.

    The divergence is that of `linear_kl_div`. First derivatives in reverse mode.

    Args:
        log_probs: The student's log-probabilities of the K classes, [..., K], floating point.
        teacher_log_probs: The teacher's, of the same shape and on the same device; constants. -inf
            stands for no mass, as for places that pad a shorter list.
        beta: 0 for KL(teacher || student), 1 for KL(student || teacher), between them
            `beta KL(teacher || m) + (1 - beta) KL(student || m)` with the mixture
            `m = beta teacher + (1 - beta) student`.
        tail: False renormalises both to the K classes. True keeps both as they are and adds one
            class for the mass outside the K, at least the rounding of the dtype.
        mask: Tokens that count, [...], bool; None for all.
        reduction: "mean", "sum", or "none" for one divergence per token.
        num_items: With "mean", what the sum is divided by instead of the tokens that count.

    Returns:
        Scalar float32; [...] float32 with `reduction="none"` (float64 for float64 inputs). A mean
        over no token is nan without `num_items`.

    Raises:
        ValueError: If shapes disagree or an option is out of range.
        TypeError: If dtypes are wrong.
        NotImplementedError: Inside transforms of torch.func, with dual tensors, and where a second
            derivative is taken.
    """
    refuse_transforms("sparse_kl_div")
    options = DivergenceOptions(beta=beta, reduction=reduction)
    num_items = item_count(num_items)
    check_sparse(log_probs, teacher_log_probs, tail, mask, num_items)
    dtypes = [accumulation_dtype(each.dtype) for each in (log_probs, teacher_log_probs)]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    log_p, log_q = log_probs.to(dtype), teacher_log_probs.detach().to(dtype)
    if mask is not None:
        # Before anything else: what a token that does not count holds may be no number.
        log_p, log_q = (torch.where(mask[..., None], each, 0.0) for each in (log_p, log_q))
    normalised = _with_tail if tail else _renormalised
    log_p, log_q = normalised(log_p), normalised(log_q)
    per_token = _Terms.apply(log_p, log_q, float(options.beta)).sum(dim=-1)
    if mask is not None:
        per_token = torch.where(mask, per_token, 0.0)
    return reduced(per_token, reduction, item_sum(reduction, per_token.numel(), mask, num_items))


def _renormalised(log_probs: Tensor) -> Tensor:
    return log_probs.log_softmax(dim=-1)


def _with_tail(log_probs: Tensor) -> Tensor:
    """One class more, for the mass outside."""
    inside = log_probs.logsumexp(dim=-1, keepdim=True)
    # Rounding may leave more than all of the mass inside.
    inside = inside.clamp(max=-torch.finfo(log_probs.dtype).eps)
    return torch.cat((log_probs, torch.log(-torch.expm1(inside))), dim=-1)


class _Terms(Function):
    """The divergence class by class, with the derivative in closed form, which keeps its digits.

    Saved: both log-probabilities.
    """

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
        """Terms of `kl_objective`."""
        ctx.beta = beta
        ctx.save_for_backward(log_p, log_q)
        return divergence_terms(log_p, log_q, beta)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """The derivative with respect to the student's log-probabilities."""
        log_p, log_q = ctx.saved_tensors
        with torch.no_grad():
            slope = upstream * divergence_slope(log_p, log_q, ctx.beta)
        if may_be_differentiated():
            (slope,) = Gradients.apply(2, upstream, log_p, slope)
        return slope, None, None
