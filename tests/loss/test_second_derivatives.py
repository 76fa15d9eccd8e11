"""A second derivative of the fused loss raises where it is taken, whatever takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_head import by_ours
from torch import Tensor, func
from torch.autograd import forward_ad
from transform_cases import PROBLEMS, Inputs, Loss, compare, leaves, only, summed


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
