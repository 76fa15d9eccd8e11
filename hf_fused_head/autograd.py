"""How a scalar loss meets autograd, and what all derivatives of ours share.

A scalar loss knows the weight of every row before its products run, so its gradients are made in
the forward and `FinishedLoss` carries them to the backward, where the one number that was missing,
the upstream gradient, scales them. A loss per token takes any upstream vector: see `row_autograd`.

`torch.func` and dual tensors get the `Transformed...` variants, which have a derivative in forward
mode and a rule for `torch.vmap`; torch.compile traces no `jvp`, and a separate `setup_context`
costs a call dozens of microseconds (read at torch 2.13). No loss has a second derivative: where one
could be taken, the first leaves through `Gradients` or `RowGradients`, whose derivatives raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

from hf_fused_head import ops
from hf_fused_head.transforms import eager_only, in_transform, is_batch_of_gradients, loop


def refuse_second_derivative() -> NoReturn:
    """Raises: the engines have first derivatives only."""
    raise NotImplementedError(
        "the fused loss must be differentiated once, got a second derivative (a gradient penalty, "
        "a Hessian, torch.autograd.functional.jvp of losses per token): use F.linear and "
        "F.cross_entropy or F.kl_div where one is needed; torch.func.jvp takes losses of "
        "linear_cross_entropy per token"
    )


def refuse_sharded_tangent() -> NoReturn:
    """Raises: the tangents of the other ranks' rows are not here."""
    raise NotImplementedError(
        "`process_group` must be None in forward mode (torch.func.jvp, dual tensors), got a group: "
        "use reverse mode, where every rank has the gradients of its own rows"
    )


def may_be_differentiated() -> bool:
    """Whether what a backward computes now may be differentiated again."""
    # A compiled backward is traced without gradients and refuses double backward by itself.
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or in_transform())


def scaled(grads: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Every gradient times the upstream scalar, with no pass and no memory that is not needed."""
    copied = torch.compiler.is_compiling() or may_be_differentiated()
    # A fake tensor has no number to read and none that a kernel could.
    if copied or type(upstream) is not Tensor or is_batch_of_gradients(upstream):
        return [grad * upstream for grad in grads]
    # Reading the number is free on the CPU; elsewhere it would wait for the device.
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return list(grads)
    if graph_is_kept():
        return [grad * upstream for grad in grads]
    return [ops.multiply_(grad, upstream) for grad in grads]


def graph_is_kept() -> bool:
    """Whether a second backward may ask for the same gradients; True when torch cannot tell."""
    # AOTAutograd asks the same private question before it donates its buffers.
    private = getattr(torch._C, "_autograd", None)
    ask = getattr(private, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


class OnceDifferentiable(Function):
    """A function of first derivatives, whose own derivatives raise."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to save."""

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> NoReturn:
        """Raises."""
        refuse_second_derivative()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        """Raises."""
        refuse_second_derivative()


class Gradients(OnceDifferentiable):
    """First derivatives as they are; differentiating them again raises."""

    @staticmethod
    def forward(num_sources: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`tensors` are what the derivatives depend on, then the derivatives."""
        return tuple(grad.view_as(grad) for grad in tensors[num_sources:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        """One call for each part of the batch."""
        return loop(Gradients.apply, info, in_dims, *arguments)


class FinishedLoss(Function):
    """Ties a loss to the gradients that were computed beside it.

    Saved: the gradients, in the dtype of their parameters (float16 ones in float32, since the loss
    scale only arrives with the upstream gradient); neither hidden states nor weights. The second
    output is empty and stands for the parameters in the graph of a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, needed: tuple[bool, ...], sharded: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`tensors` are the parameters, then the gradients of those that are needed."""
        link = loss.new_empty(0)
        ctx.needed = needed
        ctx.dtypes = [parameter.dtype for parameter in tensors[: len(needed)]]
        ctx.save_for_backward(link, *tensors[len(needed) :])
        # Not `clone`: inductor (read at torch 2.13) makes one output of two copies of a value, and
        # that output has no gradient if one of them is detached, as a logged loss is.
        return loss.sum(), link

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Every gradient times the upstream scalar."""
        link, *grads = ctx.saved_tensors
        if may_be_differentiated():
            grads = Gradients.apply(1, link, *grads)
        finished = iter(scaled(grads, upstream))
        parameter_grads = [
            next(finished).to(dtype) if need else None
            for dtype, need in zip(ctx.dtypes, ctx.needed, strict=True)
        ]
        return (None, None, None, *parameter_grads, *(None for _ in grads))


class TransformedLoss(Function):
    """`FinishedLoss` for transforms and dual tensors."""

    @staticmethod
    def forward(
        loss: Tensor, needed: tuple[bool, ...], sharded: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `FinishedLoss.forward`."""
        return loss.clone(), loss.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the gradients, and the parameters while a tangent is computed."""
        _, ctx.needed, ctx.sharded, *tensors = inputs
        parameters, grads = tensors[: len(ctx.needed)], tensors[len(ctx.needed) :]
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], *grads)
        ctx.save_for_forward(*output, *tensors)

    @staticmethod
    @eager_only
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """As `FinishedLoss.backward`."""
        if upstream is None:
            return (None,) * (3 + len(ctx.needed) + sum(ctx.needed))
        return FinishedLoss.backward(ctx, upstream, _)

    @staticmethod
    @eager_only
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        """The sum of every gradient times the tangent of its parameter."""
        if ctx.sharded:
            refuse_sharded_tangent()
        loss, link, *tensors = ctx.saved_tensors
        grads = iter(Gradients.apply(len(ctx.needed), *tensors))
        total = torch.zeros_like(loss)
        for need, tangent in zip(ctx.needed, tangents[3:], strict=False):
            grad = next(grads) if need else None
            if grad is not None and tangent is not None:
                total = total + (grad.to(loss.dtype) * tangent.to(loss.dtype)).sum()
        # With a tangent of its own, `link` shows that a backward is differentiated again.
        return total, torch.zeros_like(link)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        """One call for each part of the batch."""
        return loop(TransformedLoss.apply, info, in_dims, *arguments)
