"""`torch.func`, dual tensors and batches of gradients: torch's own values, or an error.

Every case is a function of the loss and of tensors. It runs on the fused loss and on F.linear with
F.cross_entropy in the same dtype, and is compared with the latter in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from causal_loss import in_float64
from oracle import assert_close_as_torch
from plain_head import NAMES, Problem, by_ours, by_plain, widened
from tiny_models import batch, build
from torch import Tensor, func, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from hf_fused_head import apply_patch, linear_cross_entropy_with_stats, ops

IMPLS = ("torch", "reference", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Problem(shape=(5,), hidden_size=4, vocab_size=11, ignored=1)
PROBLEMS = {
    "mean": SMALL.with_options(softcap=2.0),
    "mean_everything": Problem(
        shape=(5,),
        hidden_size=4,
        vocab_size=11,
        ignored=1,
        class_weight=True,
        options={"label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.5, "num_items": 7},
    ),
    "sum": SMALL.with_options(reduction="sum", label_smoothing=0.2),
    "none": SMALL.with_options(reduction="none", softcap=2.0, label_smoothing=0.1, z_loss=0.01),
    "none_without_bias": Problem(
        shape=(2, 3), hidden_size=4, vocab_size=11, bias=False, options={"reduction": "none"}
    ),
}
SIZE = 3  # of every batch
Loss = Callable[..., Tensor]


class Inputs:
    """Tensors of a problem, tangents and batches of them; of hidden, weight and maybe bias."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        tensors = {name: t.to(DEVICE) for name, t in problem.tensors(dtype).items()}
        self.rest = {name: t for name, t in tensors.items() if name not in NAMES}
        self.values = tuple(tensors[name] for name in NAMES if name in tensors)
        self.tangents = self._like(())
        self.batches = self._like((SIZE,))

    def _like(self, leading: tuple[int, ...]) -> tuple[Tensor, ...]:
        source = torch.Generator().manual_seed(len(leading))
        made = [torch.randn((*leading, *t.shape), generator=source) for t in self.values]
        return tuple(t.to(value) for t, value in zip(made, self.values, strict=True))

    def widened(self) -> Inputs:
        """The same numbers in float64."""
        wide = copy.copy(self)
        for name in ("values", "tangents", "batches"):
            setattr(wide, name, tuple(t.double() for t in getattr(self, name)))
        wide.rest = widened(self.rest)
        return wide

    def loss(self, of: Callable[[dict[str, Tensor]], Tensor]) -> Loss:
        """`of` as a function of the values."""
        return lambda *values: of({**dict(zip(NAMES, values, strict=False)), **self.rest})


def leaves(values: tuple[Tensor, ...]) -> list[Tensor]:
    return [value.clone().requires_grad_() for value in values]


def summed(loss: Loss) -> Loss:
    return lambda *values: loss(*values).sum()


def only(loss: Loss, inputs: Inputs, index: int) -> Loss:
    """The loss as a function of one value."""
    values = inputs.values
    return lambda value: loss(*values[:index], value, *values[index + 1 :])


def everything(inputs: Inputs) -> tuple[int, ...]:
    return tuple(range(len(inputs.values)))


def by_dual_tensors(trained: bool) -> Callable[[Loss, Inputs], Any]:
    def case(loss: Loss, inputs: Inputs) -> Any:
        with forward_ad.dual_level():
            pairs = zip(inputs.values, inputs.tangents, strict=True)
            duals = [forward_ad.make_dual(v.clone().requires_grad_(trained), t) for v, t in pairs]
            return [value.detach() for value in forward_ad.unpack_dual(loss(*duals))]

    return case


def by_a_batch_of_gradients(loss: Loss, inputs: Inputs) -> Any:
    values = leaves(inputs.values)
    made = loss(*values)
    upstream = torch.arange(1.0, SIZE + 1, dtype=made.dtype, device=DEVICE)
    upstream = upstream.view(SIZE, *[1] * made.dim()).expand(SIZE, *made.shape)
    return torch.autograd.grad(made, values, upstream, is_grads_batched=True)


def by_backward_of_a_batch(loss: Loss, inputs: Inputs) -> Any:
    values = leaves(inputs.batches)
    return torch.autograd.grad(func.vmap(loss)(*values).sum(), values)


def by_create_graph(loss: Loss, inputs: Inputs) -> Any:
    values = leaves(inputs.values)
    return torch.autograd.grad(loss(*values).sum(), values, create_graph=True)


def without_grad(case: Callable[[Loss, Inputs], Any]) -> Callable[[Loss, Inputs], Any]:
    def quiet(loss: Loss, inputs: Inputs) -> Any:
        with torch.no_grad():
            return case(loss, inputs)

    return quiet


def jvp(loss: Loss, inputs: Inputs) -> Any:
    return func.jvp(loss, inputs.values, inputs.tangents)


def jvp_of(index: int) -> Callable[[Loss, Inputs], Any]:
    return lambda loss, inputs: func.jvp(
        only(loss, inputs, index), (inputs.values[index],), (inputs.tangents[index],)
    )


CASES: dict[str, Callable[[Loss, Inputs], Any]] = {
    "jvp": jvp,
    "jvp without grad": without_grad(jvp),
    "jvp of hidden": jvp_of(0),
    "jvp of weight": jvp_of(1),
    "jacfwd": lambda loss, inputs: func.jacfwd(loss, everything(inputs))(*inputs.values),
    "linearize": lambda loss, inputs: func.linearize(loss, *inputs.values)[1](*inputs.tangents),
    "dual tensors": by_dual_tensors(True),
    "dual tensors, frozen": by_dual_tensors(False),
    "dual tensors without grad": without_grad(by_dual_tensors(True)),
    "grad": lambda loss, inputs: func.grad(summed(loss), everything(inputs))(*inputs.values),
    "grad_and_value": lambda loss, inputs: func.grad_and_value(summed(loss))(*inputs.values),
    "jacrev": lambda loss, inputs: func.jacrev(loss, everything(inputs))(*inputs.values),
    "vjp": lambda loss, inputs: func.vjp(summed(loss), *inputs.values)[1](
        torch.tensor(2.0, dtype=inputs.values[0].dtype, device=DEVICE)
    ),
    "vmap": lambda loss, inputs: func.vmap(loss)(*inputs.batches),
    "vmap of a shared head": lambda loss, inputs: func.vmap(only(loss, inputs, 0))(
        inputs.batches[0]
    ),
    "vmap of a shared input": lambda loss, inputs: func.vmap(only(loss, inputs, 1), 2)(
        inputs.batches[1].movedim(0, 2)
    ),
    "vmap of vmap": lambda loss, inputs: func.vmap(
        lambda hidden: func.vmap(lambda weight: loss(hidden, weight, *inputs.values[2:]))(
            inputs.batches[1]
        )
    )(inputs.batches[0]),
    "vmap of grad": lambda loss, inputs: func.vmap(func.grad(summed(loss), everything(inputs)))(
        *inputs.batches
    ),
    "vmap of jvp": lambda loss, inputs: func.vmap(
        lambda hidden: func.jvp(only(loss, inputs, 0), (hidden,), (inputs.tangents[0],))
    )(inputs.batches[0]),
    "grad of vmap": lambda loss, inputs: func.grad(
        lambda *values: func.vmap(loss)(*values).sum(), everything(inputs)
    )(*inputs.batches),
    "jvp of vmap": lambda loss, inputs: func.jvp(
        func.vmap(loss), inputs.batches, tuple(t.sin() for t in inputs.batches)
    ),
    "vmap, then backward": by_backward_of_a_batch,
    "a batch of gradients": by_a_batch_of_gradients,
    "create_graph": by_create_graph,
    "jacobian": lambda loss, inputs: torch.autograd.functional.jacobian(
        loss, inputs.values, vectorize=True
    ),
    "jacobian in forward mode": lambda loss, inputs: torch.autograd.functional.jacobian(
        loss, inputs.values, vectorize=True, strategy="forward-mode"
    ),
}


def compare(
    case: Callable[[Loss, Inputs], Any], problem: Problem, impl: str, inputs: Inputs
) -> None:
    """Fails unless the fused loss is as near to float64 as torch's own loss is."""
    ours = pytree.tree_leaves(case(inputs.loss(by_ours(problem, impl)), inputs))
    plain = pytree.tree_leaves(case(inputs.loss(by_plain(problem)), inputs))
    wide = inputs.widened()
    truth = pytree.tree_leaves(case(wide.loss(by_plain(problem)), wide))
    for index, (got, expected, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        assert_close_as_torch(f"result {index}", got, expected, exact)


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


def curvature(loss: Loss, inputs: Inputs) -> tuple[Loss, Tensor, Tensor]:
    """The loss as a function of the hidden states, these and their tangent."""
    return summed(only(loss, inputs, 0)), inputs.values[0], inputs.tangents[0]


def gradient_penalty(loss: Loss, inputs: Inputs) -> Any:
    hidden, weight, *rest = leaves(inputs.values)
    made = loss(hidden, weight, *rest).sum()
    (grad,) = torch.autograd.grad(made, hidden, create_graph=True)
    return torch.autograd.grad(made + grad.square().sum(), weight, allow_unused=True)


def penalty_of_a_batch(loss: Loss, inputs: Inputs) -> Any:
    values = leaves(inputs.batches)
    made = func.vmap(loss)(*values).sum()
    (grad,) = torch.autograd.grad(made, values[0], create_graph=True)
    (made + grad.square().sum()).backward()


def backward_of_dual_tensors(loss: Loss, inputs: Inputs) -> Any:
    with forward_ad.dual_level():
        leaf = inputs.values[0].clone().requires_grad_()
        dual = forward_ad.make_dual(leaf, inputs.tangents[0])
        return forward_ad.unpack_dual(
            torch.autograd.grad(only(loss, inputs, 0)(dual).sum(), leaf)[0]
        )


def tangent_of_dual_tensors(loss: Loss, inputs: Inputs) -> Any:
    with forward_ad.dual_level():
        leaf = inputs.values[0].clone().requires_grad_()
        made = only(loss, inputs, 0)(forward_ad.make_dual(leaf, inputs.tangents[0]))
        return torch.autograd.grad(forward_ad.unpack_dual(made).tangent.sum(), leaf)


def second(derivative: Callable[[Loss, Tensor, Tensor], Any]) -> Callable[[Loss, Inputs], Any]:
    return lambda loss, inputs: derivative(*curvature(loss, inputs))


SECOND: dict[str, Callable[[Loss, Inputs], Any]] = {
    "hessian": second(lambda f, x, t: func.hessian(f)(x)),
    "jacfwd of jacrev": second(lambda f, x, t: func.jacfwd(func.jacrev(f))(x)),
    "jacrev of jacfwd": second(lambda f, x, t: func.jacrev(func.jacfwd(f))(x)),
    "jacrev of jacrev": second(lambda f, x, t: func.jacrev(func.jacrev(f))(x)),
    "jacfwd of jacfwd": second(lambda f, x, t: func.jacfwd(func.jacfwd(f))(x)),
    "jvp of grad": second(lambda f, x, t: func.jvp(func.grad(f), (x,), (t,))),
    "grad of jvp": second(lambda f, x, t: func.grad(lambda y: func.jvp(f, (y,), (t,))[1])(x)),
    "functional.hessian": second(lambda f, x, t: torch.autograd.functional.hessian(f, x)),
    "functional.hessian, vectorized": second(
        lambda f, x, t: torch.autograd.functional.hessian(f, x, vectorize=True)
    ),
    "functional.hessian in forward mode": second(
        lambda f, x, t: torch.autograd.functional.hessian(
            f, x, vectorize=True, outer_jacobian_strategy="forward-mode"
        )
    ),
    "functional.hvp": second(lambda f, x, t: torch.autograd.functional.hvp(f, x, t)),
    "functional.vhp": second(lambda f, x, t: torch.autograd.functional.vhp(f, x, t)),
    "grad of the weight of grad of the input": lambda loss, inputs: func.grad(
        lambda weight: func.grad(lambda hidden: loss(hidden, weight, *inputs.values[2:]).sum())(
            inputs.values[0]
        ).sum()
    )(inputs.values[1]),
    "jvp of the weight of grad of the input": lambda loss, inputs: func.jvp(
        lambda weight: func.grad(lambda hidden: loss(hidden, weight, *inputs.values[2:]).sum())(
            inputs.values[0]
        ),
        (inputs.values[1],),
        (inputs.tangents[1],),
    ),
    "gradient penalty": gradient_penalty,
    "gradient penalty of a batch": penalty_of_a_batch,
    "backward of dual tensors": backward_of_dual_tensors,
    "backward of a tangent": tangent_of_dual_tensors,
}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["mean", "none"])
@pytest.mark.parametrize("case", SECOND.values(), ids=SECOND)
def test_a_second_derivative_raises(
    case: Callable[[Loss, Inputs], Any], name: str, impl: str
) -> None:
    problem = PROBLEMS[name]
    inputs = Inputs(problem, torch.float32)
    with pytest.raises(NotImplementedError, match=r"must be differentiated once.*F\.cross_entropy"):
        case(inputs.loss(by_ours(problem, impl)), inputs)


def by_two_backwards(loss: Loss, inputs: Inputs) -> Any:
    return torch.autograd.functional.jvp(loss, inputs.values, inputs.tangents)


@pytest.mark.parametrize("name", ["mean", "sum"])
def test_a_gradient_is_differentiable_in_its_upstream(name: str) -> None:
    compare(by_two_backwards, PROBLEMS[name], "torch", Inputs(PROBLEMS[name], torch.float32))


def test_the_gradient_of_losses_per_token_is_not_and_names_the_remedy() -> None:
    inputs = Inputs(PROBLEMS["none"], torch.float32)
    with pytest.raises(NotImplementedError, match=r"torch\.func\.jvp takes losses"):
        by_two_backwards(inputs.loss(by_ours(PROBLEMS["none"], "torch")), inputs)


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


class Model:
    """A model as a function of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inputs = batch(model)
        self.parameters = {n: p.detach() for n, p in self.model.named_parameters()}
        source = torch.Generator().manual_seed(7)
        self.tangents = {
            name: torch.randn(p.shape, generator=source).to(p)
            for name, p in self.parameters.items()
        }

    def loss(self, parameters: dict[str, Tensor]) -> Tensor:
        return func.functional_call(self.model, parameters, kwargs=self.inputs).loss


def of_one_sequence(
    model: Model, parameters: dict[str, Tensor], ids: Tensor, labels: Tensor
) -> Any:
    inputs = {"input_ids": ids[None], "labels": labels[None]}
    return func.functional_call(model.model, parameters, kwargs=inputs).loss


def stacked(model: Model) -> dict[str, Tensor]:
    members = [copy.deepcopy(model.model) for _ in range(2)]
    with torch.no_grad():
        for name, parameter in members[1].named_parameters():
            parameter.add_(model.tangents[name], alpha=0.01)
    return func.stack_module_state(members)[0]


def model_by_dual_tensors(model: Model, trained: bool) -> Any:
    model.model.requires_grad_(trained)
    with forward_ad.dual_level():
        parameters = dict(model.model.named_parameters())
        duals = {n: forward_ad.make_dual(p, model.tangents[n]) for n, p in parameters.items()}
        return [value.detach() for value in forward_ad.unpack_dual(model.loss(duals))]


MODEL_CASES: dict[str, Callable[[Model], Any]] = {
    "jvp": lambda model: func.jvp(model.loss, (model.parameters,), (model.tangents,)),
    "grad": lambda model: func.grad(model.loss)(model.parameters),
    "ensemble": lambda model: func.vmap(model.loss)(stacked(model)),
    "gradients of an ensemble": lambda model: func.vmap(func.grad(model.loss))(stacked(model)),
    "gradients of each sequence": lambda model: func.vmap(
        func.grad(lambda *args: of_one_sequence(model, *args)), (None, 0, 0)
    )(model.parameters, model.inputs["input_ids"], model.inputs["labels"]),
    "dual tensors": lambda model: model_by_dual_tensors(model, True),
    "dual tensors, frozen": lambda model: model_by_dual_tensors(model, False),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
@pytest.mark.parametrize("case", MODEL_CASES.values(), ids=MODEL_CASES)
def test_a_patched_model(case: Callable[[Model], Any], family: str, grad: bool) -> None:
    stock = build(family)
    stock.set_attn_implementation("eager")
    with torch.set_grad_enabled(grad):
        models = apply_patch(copy.deepcopy(stock)), stock, in_float64(stock)
        found = [pytree.tree_leaves(case(Model(model))) for model in models]
    for index, (got, expected, exact) in enumerate(zip(*found, strict=True)):
        assert_close_as_torch(f"result {index}", got, expected, exact)
