"""Log-probabilities per token by plain torch operations, and the comparison with ours."""

from __future__ import annotations

from typing import Any

import torch
from oracle import assert_close_as_torch, farthest
from places import generator
from plain_head import NAMES, Problem, exact, plain_logits, widened
from torch import Tensor

from hf_fused_head.log_probs import TokenLogProbs, operand_log_probs

FIELDS = TokenLogProbs._fields
DIFFERENTIABLE = ("log_probs", "entropy")


def plain(
    tensors: dict[str, Tensor], options: dict[str, Any], by_lse: bool = False
) -> dict[str, Tensor]:
    """Every field of `TokenLogProbs`, by `log_softmax` or less the rounded log-sum-exp.

    Targets may have a last dimension of candidates.
    """
    target, ignore = tensors["target"], options.get("ignore_index", -100)
    operands = (tensors["hidden"], tensors["weight"], tensors.get("bias"))
    logits = plain_logits(*operands, options.get("logit_scale", 1.0), options.get("softcap"))
    temperature = options.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype)[..., None]
    logits = logits / temperature
    lse = logits.logsumexp(dim=-1)
    log_p = logits - lse[..., None] if by_lse else logits.log_softmax(dim=-1)
    candidates = target.view(*logits.shape[:-1], -1)
    valid = candidates != ignore
    counts = valid.any(dim=-1)
    chosen = log_p.gather(-1, candidates.clamp_min(0))
    largest = logits.argmax(dim=-1, keepdim=True) == candidates
    zero = torch.zeros((), dtype=logits.dtype)
    return {
        "log_probs": torch.where(valid, chosen, zero).view(target.shape),
        "entropy": torch.where(
            counts, -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1), zero
        ),
        "is_top1": (valid & largest).view(target.shape),
        "mean_logits": torch.where(counts, logits.mean(dim=-1), zero),
        "log_sum_sq_probs": torch.where(counts, (2 * log_p).logsumexp(dim=-1), zero),
        "lse": torch.where(counts, lse, zero),
    }


def ours(
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    impl: str,
    memory_budget_mib: float | None = None,
    **more: Any,
) -> TokenLogProbs:
    """The fields by `token_log_probs`, all of them unless `outputs` says which."""
    return operand_log_probs(
        [(tensors["hidden"], tensors["weight"])],
        tensors["target"],
        linear_bias=tensors.get("bias"),
        impl=impl,
        memory_budget_mib=memory_budget_mib,
        **{"outputs": FIELDS, **options, **more},
    )


def upstreams(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Upstream gradients of the fields that have one; multiples of 1/16."""
    source = generator(5)
    shapes = {"log_probs": tensors["target"].shape, "entropy": tensors["hidden"].shape[:-1]}

    def drawn(shape: torch.Size) -> Tensor:
        return (torch.randn(shape, generator=source) * 16).round().div(16).to(dtype)

    return {name: drawn(shape) for name, shape in shapes.items()}


def with_gradients(
    fields: Any, tensors: dict[str, Tensor], upstream: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The fields of `fields(tensors)` and the gradients of hidden states, weight and bias."""
    leaves = {n: t.clone().requires_grad_() if n in NAMES else t for n, t in tensors.items()}
    found = fields(leaves)
    found = found if isinstance(found, dict) else found._asdict()
    wanted = [name for name in NAMES if name in leaves]
    grads = torch.autograd.grad(
        [found[name] for name in DIFFERENTIABLE],
        [leaves[name] for name in wanted],
        [upstream[name] for name in DIFFERENTIABLE],
    )
    values = {name: t.detach() for name, t in found.items() if t is not None}
    return {**values, **dict(zip(wanted, grads, strict=True))}


def check(
    problem: Problem,
    impl: str,
    dtype: torch.dtype,
    memory_budget_mib: float | None = None,
    target: Tensor | None = None,
) -> None:
    """Holds every field and every gradient against float64.

    The tensors are multiples of 1/16, so that products are exact: a tie of logits is one for all.
    """
    tensors = exact(problem.tensors(dtype))
    tensors = tensors if target is None else {**tensors, "target": target}
    options, wide = problem.options, widened(tensors)
    upstream = upstreams(tensors, torch.float64 if dtype == torch.float64 else torch.float32)
    found = with_gradients(
        lambda leaves: ours(leaves, options, impl, memory_budget_mib), tensors, upstream
    )
    stock = with_gradients(lambda leaves: plain(leaves, options), tensors, upstream)
    other = with_gradients(lambda leaves: plain(leaves, options, True), tensors, upstream)
    truth = with_gradients(lambda leaves: plain(leaves, options), wide, widened(upstream))
    for name, value in found.items():
        if name == "is_top1":
            assert torch.equal(value, truth[name]), name
            continue
        if dtype == torch.float64:
            torch.testing.assert_close(value, truth[name], msg=name)
            continue
        results = value, farthest([stock[name], other[name]], truth[name]), truth[name]
        if name == "mean_logits":
            # Made from the log-sum-exp: it has the rounding of one.
            results = tuple(result + truth["lse"].to(result.dtype) for result in results)
        assert_close_as_torch(name, *results, dtype if name in NAMES else None)
