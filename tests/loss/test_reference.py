"""The reference's spelled-out gradients are those of autograd, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hf_fused_head.engines import reference
from hf_fused_head.engines.protocol import Needs, Operands
from hf_fused_head.objective import RowStats, RowWeights, Upstream, Wanted

SOFTCAPS = (None, 2.0)
TERMS = ("nll", "lse", "smooth", "entropy")


def leaves(pairs: int, bias: bool) -> dict[str, Tensor]:
    made = {f"input{i}": torch.randn(6, 5 - i) for i in range(pairs)}
    made |= {f"weight{i}": torch.randn(11, 5 - i) for i in range(pairs)}
    if bias:
        made["bias"] = torch.randn(11)
    return {name: value.double().requires_grad_() for name, value in made.items()}


def head(made: dict[str, Tensor], softcap: float | None, class_weight: bool) -> Operands:
    pick = [[t for name, t in made.items() if name.startswith(kind)] for kind in ("in", "we")]
    weight = torch.rand(11).double() if class_weight else None
    return Operands(pick[0], pick[1], made.get("bias"), weight, 0.7, softcap)


def detached(operands: Operands) -> Operands:
    bias = None if operands.bias is None else operands.bias.detach()
    return operands._replace(
        inputs=[t.detach() for t in operands.inputs],
        weights=[t.detach() for t in operands.weights],
        bias=bias,
    )


def plain_rows(operands: Operands, labels: Tensor) -> dict[str, Tensor]:
    """The statistics by torch's own differentiable operations."""
    logits = sum(x @ w.T for x, w in zip(operands.inputs, operands.weights, strict=True))
    logits = logits if operands.bias is None else logits + operands.bias
    logits = logits * operands.logit_scale
    if operands.softcap is not None:
        logits = operands.softcap * torch.tanh(logits / operands.softcap)
    log_probs = logits.log_softmax(dim=1)
    weight = torch.ones(11).double() if operands.class_weight is None else operands.class_weight
    return {
        "nll": -log_probs.gather(1, labels[:, None])[:, 0],
        "lse": logits.logsumexp(dim=1),
        "smooth": -(log_probs * weight).mean(dim=1),
        "entropy": -(log_probs.exp() * log_probs).sum(dim=1),
        "correct": logits.argmax(dim=1) == labels,
    }


def needs_of(operands: Operands) -> Needs:
    pairs = len(operands.inputs)
    return Needs([True] * pairs, [True] * pairs, operands.bias is not None)


@pytest.mark.parametrize(
    ("pairs", "bias", "softcap", "class_weight"),
    list(itertools.product((1, 2), (False, True), SOFTCAPS, (False, True))),
)
def test_statistics_and_every_gradient(
    pairs: int, bias: bool, softcap: float | None, class_weight: bool
) -> None:
    made, labels = leaves(pairs, bias), torch.tensor([0, 10, 3, 3, 7, 1])
    operands = head(made, softcap, class_weight)
    plain = plain_rows(operands, labels)
    stats = reference.row_stats(detached(operands), labels, Wanted(True, True, True))
    for name, value in plain.items():
        torch.testing.assert_close(getattr(stats, name), value.detach(), msg=name)
    upstream = {name: torch.randn(6).double() for name in TERMS}
    for chosen in (*((name,) for name in TERMS), TERMS):
        objective = sum((upstream[name] * plain[name]).sum() for name in chosen)
        truth = torch.autograd.grad(objective, list(made.values()), retain_graph=True)
        zero = torch.zeros(6).double()
        vectors = {name: upstream[name] if name in chosen else None for name in TERMS}
        vectors["nll"] = zero if vectors["nll"] is None else vectors["nll"]
        grads = reference.row_grads(
            detached(operands), labels, stats, Upstream(**vectors), needs_of(operands)
        )
        torch.testing.assert_close([g for g in grads if g.numel()], list(truth))


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_the_scalar_objective_is_the_row_objective_with_known_weights(
    softcap: float | None,
) -> None:
    made, labels = leaves(1, True), torch.tensor([0, 10, 3, 3, 7, 1])
    operands = head(made, softcap, True)
    plain = plain_rows(operands, labels)
    a, b, c = (torch.rand(6).double() for _ in range(3))
    objective = (a * plain["nll"] + b * plain["smooth"] + c * plain["lse"] ** 2).sum()
    truth = torch.autograd.grad(objective, list(made.values()))
    needs, wanted = needs_of(operands), Wanted(True, True, True)
    stats, grads = reference.stats_and_grads(
        detached(operands), labels, RowWeights(a, b, c), needs, wanted
    )
    torch.testing.assert_close(grads, list(truth))
    torch.testing.assert_close(stats.entropy, plain["entropy"].detach())


def test_a_wrong_fact_is_noticed() -> None:
    made, labels = leaves(1, False), torch.tensor([0, 10, 3, 3, 7, 1])
    right, wrong = head(made, 2.0, False), head(made, 2.001, False)
    truth = plain_rows(right, labels)["nll"].detach()
    stats = reference.row_stats(detached(wrong), labels, Wanted())
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(stats.nll, truth)


def test_only_what_is_asked_for_is_made() -> None:
    made, labels = leaves(1, True), torch.tensor([0, 10, 3, 3, 7, 1])
    operands = detached(head(made, None, False))
    stats = reference.row_stats(operands, labels, Wanted())
    assert isinstance(stats, RowStats)
    assert [len(value) for value in stats[:5]] == [6, 6, 0, 0, 0]
    needs = Needs([False], [True], False)
    zero = torch.zeros(6).double()
    grads = reference.row_grads(operands, labels, stats, Upstream(zero), needs)
    assert [grad.numel() > 0 for grad in grads] == [False, True, False]
