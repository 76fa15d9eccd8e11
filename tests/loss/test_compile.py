"""`torch.compile(fullgraph=True)` takes the loss: one graph, any labels, any length."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from plain_head import NAMES, Problem, by_ours, results
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hf_fused_head import LinearCrossEntropyLoss, linear_cross_entropy_with_stats

VARIANTS = [
    {},
    {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "logit_scale": 0.5},
    {"reduction": "none", "label_smoothing": 0.1, "z_loss": 0.01},
    {"num_items": torch.tensor(11)},
]

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def tensors_of(problem: Problem, device: str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in problem.tensors(torch.float32).items()}


# The engine is opaque to the compiler, so one of them stands for all in most variants.
@pytest.mark.parametrize(
    ("impl", "options"), [*(("torch", options) for options in VARIANTS), ("auto", {})], ids=str
)
def test_one_graph_for_every_length_and_every_label(
    impl: str, options: dict, backend: str, device: str
) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(
        lambda problem, tensors: by_ours(problem, impl)(tensors),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    compilations = set()
    for num_tokens, ignored in ((9, 0), (14, 3), (30, 29), (6, 6), (17, 1)):
        problem = Problem(shape=(num_tokens,), class_weight=True, ignored=ignored, options=options)
        tensors = tensors_of(problem, device)
        per_token = options.get("reduction") == "none"
        upstream = (torch.randn(num_tokens) if per_token else torch.tensor(0.5)).to(device)
        shared = Problem(class_weight=True, options=options)
        ours = results(lambda t, p=shared: compiled(p, t), tensors, upstream)
        eager = results(by_ours(problem, impl), tensors, upstream)
        for name, value in eager.items():
            torch.testing.assert_close(ours[name], value, equal_nan=True, msg=name)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


@pytest.mark.parametrize("kind", [int, np.int64], ids=lambda kind: kind.__name__)
def test_a_count_of_items_that_is_no_tensor_compiles_once(
    kind: type, backend: str, device: str
) -> None:
    counter = CompileCounterWithBackend(backend)
    module = LinearCrossEntropyLoss(impl="torch")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    tensors = tensors_of(Problem(), device)
    call = tensors["hidden"].requires_grad_(), tensors["weight"], tensors["target"]
    compilations = set()
    for num_items in (5, 6, 7):
        losses = [each(*call, num_items=kind(num_items)) for each in (compiled, module)]
        torch.testing.assert_close(*losses)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


@pytest.mark.parametrize(
    ("trainable", "reduction"),
    [((), "mean"), (("hidden",), "mean"), (("weight",), "none"), (NAMES, "none")],
)
def test_frozen_parts(
    trainable: tuple[str, ...], reduction: str, backend: str, device: str
) -> None:
    problem = Problem(options={"reduction": reduction})
    tensors = tensors_of(problem, device)
    for name in trainable:
        tensors[name].requires_grad_()
    loss = by_ours(problem, "torch")
    compiled = torch.compile(loss, backend=backend, fullgraph=True)(tensors)
    torch.testing.assert_close(compiled, loss(tensors))
    assert compiled.requires_grad == bool(trainable)
    if trainable:
        leaves = [tensors[name] for name in trainable]
        ours = torch.autograd.grad(compiled.sum(), leaves)
        eager = torch.autograd.grad(loss(tensors).sum(), leaves)
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_and_autocast(reduction: str, backend: str, device: str) -> None:
    tensors = tensors_of(Problem(), device)
    tensors["hidden"].requires_grad_()

    def stats(hidden: Tensor) -> tuple[Tensor | None, ...]:
        given = hidden, tensors["weight"], tensors["target"]
        with torch.autocast(device, dtype=torch.bfloat16):
            return tuple(linear_cross_entropy_with_stats(*given, reduction=reduction))

    compiled = torch.compile(stats, backend=backend, fullgraph=True)(tensors["hidden"])
    for ours, eager in zip(compiled, stats(tensors["hidden"]), strict=True):
        assert ours.requires_grad == eager.requires_grad
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("options", [{}, {"num_items": 1}, {"reduction": "none"}], ids=str)
def test_a_detached_copy_leaves_the_loss_its_gradient(
    options: dict, backend: str, device: str
) -> None:
    """What a step returns to be logged; inductor makes one output of two copies of a value."""
    problem = Problem(options=options)
    tensors = tensors_of(problem, device)

    def step(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss = by_ours(problem, "auto")(tensors)
        return loss, loss.detach().clone()

    tensors["hidden"].requires_grad_()
    loss, logged = torch.compile(step, backend=backend, fullgraph=True)(tensors)
    assert torch.equal(loss, logged) and not logged.requires_grad
    assert loss.data_ptr() != logged.data_ptr()
    (ours,) = torch.autograd.grad(loss.sum(), tensors["hidden"])
    (eager,) = torch.autograd.grad(step(tensors)[0].sum(), tensors["hidden"])
    torch.testing.assert_close(ours, eager)


def test_a_label_out_of_range_is_named_in_compiled_code_too(backend: str, device: str) -> None:
    problem = Problem()
    tensors = tensors_of(problem, device)
    tensors["target"][1, 4] = 37
    compiled = torch.compile(by_ours(problem, "torch"), backend=backend, fullgraph=True)
    with pytest.raises(ValueError, match=r"got 37 at position \(1, 4\)"):
        compiled(tensors)


def test_the_first_call_of_a_fresh_interpreter_compiles(device: str) -> None:
    program = f"""
        import torch
        import hf_fused_head

        torch.set_default_device("{device}")

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
