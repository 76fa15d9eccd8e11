"""`torch.func`, dual tensors and batches of gradients: torch's own values, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_head import NAMES, Problem, by_ours
from torch import Tensor, func
from torch.utils import _pytree as pytree
from transform_cases import CASES, PROBLEMS, SIZE, Inputs, Loss, compare, jvp, only

from hf_fused_head import linear_cross_entropy_with_stats, ops

IMPLS = ("torch", "reference", "triton")


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_first_derivatives_and_batches_are_torchs(
    case: Callable[[Loss, Inputs], Any], problem: Problem, impl: str
) -> None:
    compare(case, problem, impl, Inputs(problem, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["jvp", "grad", "vmap"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision(dtype: torch.dtype, name: str, reduction: str) -> None:
    problem = PROBLEMS[reduction]
    compare(CASES[name], problem, "torch", Inputs(problem, dtype))


@pytest.mark.parametrize("name", ["jvp", "grad", "vmap of grad", "a batch of gradients"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(("shape", "ignored"), [((0,), 0), ((1,), 0), ((4,), 4)], ids=str)
def test_no_token_one_token_no_label(
    name: str, reduction: str, shape: tuple[int, ...], ignored: int
) -> None:
    problem = Problem(shape=shape, ignored=ignored, options={"reduction": reduction})
    compare(CASES[name], problem, "torch", Inputs(problem, torch.float32))


def test_a_batch_of_batches_of_gradients_is_refused() -> None:
    inputs = Inputs(PROBLEMS["none"], torch.float32)
    loss = only(inputs.loss(by_ours(PROBLEMS["none"], "torch")), inputs, 0)
    value = inputs.values[0].clone().requires_grad_()
    made = loss(value)

    def backward(upstream: Tensor) -> Tensor:
        return torch.autograd.grad(made, value, upstream, retain_graph=True)[0]

    with pytest.raises(NotImplementedError, match="`is_grads_batched` must not be True inside"):
        torch._vmap_internals._vmap(torch._vmap_internals._vmap(backward))(
            torch.ones(2, 2, *made.shape)
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_sharded_head_has_no_forward_mode(reduction: str) -> None:
    problem = Problem(options={"reduction": reduction})
    inputs = Inputs(problem, torch.float32)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = problem.with_options(process_group=dist.group.WORLD)
        loss = inputs.loss(by_ours(group, "torch"))
        compare_to = inputs.loss(by_ours(problem, "torch"))
        for case in (CASES["grad"], CASES["vmap"]):
            sharded, whole = case(loss, inputs), case(compare_to, inputs)
            for got, expected in zip(*map(pytree.tree_leaves, (sharded, whole)), strict=True):
                assert torch.equal(got, expected)
        with pytest.raises(NotImplementedError, match="`process_group` must be None in forward"):
            jvp(loss, inputs)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("case", ["grad", "jvp"])
def test_a_transform_makes_no_gradient_of_a_frozen_tensor(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs, operator = [], ops.stats_and_grads
    monkeypatch.setattr(
        ops, "stats_and_grads", lambda *args: needs.append(args[2]) or operator(*args)
    )
    inputs = Inputs(PROBLEMS["mean"], torch.float32)
    loss = only(inputs.loss(by_ours(PROBLEMS["mean"], "torch")), inputs, 0)
    if case == "grad":
        func.grad(loss)(inputs.values[0])
    else:
        func.jvp(loss, inputs.values[:1], inputs.tangents[:1])
    assert needs == [([True], [False], False)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_come_with_a_transform(reduction: str) -> None:
    inputs = Inputs(Problem(options={"reduction": reduction}), torch.float32)

    def stats(hidden: Tensor, weight: Tensor) -> tuple[Any, ...]:
        return tuple(
            linear_cross_entropy_with_stats(
                hidden, weight, inputs.rest["target"], reduction=reduction
            )
        )

    hidden, weight = inputs.batches[:2]
    batched = func.vmap(stats)(hidden, weight)
    for index in range(SIZE):
        for got, expected in zip(batched, stats(hidden[index], weight[index]), strict=True):
            assert torch.equal(got[index], expected)


def test_class_weights_have_no_tangent() -> None:
    problem = PROBLEMS["mean_everything"]
    inputs = Inputs(problem, torch.float32)
    loss = by_ours(problem, "torch")

    def of_class_weight(weight: Tensor) -> Tensor:
        values = dict(zip(NAMES, inputs.values, strict=True))
        return loss({**values, **inputs.rest, "class_weight": weight})

    weight = inputs.rest["class_weight"]
    for derivative in (
        lambda: func.jvp(of_class_weight, (weight,), (weight,)),
        lambda: func.grad(lambda w: func.vmap(of_class_weight)(w[None]).sum())(weight),
    ):
        with pytest.raises(NotImplementedError, match="`weight` must not require grad"):
            derivative()


COMPILED = ("grad", "jvp", "vmap of grad", "vmap, then backward", "dual tensors")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", COMPILED)
def test_the_compiler_leaves_transforms_to_eager_mode(name: str, reduction: str) -> None:
    torch._dynamo.reset()
    problem = PROBLEMS[reduction]

    def compiled(loss: Loss, inputs: Inputs) -> Any:
        return torch.compile(lambda: CASES[name](loss, inputs))()

    inputs = Inputs(problem, torch.float32)
    ours = pytree.tree_leaves(compiled(inputs.loss(by_ours(problem, "torch")), inputs))
    eager = pytree.tree_leaves(CASES[name](inputs.loss(by_ours(problem, "torch")), inputs))
    for got, expected in zip(ours, eager, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap"])
def test_one_graph_cannot_hold_a_transform(name: str) -> None:
    torch._dynamo.reset()
    problem = PROBLEMS["mean"]
    inputs = Inputs(problem, torch.float32)
    loss = inputs.loss(by_ours(problem, "torch"))
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"torch\.compile without fullgraph=True"
    ):
        torch.compile(lambda: CASES[name](loss, inputs), fullgraph=True)()


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "dual tensors"])
def test_a_transform_of_a_compiled_loss(name: str) -> None:
    torch._dynamo.reset()
    problem = PROBLEMS["mean"]
    inputs = Inputs(problem, torch.float32)
    loss = inputs.loss(by_ours(problem, "torch"))
    ours = pytree.tree_leaves(CASES[name](torch.compile(loss), inputs))
    for got, expected in zip(ours, pytree.tree_leaves(CASES[name](loss, inputs)), strict=True):
        torch.testing.assert_close(got, expected)
