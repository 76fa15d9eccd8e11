"""The divergence of two heads for impl="reference": all logits in memory, plain formulas.

In float64 it is the oracle of the tests, which hold its gradients against autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fused_head.engines.protocol import DivergenceNeeds, HeadPair, Operands
from hf_fused_head.engines.reference import full_logits, head_gradients
from hf_fused_head.kl_objective import divergence_slope, divergence_terms
from hf_fused_head.planning.schedule import Schedule


def divergence(
    heads: HeadPair,
    row_weight: Tensor,
    needs: DivergenceNeeds,
    schedule: Schedule | None = None,
    keep_half: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `DivergenceEngine.divergence`."""
    student, teacher = (_in_dtype(head, heads.dtype) for head in (heads.student, heads.teacher))
    logits, slope = full_logits(student)  # [T, V]
    log_p, log_q = logits.log_softmax(dim=1), full_logits(teacher)[0].log_softmax(dim=1)
    per_token = divergence_terms(log_p, log_q, heads.beta).sum(dim=1)
    probs = log_p.exp()
    entropy = logits.new_empty(0)
    if needs.entropy:
        entropy = -torch.special.xlogy(probs, probs).sum(dim=1)
    if not needs.gradients.any():
        return per_token, entropy, [logits.new_empty(0) for _ in range(3)]
    dlog_p = divergence_slope(log_p, log_q, heads.beta)
    dlogits = dlog_p - probs * dlog_p.sum(dim=1, keepdim=True)
    if slope is not None:
        dlogits = dlogits * slope
    dlogits = dlogits * (row_weight * student.logit_scale)[:, None]
    first = student.shard.first
    dlogits = dlogits[:, first : first + student.local_vocab_size]
    grads = head_gradients(student, dlogits, needs.gradients, keep_half)
    dtype = heads.student.inputs[0].dtype
    if keep_half and dtype == torch.float16:
        dtype = torch.float32
    return per_token, entropy, [grad.to(dtype) for grad in grads]


def _in_dtype(head: Operands, dtype: torch.dtype) -> Operands:
    """The head with its operands converted."""
    return head._replace(
        inputs=[hidden.to(dtype) for hidden in head.inputs],
        weights=[weight.to(dtype) for weight in head.weights],
        bias=None if head.bias is None else head.bias.to(dtype),
    )
