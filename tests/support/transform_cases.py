"""Transforms of `torch.func`, dual tensors and batches of gradients, as functions of a loss.

A case runs on the fused loss and on F.linear with F.cross_entropy in the same dtype, and is
compared with the latter in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from oracle import assert_close_as_torch
from plain_head import NAMES, Problem, by_ours, by_plain, widened
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

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
