"""The operators of the engines as torch sees them: schemas, fakes, derivatives."""

from __future__ import annotations

import pytest
import torch
from plain_head import Problem

from hf_fused_head import ops
from hf_fused_head.engines.protocol import Needs
from hf_fused_head.objective import RowWeights, Upstream, Wanted
from hf_fused_head.ops import HeadArguments
from hf_fused_head.records import flatten


def head_arguments(needs_grad: bool) -> HeadArguments:
    tensors = Problem().tensors(torch.float32)
    hidden = tensors["hidden"].view(-1, 8).requires_grad_(needs_grad)
    head = [hidden], [tensors["weight"]], tensors["bias"], None, None, tensors["target"]
    return HeadArguments(*head, -100, 0.5, 3.0, 0.1, "torch", 2**20, "", True, False)


def test_the_operators_keep_their_contracts() -> None:
    # Gradients are ours to attach, so opcheck's test of registrations for autograd does not apply.
    checks = ("test_schema", "test_faketensor")
    row = torch.rand(21)
    head, wanted = head_arguments(False), Wanted(True, True, True)
    stats = ops.row_stats(head, wanted)
    needs = Needs([True], [True], True), Needs([True], [False], True)
    calls = {
        ops._row_stats: (head, wanted),
        ops._stats_and_grads: (head, RowWeights(row, row, row), needs[0], wanted),
        ops._row_grads: (head, stats, Upstream(row, row, row, row), needs[1]),
    }
    for operator, records in calls.items():
        torch.library.opcheck(operator, tuple(flatten(*records)), test_utils=checks)


def test_the_derivative_of_an_operator() -> None:
    """Exported programs have that of `row_stats`; gradients that are made beside have none."""
    head = head_arguments(True)
    (grad,) = torch.autograd.grad(ops.row_stats(head, Wanted()).nll.sum(), head.inputs)
    assert grad.shape == head.inputs[0].shape
    weights, needs = RowWeights(torch.rand(21), None, None), Needs([True], [True], True)
    stats, _ = ops.stats_and_grads(head, weights, needs, Wanted())
    with pytest.raises(RuntimeError, match="no autograd formula"):
        stats.nll.sum().backward()
