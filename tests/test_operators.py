"""The operators of the engines as torch sees them: schemas, fakes, derivatives."""

from __future__ import annotations

import pytest
import torch
from plain_head import Problem

from hf_fused_head import ops


def head_arguments(needs_grad: bool) -> tuple:
    tensors = Problem().tensors(torch.float32)
    hidden = tensors["hidden"].view(-1, 8).requires_grad_(needs_grad)
    head = [hidden], [tensors["weight"]], tensors["bias"], None, tensors["target"]
    return *head, -100, 0.5, 3.0, "torch", 2**20, "", True


def test_the_operators_keep_their_contracts() -> None:
    # No autograd formula is registered on purpose, so that test of opcheck does not apply.
    checks = ("test_schema", "test_faketensor")
    row = torch.rand(21)
    stats = ops.row_stats(*head_arguments(False), True, True, True)
    calls = {
        ops.row_stats: (True, True, True),
        ops.stats_and_grads: (row, row, row, [True], [True], True, True, True, 0.1),
        ops.row_grads: (*stats, row, row, row, row, [True], [False], True),
    }
    for operator, extra in calls.items():
        arguments = (*head_arguments(False), *extra)
        torch.library.opcheck(operator, arguments, test_utils=checks)


def test_the_operators_have_no_derivative_of_their_own() -> None:
    nll, *_ = ops.row_stats(*head_arguments(True), False, False, False)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        nll.sum().backward()
