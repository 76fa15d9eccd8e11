"""impl="reference": the definition of correct, with all logits in memory.

Plain formulas on the full `[N, V]` matrix, written for reading. In float64 it is the oracle of the
tests; its gradients are spelled out rather than left to autograd, and the tests hold them against
autograd through torch's own operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fused_head.options import Needs, Operands, RowStats, accumulation_dtype
from hf_fused_head.run_record import note_schedule
from hf_fused_head.schedule import plan


def forward(
    operands: Operands,
    labels: Tensor,
    budget_bytes: int,
    want_smooth: bool,
    want_entropy: bool,
    want_correct: bool,
) -> RowStats:
    """Statistics of every row; the protocol is the one of `hf_fused_head.ops`."""
    _note_schedule(operands, labels, None, budget_bytes)
    logits, _ = _logits(operands)  # [N, V], of all ranks
    labels = operands.shard.classes_of(labels, operands.num_rows)
    target_logit = logits.gather(1, labels[:, None])[:, 0]
    top = logits.amax(dim=1)
    others = (logits - top[:, None]).exp().scatter(1, labels[:, None], 0.0).sum(dim=1)
    # Both lines say log(1 + others / e^(z_y - top)); the first keeps small losses exact, the second
    # cannot overflow.
    near = torch.log1p(others * (top - target_logit).exp())
    far = (top - target_logit) + torch.log(others + (target_logit - top).exp())
    nll = torch.where(top - target_logit < 1.0, near, far)
    lse = top + torch.log1p(others + torch.expm1(target_logit - top))
    log_probs = logits - lse[:, None]
    empty = logits.new_empty(0)
    smooth, entropy, correct = (
        empty,
        empty.clone(),
        torch.empty(0, dtype=torch.bool).to(empty.device),
    )
    if want_smooth:
        weighted = log_probs if operands.class_weight is None else log_probs * operands.class_weight
        smooth = -weighted.sum(dim=1) / logits.shape[1]
    if want_entropy:
        entropy = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(dim=1)
    if want_correct:
        correct = logits.argmax(dim=1) == labels
    return RowStats(nll, lse, smooth, entropy, correct)


def forward_backward(
    operands: Operands,
    labels: Tensor,
    nll_weight: Tensor,
    smooth_weight: Tensor | None,
    z_weight: Tensor | None,
    needs: Needs,
    budget_bytes: int,
    want_entropy: bool,
    want_correct: bool,
    smoothing: float = 0.0,
) -> tuple[RowStats, list[Tensor]]:
    """Statistics, and the gradients of `sum_t a_t nll_t + b_t smooth_t + c_t lse_t^2`.

    Nothing is rounded before all terms are together, whatever the share of `smoothing`.
    """
    stats = forward(
        operands, labels, budget_bytes, smooth_weight is not None, want_entropy, want_correct
    )
    _note_schedule(operands, labels, needs, budget_bytes)
    g_lse = torch.zeros_like(stats.lse) if z_weight is None else 2 * z_weight * stats.lse
    dlogits = _dlogits(operands, labels, stats, nll_weight, g_lse, smooth_weight, None)
    return stats, _products(operands, dlogits, needs, keep_half=True)


def backward(
    operands: Operands,
    labels: Tensor,
    stats: RowStats,
    g_nll: Tensor,
    g_lse: Tensor,
    g_smooth: Tensor | None,
    g_entropy: Tensor | None,
    needs: Needs,
    budget_bytes: int,
) -> list[Tensor]:
    """The gradients of `sum_t g_nll nll + g_lse lse + g_smooth smooth + g_entropy entropy`."""
    dlogits = _dlogits(operands, labels, stats, g_nll, g_lse, g_smooth, g_entropy)
    return _products(operands, dlogits, needs, keep_half=False)


def _note_schedule(
    operands: Operands, labels: Tensor, needs: Needs | None, budget_bytes: int
) -> None:
    """Records the bytes of the whole matrices; there is no schedule to choose."""
    sizes = [weight.shape[1] for weight in operands.weights]
    wanted = [False] * len(sizes) if needs is None else needs.weights
    schedule = plan(
        num_tokens=labels.shape[0],
        hidden_size=sum(sizes),
        vocab_size=operands.vocab_size,
        dtype=operands.weights[0].dtype,
        impl="reference",
        device_type=labels.device.type,
        grad_hidden=needs is not None and any(needs.inputs),
        grad_weight=needs is not None and (any(needs.weights) or needs.bias),
        memory_budget_mib=budget_bytes / 2**20,
        grad_columns=sum(size for size, want in zip(sizes, wanted, strict=True) if want),
    )
    note_schedule(schedule)


def _logits(operands: Operands) -> tuple[Tensor, Tensor | None]:
    """The logits of all ranks, [N, V], and the softcap's derivative there."""
    dtype = accumulation_dtype(operands.inputs[0].dtype)
    pairs = zip(operands.inputs, operands.weights, strict=True)
    products = [hidden.to(dtype) @ weight.to(dtype).T for hidden, weight in pairs]
    logits = torch.stack(products).sum(dim=0) if len(products) > 1 else products[0]
    if operands.bias is not None:
        logits = logits + operands.bias.to(dtype)
    logits = operands.shard.columns(logits)
    logits = logits * operands.logit_scale
    if operands.softcap is None:
        return logits, None
    inner = logits / operands.softcap
    # 1 / cosh^2 rather than 1 - tanh^2, which has no digit left where tanh rounds to 1.
    return inner.tanh() * operands.softcap, inner.cosh().square().reciprocal()


def _dlogits(
    operands: Operands,
    labels: Tensor,
    stats: RowStats,
    g_nll: Tensor,
    g_lse: Tensor,
    g_smooth: Tensor | None,
    g_entropy: Tensor | None,
) -> Tensor:
    """The gradient of the row objective with respect to `X W^T + bias`, [N, rows here]."""
    labels = operands.shard.classes_of(labels, operands.num_rows)
    logits, slope = _logits(operands)
    log_probs = logits.log_softmax(dim=1)
    probs = logits.softmax(dim=1)
    class_weight = operands.class_weight
    alpha, beta = g_nll + g_lse, g_nll
    if g_smooth is not None:
        vocab_size = logits.shape[1]
        total = vocab_size if class_weight is None else class_weight.sum()
        alpha = alpha + g_smooth * total / vocab_size
    dlogits = alpha[:, None] * probs
    # The target column as (alpha - beta) p + beta (p - 1), and 1 - p from the loss: exact near 1.
    target_prob = (-stats.nll).exp()
    at_target = (alpha - beta) * target_prob + beta * torch.expm1(-stats.nll)
    dlogits = dlogits.scatter(1, labels[:, None], at_target[:, None])
    if g_smooth is not None:
        spread = torch.ones_like(logits[0]) if class_weight is None else class_weight
        dlogits = dlogits - (g_smooth / logits.shape[1])[:, None] * spread
    if g_entropy is not None:
        shifted = torch.where(probs > 0, log_probs, 0.0) + stats.entropy[:, None]
        dlogits = dlogits - g_entropy[:, None] * probs * shifted
    if slope is not None:
        dlogits = dlogits * slope
    first = operands.shard.first
    return (dlogits * operands.logit_scale)[:, first : first + operands.num_rows]


def _products(operands: Operands, dlogits: Tensor, needs: Needs, keep_half: bool) -> list[Tensor]:
    """The gradients of inputs, weights and bias, in that order; empty where not needed."""
    dtype = dlogits.dtype
    inputs, weights, bias = operands.inputs, operands.weights, operands.bias
    dinputs = [
        operands.shard.sum_hidden(dlogits @ weight.to(dtype)) if need else dlogits.new_empty(0)
        for weight, need in zip(weights, needs.inputs, strict=True)
    ]
    dweights = [
        dlogits.T @ hidden.to(dtype) if need else dlogits.new_empty(0)
        for hidden, need in zip(inputs, needs.weights, strict=True)
    ]
    dbias = dlogits.sum(dim=0) if needs.bias else dlogits.new_empty(0)
    parameters = [*inputs, *weights, inputs[0] if bias is None else bias]
    grads = [*dinputs, *dweights, dbias]
    return [
        grad if keep_half and parameter.dtype == torch.float16 else grad.to(parameter.dtype)
        for grad, parameter in zip(grads, parameters, strict=True)
    ]
