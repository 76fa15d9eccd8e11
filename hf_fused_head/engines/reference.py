"""impl="reference": the definition of correct, with all logits in memory.

Plain formulas on the full `[T, V]` matrix, written for reading. In float64 it is the oracle of the
tests; its gradients are spelled out rather than left to autograd or to `objective`, so that it is a
second statement of the same mathematics, and the tests hold them against autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fused_head.engines.protocol import Needs, Operands, Speculation
from hf_fused_head.objective import RowStats, RowWeights, Upstream, Wanted
from hf_fused_head.options import accumulation_dtype
from hf_fused_head.planning.schedule import Schedule


def speculate(*_: object) -> None:
    """Nothing to gain: this engine waits for the host."""


def row_stats(
    operands: Operands,
    labels: Tensor,
    wanted: Wanted,
    schedule: Schedule | None = None,
    speculation: Speculation | None = None,
) -> RowStats:
    """See `Engine.row_stats`."""
    logits, _ = full_logits(operands)  # [T, V], of all ranks
    labels = operands.shard.classes_of(labels, operands.local_vocab_size)
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
    smooth, entropy, log_sum_sq = (logits.new_empty(0) for _ in range(3))
    correct = labels.new_empty(0, dtype=torch.bool)
    if wanted.smooth:
        weighted = log_probs if operands.class_weight is None else log_probs * operands.class_weight
        smooth = -weighted.sum(dim=1) / logits.shape[1]
    if wanted.entropy:
        entropy = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(dim=1)
    if wanted.correct:
        correct = logits.argmax(dim=1) == labels
    if wanted.log_sum_sq:
        log_sum_sq = (2 * log_probs).logsumexp(dim=1)
    return RowStats(nll, lse, smooth, entropy, correct, log_sum_sq)


def stats_and_grads(
    operands: Operands,
    labels: Tensor,
    weights: RowWeights,
    needs: Needs,
    wanted: Wanted,
    schedule: Schedule | None = None,
    speculation: Speculation | None = None,
) -> tuple[RowStats, list[Tensor]]:
    """See `Engine.stats_and_grads`."""
    stats = row_stats(operands, labels, wanted._replace(smooth=weights.smooth is not None))
    dlogits = _dlogits(operands, labels, stats, weights.upstream(stats.lse))
    return stats, head_gradients(operands, dlogits, needs, keep_half=True)


def row_grads(
    operands: Operands,
    labels: Tensor,
    stats: RowStats,
    upstream: Upstream,
    needs: Needs,
    schedule: Schedule | None = None,
) -> list[Tensor]:
    """See `Engine.row_grads`."""
    dlogits = _dlogits(operands, labels, stats, upstream)
    return head_gradients(operands, dlogits, needs, keep_half=False)


def full_logits(operands: Operands) -> tuple[Tensor, Tensor | None]:
    """The logits of all ranks, [T, V], and what softcap and row scale add to their derivative."""
    dtype = accumulation_dtype(operands.inputs[0].dtype)
    pairs = zip(operands.inputs, operands.weights, strict=True)
    products = [hidden.to(dtype) @ weight.to(dtype).T for hidden, weight in pairs]
    logits = torch.stack(products).sum(dim=0) if len(products) > 1 else products[0]
    if operands.bias is not None:
        logits = logits + operands.bias.to(dtype)
    logits = operands.shard.columns(logits)
    logits, slope = logits * operands.logit_scale, None
    if operands.softcap is not None:
        inner = logits / operands.softcap
        # 1 / cosh^2 rather than 1 - tanh^2, which has no digit left where tanh rounds to 1.
        logits, slope = inner.tanh() * operands.softcap, inner.cosh().square().reciprocal()
    if operands.row_scale is not None:
        scale = operands.row_scale[:, None]
        logits, slope = logits * scale, scale if slope is None else slope * scale
    return logits, slope


def _dlogits(
    operands: Operands,
    labels: Tensor,
    stats: RowStats,
    upstream: Upstream,
) -> Tensor:
    """The gradient of the row objective with respect to `X W^T + bias`, [T, local V]."""
    g_nll, g_lse, g_smooth, g_entropy = upstream
    labels = operands.shard.classes_of(labels, operands.local_vocab_size)
    logits, slope = full_logits(operands)
    log_probs = logits.log_softmax(dim=1)
    probs = logits.softmax(dim=1)
    class_weight = operands.class_weight
    alpha, beta = g_nll if g_lse is None else g_nll + g_lse, g_nll
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
    return (dlogits * operands.logit_scale)[:, first : first + operands.local_vocab_size]


def head_gradients(
    operands: Operands, dlogits: Tensor, needs: Needs, keep_half: bool
) -> list[Tensor]:
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
