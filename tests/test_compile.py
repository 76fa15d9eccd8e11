"""`torch.compile(fullgraph=True)` takes the loss: one graph, any labels, any length."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from plain_head import NAMES, Problem, by_ours, results
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hf_fused_head import LinearCrossEntropyLoss, linear_cross_entropy_with_stats, ops

VARIANTS = [
    {},
    {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "logit_scale": 0.5},
    {"reduction": "none", "label_smoothing": 0.1, "z_loss": 0.01},
    {"num_items": torch.tensor(11)},
]


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch._dynamo.reset()


# The engine is opaque to the compiler, so one of them stands for all in most variants.
@pytest.mark.parametrize(
    ("impl", "options"), [*(("torch", options) for options in VARIANTS), ("auto", {})], ids=str
)
def test_one_graph_for_every_length_and_every_label(impl: str, options: dict) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda problem, tensors: by_ours(problem, impl)(tensors),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    compilations = set()
    for num_tokens, ignored in ((9, 0), (14, 3), (30, 29), (6, 6), (17, 1)):
        problem = Problem(shape=(num_tokens,), class_weight=True, ignored=ignored, options=options)
        tensors = problem.tensors(torch.float32)
        per_token = options.get("reduction") == "none"
        upstream = torch.randn(num_tokens) if per_token else torch.tensor(0.5)
        shared = Problem(class_weight=True, options=options)
        ours = results(lambda t, p=shared: compiled(p, t), tensors, upstream)
        eager = results(by_ours(problem, impl), tensors, upstream)
        for name, value in eager.items():
            torch.testing.assert_close(ours[name], value, equal_nan=True, msg=name)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


def test_a_python_count_of_items_compiles_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    module = LinearCrossEntropyLoss(impl="torch")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    tensors = Problem().tensors(torch.float32)
    call = tensors["hidden"].requires_grad_(), tensors["weight"], tensors["target"]
    compilations = set()
    for num_items in (5, 6, 7):
        assert torch.equal(compiled(*call, num_items=num_items), module(*call, num_items=num_items))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


@pytest.mark.parametrize(
    ("trainable", "reduction"),
    [((), "mean"), (("hidden",), "mean"), (("weight",), "none"), (NAMES, "none")],
)
def test_frozen_parts(trainable: tuple[str, ...], reduction: str) -> None:
    problem = Problem(options={"reduction": reduction})
    tensors = problem.tensors(torch.float32)
    for name in trainable:
        tensors[name].requires_grad_()
    loss = by_ours(problem, "torch")
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(tensors)
    assert torch.equal(compiled, loss(tensors))
    assert compiled.requires_grad == bool(trainable)
    if trainable:
        leaves = [tensors[name] for name in trainable]
        ours = torch.autograd.grad(compiled.sum(), leaves)
        eager = torch.autograd.grad(loss(tensors).sum(), leaves)
        torch.testing.assert_close(ours, eager)


def test_statistics_and_autocast() -> None:
    tensors = Problem().tensors(torch.float32)
    tensors["hidden"].requires_grad_()

    def stats(hidden: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return tuple(
                linear_cross_entropy_with_stats(hidden, tensors["weight"], tensors["target"])
            )

    compiled = torch.compile(stats, backend="aot_eager", fullgraph=True)(tensors["hidden"])
    for ours, eager in zip(compiled, stats(tensors["hidden"]), strict=True):
        torch.testing.assert_close(ours, eager)


def test_a_label_out_of_range_is_named_in_compiled_code_too() -> None:
    problem = Problem()
    tensors = problem.tensors(torch.float32)
    tensors["target"][1, 4] = 37
    compiled = torch.compile(by_ours(problem, "torch"), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"got 37 at position \(1, 4\)"):
        compiled(tensors)


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
        ops.stats_and_grads: (row, row, row, [True], [True], True, True, True),
        ops.row_grads: (*stats, row, row, row, row, [True], [False], True),
    }
    for operator, extra in calls.items():
        arguments = (*head_arguments(False), *extra)
        torch.library.opcheck(operator, arguments, test_utils=checks)


def test_the_operators_have_no_derivative_of_their_own() -> None:
    nll, *_ = ops.row_stats(*head_arguments(True), False, False, False)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        nll.sum().backward()


def test_the_first_call_of_a_fresh_interpreter_compiles() -> None:
    program = """
        import torch
        import hf_fused_head

        def loss(x, w, y):
            return hf_fused_head.linear_cross_entropy(x, w, y)

        x = torch.randn(7, 8, requires_grad=True)
        w = torch.randn(37, 8, requires_grad=True)
        y = torch.tensor([0, 36, -100, 5, -100, 2, 1])
        compiled = torch.compile(loss, fullgraph=True)(x, w, y)
        compiled.backward()
        grads = x.grad.clone(), w.grad.clone()
        x.grad = w.grad = None
        loss(x, w, y).backward()
        torch.testing.assert_close(grads, (x.grad, w.grad))
        torch.testing.assert_close(compiled, loss(x, w, y))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
