"""How the loss meets autograd: retained graphs, upstreams, no second derivative, no mutation."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_close_as_torch
from plain_head import NAMES, Problem, by_ours, by_plain, results, widened
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fused_head import linear_cross_entropy, linear_cross_entropy_with_stats

IMPLS = ("torch", "reference")
REDUCTIONS = ("mean", "none")


def trainable(problem: Problem, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = problem.tensors(dtype)
    for name in NAMES:
        tensors[name].requires_grad_()
    return tensors


def upstream_of(problem: Problem, value: float = 1.0) -> Tensor:
    if problem.options["reduction"] == "none":
        return torch.randn(problem.shape)
    return torch.tensor(value)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [1.0, 0.5])
def test_a_retained_graph_gives_the_same_gradients_twice(
    impl: str, reduction: str, dtype: torch.dtype, value: float
) -> None:
    problem = Problem(options={"reduction": reduction})
    tensors = trainable(problem, dtype)
    loss, upstream = by_ours(problem, impl)(tensors), upstream_of(problem, value)
    leaves = [tensors[name] for name in NAMES]
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    third = torch.autograd.grad(loss, leaves, upstream)
    for one, *others in zip(kept, second, third, strict=True):
        assert all(torch.equal(one, other) for other in others)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves, upstream)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_backward_accumulates_once(reduction: str) -> None:
    problem = Problem(options={"reduction": reduction})
    tensors = trainable(problem)
    loss, upstream = by_ours(problem, "torch")(tensors), upstream_of(problem, 0.5)
    loss.backward(upstream, retain_graph=True)
    once = {name: tensors[name].grad.clone() for name in NAMES}
    loss.backward(upstream)
    for name in NAMES:
        assert torch.equal(tensors[name].grad, 2 * once[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_upstream_scalar_scales_every_gradient(impl: str) -> None:
    problem = Problem()
    tensors = problem.tensors(torch.float32)
    for value in (0.0, 1.0, -3.0, 2.0**-20):
        ours = results(by_ours(problem, impl), tensors, torch.tensor(value))
        plain = results(by_plain(problem), tensors, torch.tensor(value))
        truth = results(by_plain(problem), widened(tensors), torch.tensor(value).double())
        for name in NAMES:
            assert_close_as_torch(name, ours[name], plain[name], truth[name])


def test_float16_gradients_survive_a_loss_scale() -> None:
    # Unscaled, these gradients are below the smallest float16: they must wait for the scale.
    problem = Problem(options={"num_items": 10**9})
    tensors = problem.tensors(torch.float16)
    scale = torch.tensor(1e9)
    ours = results(by_ours(problem, "torch"), tensors, scale)
    plain = results(by_plain(Problem(options={"reduction": "sum"})), tensors, torch.tensor(1.0))
    truth = results(by_plain(problem), widened(tensors), scale.double())
    for name in NAMES:
        assert ours[name].abs().max() > 0
        assert_close_as_torch(name, ours[name], plain[name], truth[name])


def test_every_token_gets_its_own_upstream() -> None:
    problem = Problem(shape=(6,), ignored=0, options={"reduction": "none"})
    tensors = trainable(problem)
    loss = by_ours(problem, "torch")(tensors)
    for index in range(6):
        one = torch.zeros(6).index_fill(0, torch.tensor(index), 1.0)
        (grad,) = torch.autograd.grad(loss, tensors["hidden"], one, retain_graph=True)
        rows = grad.abs().sum(dim=1) > 0
        assert rows.tolist() == [row == index for row in range(6)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_derivative_is_refused_where_it_is_taken(impl: str, reduction: str) -> None:
    problem = Problem(options={"reduction": reduction})
    tensors = trainable(problem)
    leaves = [tensors[name] for name in NAMES]
    loss = by_ours(problem, impl)(tensors).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(map(torch.equal, first, again))
    penalty = again[0].square().sum()
    for leaf in leaves:
        with pytest.raises(NotImplementedError, match="must be differentiated once"):
            torch.autograd.grad(loss + penalty, leaf, retain_graph=True, allow_unused=True)
    with pytest.raises(NotImplementedError, match="must be differentiated once"):
        (loss + penalty).backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(impl: str, reduction: str) -> None:
    problem = Problem(
        shape=(5,),
        hidden_size=3,
        vocab_size=7,
        ignored=1,
        class_weight=True,
        options={
            "reduction": reduction,
            "label_smoothing": 0.1,
            "softcap": 2.0,
            "z_loss": 0.1,
            "logit_scale": 0.5,
        },
    )
    tensors = trainable(problem, torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return by_ours(problem, impl)({**tensors, "hidden": hidden, "weight": weight, "bias": bias})

    assert torch.autograd.gradcheck(loss, [tensors[name] for name in NAMES])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_callers_tensors_are_never_written_to(impl: str, reduction: str) -> None:
    problem = Problem(class_weight=True, options={"reduction": reduction, "softcap": 2.0})
    tensors = trainable(problem)
    before = {name: (t.detach().clone(), t._version) for name, t in tensors.items()}
    upstream = upstream_of(problem, 0.5)
    kept = upstream.clone()
    by_ours(problem, impl)(tensors).backward(upstream)
    for name, (value, version) in before.items():
        assert torch.equal(tensors[name].detach(), value)
        assert tensors[name]._version == version
    assert torch.equal(upstream, kept)


def test_editing_a_result_cannot_corrupt_a_gradient_silently() -> None:
    problem = Problem(options={"reduction": "none"})
    tensors = trainable(problem)
    found = linear_cross_entropy_with_stats(
        tensors["hidden"], tensors["weight"], tensors["target"], reduction="none"
    )
    plain = torch.autograd.grad(found.loss.sum(), tensors["hidden"], retain_graph=True)[0].clone()
    found.nll.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(found.loss.sum(), tensors["hidden"], retain_graph=True)
    scalar = linear_cross_entropy_with_stats(
        tensors["hidden"], tensors["weight"], tensors["target"], reduction="sum"
    )
    scalar.nll.zero_()
    scalar.lse.zero_()
    scalar.loss.backward()
    assert_close_as_torch("hidden", tensors["hidden"].grad, plain, plain.double())


def test_editing_a_retained_gradient_cannot_corrupt_the_next_silently() -> None:
    problem = Problem()
    tensors = trainable(problem)
    loss = by_ours(problem, "torch")(tensors)
    (grad,) = torch.autograd.grad(loss, tensors["weight"], retain_graph=True)
    grad.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, tensors["weight"])


class Recorder(TorchDispatchMode):
    """Names of the operators of a pass that make a tensor of the given shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and tuple(result.shape) == self.shape:
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize(("value", "passes"), [(1.0, []), (0.5, ["mul_"])], ids=["unit", "other"])
def test_backward_makes_no_pass_that_can_be_spared(value: float, passes: list[str]) -> None:
    problem = Problem()
    tensors = trainable(problem)
    loss = by_ours(problem, "torch")(tensors)
    with Recorder((37, 8)) as recorder:
        loss.backward(torch.tensor(value))
    assert [name for name in recorder.names if name != "detach"] == passes


def test_without_torchs_word_on_the_graph_gradients_are_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    problem = Problem()
    tensors = trainable(problem)
    loss = by_ours(problem, "torch")(tensors)
    with Recorder((37, 8)) as recorder:
        loss.backward(torch.tensor(0.5))
    assert [name for name in recorder.names if name != "detach"] == ["mul"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses_can_be_added_and_part_of_a_larger_graph(reduction: str) -> None:
    problem = Problem(options={"reduction": reduction})
    tensors = problem.tensors(torch.float32)

    def twice(loss):
        def value(t: dict[str, Tensor]) -> Tensor:
            more = {**t, "hidden": t["hidden"].tanh()}
            return (loss(t) * 2 + loss(more) ** 2).sum()

        return value

    ours = results(twice(by_ours(problem, "torch")), tensors, None)
    plain = results(twice(by_plain(problem)), tensors, None)
    truth = results(twice(by_plain(problem)), widened(tensors), None)
    for name, value in ours.items():
        assert_close_as_torch(name, value, plain[name], truth[name])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_checkpointing_the_head_gives_the_same_gradients(reduction: str) -> None:
    problem = Problem(options={"reduction": reduction})
    tensors = trainable(problem)

    def loss(hidden: Tensor) -> Tensor:
        return by_ours(problem, "torch")({**tensors, "hidden": hidden}).sum()

    direct = torch.autograd.grad(loss(tensors["hidden"]), tensors["hidden"])[0]
    again = torch.utils.checkpoint.checkpoint(loss, tensors["hidden"], use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, tensors["hidden"])[0], direct)


def test_a_loss_without_trainable_tensors_has_no_graph() -> None:
    tensors = Problem().tensors(torch.float32)
    loss = linear_cross_entropy(tensors["hidden"], tensors["weight"], tensors["target"])
    assert not loss.requires_grad
