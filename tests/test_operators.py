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
    head = [hidden], [tensors["weight"]], tensors["bias"], None, tensors["target"]
    return HeadArguments(*head, -100, 0.5, 3.0, 0.1, "torch", 2**20, "", True)


def test_the_operators_keep_their_contracts() -> None:
    # No autograd formula is registered on purpose, so that test of opcheck does not apply.
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


def test_the_operators_have_no_derivative_of_their_own() -> None:
    nll = ops.row_stats(head_arguments(True), Wanted()).nll
    with pytest.raises(RuntimeError, match="no autograd formula"):
        nll.sum().backward()
