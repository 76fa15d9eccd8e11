"""The two ways a loss meets autograd, shared by all engines.

A scalar loss knows the weight of every row before its products run, so its gradients are made in
the forward and `FinishedLoss` carries them to the backward, where the one number that was missing,
the upstream gradient, scales them. A loss per token takes any upstream vector, so `RowLosses` keeps
the operands and makes the gradients in the backward.

`torch.func` and dual tensors get the `Transformed...` variants, which have a derivative in forward
mode and a rule for `torch.vmap`; torch.compile traces no `jvp`, and a separate `setup_context`
costs a call dozens of microseconds (read at torch 2.13). No loss has a second derivative: where one
could be taken, the first leaves through `Gradients` or `RowGradients`, whose derivatives raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

from hf_fused_head import ops
from hf_fused_head.engines.protocol import Needs
from hf_fused_head.flops import register_formulas
from hf_fused_head.objective import RowStats, Upstream, Wanted
from hf_fused_head.ops import HeadArguments
from hf_fused_head.records import unflatten
from hf_fused_head.transforms import eager_only, in_transform, is_batch_of_gradients, loop

# The statistics of a row that have a gradient come first in `RowStats`.
_NUM_STATS, _NUM_UPSTREAM = len(RowStats._fields), len(Upstream._fields)


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


class _OnceDifferentiable(Function):
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


class Gradients(_OnceDifferentiable):
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


class RowGradients(_OnceDifferentiable):
    """The gradients of losses per token; differentiating them again raises."""

    @staticmethod
    def forward(
        config: tuple,
        needs: Needs,
        labels: Tensor,
        class_weight: Tensor | None,
        bias: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        """`tensors` are those of `Upstream` and `RowStats`, inputs, and as many weights."""
        upstream, rest = tensors[:_NUM_UPSTREAM], tensors[_NUM_UPSTREAM:]
        stats, pairs = rest[:_NUM_STATS], rest[_NUM_STATS:]
        head = HeadArguments(*halves(pairs), bias, class_weight, labels, *config)
        return tuple(ops.row_grads(head, RowStats(*stats), Upstream(*upstream), needs))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        """One call for each part of the batch."""
        return loop(RowGradients.apply, info, in_dims, *arguments)


class RowLosses(Function):
    """nll, lse, smooth and entropy per token, each differentiable; then `correct`, `correction`.

    Saved: the operands and O(tokens) statistics, so the backward can make the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        config: tuple,
        wanted: Wanted,
        needs: Needs,
        labels: Tensor,
        class_weight: Tensor | None,
        bias: Tensor | None,
        *pairs: Tensor,
    ) -> tuple[Tensor, ...]:
        """`pairs` are inputs, then as many weights."""
        head = HeadArguments(*halves(pairs), bias, class_weight, labels, *config)
        stats: Any = tuple(ops.row_stats(head, wanted))
        _Rows.of(head, stats).keep(ctx, wanted, needs)
        return stats

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        """The logits once more, and from them the gradients of what is not frozen."""
        rows = _Rows.saved(ctx)
        inputs, weights, bias = rows.gradients(upstream, ctx.wanted, ctx.needs)
        return (None, None, None, None, None, bias, *inputs, *weights)


class TransformedRowLosses(Function):
    """`RowLosses` for transforms and dual tensors."""

    @staticmethod
    def forward(config: tuple, wanted: Wanted, needs: Needs, *operands: Any) -> Any:
        """As `RowLosses.forward`."""
        labels, class_weight, bias, *pairs = operands
        head = HeadArguments(*halves(pairs), bias, class_weight, labels, *config)
        return tuple(ops.row_stats(head, wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps operands and statistics, for either mode."""
        config, wanted, needs, labels, class_weight, bias, *pairs = inputs
        ctx.set_materialize_grads(False)
        head = HeadArguments(*halves(pairs), bias, class_weight, labels, *config)
        ctx.save_for_forward(*_Rows.of(head, output).keep(ctx, wanted, needs))

    @staticmethod
    @eager_only
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        """As `RowLosses.backward`."""
        return RowLosses.backward(ctx, *upstream)

    @staticmethod
    @eager_only
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        """The tangents of the statistics."""
        bias, (inputs, weights) = tangents[5], halves(tangents[6:])
        return *_Rows.saved(ctx).tangents(inputs, weights, bias, ctx.wanted), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        """One call for each part of the batch."""
        return loop(TransformedRowLosses.apply, info, in_dims, *arguments)


class _Rows(NamedTuple):
    """A head and its statistics, as losses per token keep them."""

    config: tuple
    stats: Sequence[Tensor]  # nll, lse, smooth, entropy, correct, correction
    labels: Tensor
    class_weight: Tensor | None
    bias: Tensor | None
    inputs: list[Tensor]
    weights: list[Tensor]

    @classmethod
    def of(cls, head: HeadArguments, stats: Sequence[Tensor]) -> _Rows:
        """The statistics of a head."""
        inputs, weights, bias, class_weight, labels, *config = head
        return cls(tuple(config), stats, labels, class_weight, bias, inputs, weights)

    def keep(self, ctx: Any, wanted: Wanted, needs: Needs) -> list[Tensor]:
        """Keeps all of it in `ctx`; the tensors, in the order in which `saved` finds them."""
        ctx.config, ctx.wanted, ctx.needs = self.config, wanted, needs
        ctx.has_class_weight, ctx.has_bias = self.class_weight is not None, self.bias is not None
        ctx.mark_non_differentiable(*self.stats[_NUM_UPSTREAM:])
        optional = [tensor for tensor in (self.class_weight, self.bias) if tensor is not None]
        tensors = [*self.stats, self.labels, *optional, *self.inputs, *self.weights]
        ctx.save_for_backward(*tensors)
        return tensors

    @classmethod
    def saved(cls, ctx: Any) -> _Rows:
        """What `ctx` keeps."""
        # Read once: under activation checkpointing a second look would compute everything again.
        saved = list(ctx.saved_tensors)
        stats, (labels, *rest) = saved[:_NUM_STATS], saved[_NUM_STATS:]
        class_weight = rest.pop(0) if ctx.has_class_weight else None
        bias = rest.pop(0) if ctx.has_bias else None
        return cls(ctx.config, stats, labels, class_weight, bias, *halves(rest))

    def gradients(
        self, upstream: Sequence[Tensor | None], wanted: Wanted, needs: Needs
    ) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
        """Of inputs, weights and bias; `upstream` is that of nll, lse, smooth and entropy."""
        register_formulas()
        nll, lse = (torch.zeros_like(self.stats[0]) if g is None else g for g in upstream[:2])
        smooth = upstream[2] if wanted.smooth else None
        entropy = upstream[3] if wanted.entropy else None
        make = RowGradients.apply if may_be_differentiated() else RowGradients.forward
        head = self.labels, self.class_weight, self.bias
        tensors = nll, lse, smooth, entropy, *self.stats, *self.inputs, *self.weights
        grads = make(self.config, needs, *head, *tensors)
        flat = [*needs.inputs, *needs.weights, needs.bias]
        kept = [grad if need else None for grad, need in zip(grads, flat, strict=True)]
        return *halves(kept[:-1]), kept[-1]

    def tangents(
        self,
        dinputs: Sequence[Tensor | None],
        dweights: Sequence[Tensor | None],
        dbias: Tensor | None,
        wanted: Wanted,
    ) -> list[Tensor]:
        """Of nll, lse, smooth and entropy, by the gradients of hidden states alone.

        A further pair of operands `(0, dW)` leaves the logits as they are. The gradient of its
        zeros is `sum_j dz_j dW_j`, and the product of that with `x` is the tangent for `dW`. A bias
        is a weight whose `x` is 1.
        """
        if self.config[-2]:
            refuse_sharded_tangent()
        ones = self.inputs[0].new_ones(self.inputs[0].shape[0], 1)
        column = None if dbias is None else dbias[:, None]
        pairs = zip((*self.inputs, ones), (*dweights, column), strict=True)
        known = [(x, dweight) for x, dweight in pairs if dweight is not None]
        head, factors = self, list(dinputs)
        if known:
            # One pair, since an engine may take no more than two.
            x, dweight = (torch.cat(side, 1) for side in zip(*known, strict=True))
            inputs, weights = [*self.inputs, torch.zeros_like(x)], [*self.weights, dweight]
            head, factors = self._replace(inputs=inputs, weights=weights), [*dinputs, x]
        needs = Needs([factor is not None for factor in factors], [False] * len(factors), False)

        def tangent(index: int) -> Tensor:
            values = self.stats[index]
            upstream = [torch.ones_like(values) if i == index else None for i in range(4)]
            grads, _, _ = head.gradients(upstream, Wanted(index == 2, index == 3), needs)
            parts = [
                (grad.to(values.dtype) * factor.to(values.dtype)).sum(-1)
                for grad, factor in zip(grads, factors, strict=True)
                if grad is not None and factor is not None
            ]
            return torch.stack(parts).sum(0)

        asked = (True, True, *wanted[: _NUM_UPSTREAM - 2])
        return [
            tangent(index) if want else torch.zeros_like(self.stats[index])
            for index, want in enumerate(asked)
        ]


def _keep_exported(ctx: Any, inputs: Any, output: Any) -> None:
    """As `RowLosses.forward`, for the flat arguments of the operator."""
    head, wanted = unflatten(inputs, HeadArguments, Wanted)
    of_inputs, of_weights = ([t.requires_grad for t in side] for side in head[:2])
    needs = Needs(of_inputs, of_weights, head.bias is not None and head.bias.requires_grad)
    _Rows.of(head, output).keep(ctx, wanted, needs)


def _exported_backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
    """As `RowLosses.backward`, with the gradients in the order of the operator."""
    gradients = _Rows.saved(ctx).gradients(upstream, ctx.wanted, ctx.needs)
    return *gradients, None, None, *(None for _ in (*ctx.config, *ctx.wanted))


# For programs by torch.export, which keep the derivatives of operators alone. Elsewhere a function
# around the operator takes less time of the host (read at torch 2.13).
ops._row_stats.register_autograd(_exported_backward, setup_context=_keep_exported)


def halves(tensors: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Inputs and weights out of one flat sequence."""
    count = len(tensors) // 2
    return list(tensors[:count]), list(tensors[count:])
