"""How statistics of rows meet autograd: a loss per token takes any upstream vector.

`RowLosses` keeps the operands and makes the gradients in the backward, from the logits of a second
product. `TransformedRowLosses` is for transforms and dual tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from hf_fused_head import ops
from hf_fused_head.autograd import (
    OnceDifferentiable,
    may_be_differentiated,
    refuse_sharded_tangent,
)
from hf_fused_head.engines.protocol import Needs
from hf_fused_head.flops import register_formulas
from hf_fused_head.objective import RowStats, Upstream, Wanted
from hf_fused_head.ops import HeadArguments
from hf_fused_head.records import unflatten
from hf_fused_head.transforms import (
    eager_only,
    in_transform,
    is_differentiated,
    is_exporting,
    loop,
)

# The statistics of a row that have a gradient come first in `RowStats`.
_NUM_STATS, _NUM_UPSTREAM = len(RowStats._fields), len(Upstream._fields)
# The tensors of a head that have no gradient of ours, and the bias: between lists and options.
_NUM_SINGLE = 4


def needs_of(head: HeadArguments) -> Needs:
    """Which gradients of a head may be computed."""
    return Needs(
        [is_differentiated(hidden) for hidden in head.inputs],
        [is_differentiated(weight) for weight in head.weights],
        head.bias is not None and is_differentiated(head.bias),
    )


def row_stats(head: HeadArguments, wanted: Wanted, needs: Needs) -> RowStats:
    """Statistics of every token, connected to what is differentiated."""
    register_formulas()
    if not needs.any():
        return ops.row_stats(head.detached(), wanted)
    if is_exporting():
        return ops.row_stats(head, wanted)
    apply = TransformedRowLosses.apply if in_transform() else RowLosses.apply
    return RowStats(*apply(wanted, needs, *_flat(head)))


class RowGradients(OnceDifferentiable):
    """The gradients of losses per token; differentiating them again raises."""

    @staticmethod
    def forward(needs: Needs, *arguments: Any) -> tuple[Tensor, ...]:
        """`arguments` are the tensors of `Upstream` and `RowStats`, then a head's."""
        upstream, rest = arguments[:_NUM_UPSTREAM], arguments[_NUM_UPSTREAM:]
        stats, head = rest[:_NUM_STATS], _head(rest[_NUM_STATS:])
        return tuple(ops.row_grads(head, RowStats(*stats), Upstream(*upstream), needs))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        """One call for each part of the batch."""
        return loop(RowGradients.apply, info, in_dims, *arguments)


class RowLosses(Function):
    """nll, lse, smooth and entropy per token, each differentiable; then the rest of `RowStats`.

    Saved: the operands and O(tokens) statistics, so the backward can make the logits again.
    """

    @staticmethod
    def forward(ctx: Any, wanted: Wanted, needs: Needs, *arguments: Any) -> tuple[Tensor, ...]:
        """`arguments` are those of a head."""
        head = _head(arguments)
        stats: Any = tuple(ops.row_stats(head, wanted))
        _Rows(head, stats).keep(ctx, wanted, needs)
        return stats

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        """The logits once more, and from them the gradients of what is not frozen."""
        inputs, weights, bias = _Rows.saved(ctx).gradients(upstream, ctx.wanted, ctx.needs)
        return (None, None, None, bias, None, None, None, *inputs, *weights)


class TransformedRowLosses(Function):
    """`RowLosses` for transforms and dual tensors."""

    @staticmethod
    def forward(wanted: Wanted, needs: Needs, *arguments: Any) -> Any:
        """As `RowLosses.forward`."""
        return tuple(ops.row_stats(_head(arguments), wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps operands and statistics, for either mode."""
        wanted, needs, *arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*_Rows(_head(arguments), output).keep(ctx, wanted, needs))

    @staticmethod
    @eager_only
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        """As `RowLosses.backward`."""
        return RowLosses.backward(ctx, *upstream)

    @staticmethod
    @eager_only
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        """The tangents of the statistics."""
        bias, (inputs, weights) = tangents[3], halves(tangents[7:])
        known = _Rows.saved(ctx).tangents(inputs, weights, bias, ctx.wanted)
        return *known, *(None for _ in range(_NUM_STATS - len(known)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        """One call for each part of the batch."""
        return loop(TransformedRowLosses.apply, info, in_dims, *arguments)


def _flat(head: HeadArguments) -> list[Any]:
    """A head as arguments of a function: options, the single tensors, inputs, weights."""
    inputs, weights, *rest = head
    return [tuple(rest[_NUM_SINGLE:]), *rest[:_NUM_SINGLE], *inputs, *weights]


def _head(arguments: Sequence[Any]) -> HeadArguments:
    """The head that `_flat` was given."""
    options, *tensors = arguments
    return HeadArguments(*halves(tensors[_NUM_SINGLE:]), *tensors[:_NUM_SINGLE], *options)


class _Rows(NamedTuple):
    """A head and its statistics, as losses per token keep them."""

    head: HeadArguments
    stats: Sequence[Tensor]  # in the order of `RowStats`

    def keep(self, ctx: Any, wanted: Wanted, needs: Needs) -> list[Tensor]:
        """Keeps all of it in `ctx`; the tensors, in the order in which `saved` finds them."""
        ctx.mark_non_differentiable(*self.stats[_NUM_UPSTREAM:])
        options, *tensors = _flat(self.head)
        ctx.options, ctx.wanted, ctx.needs = options, wanted, needs
        ctx.present = [tensor is not None for tensor in tensors]
        kept = [*self.stats, *(tensor for tensor in tensors if tensor is not None)]
        ctx.save_for_backward(*kept)
        return kept

    @classmethod
    def saved(cls, ctx: Any) -> _Rows:
        """What `ctx` keeps."""
        # Read once: under activation checkpointing a second look would compute everything again.
        saved = list(ctx.saved_tensors)
        stats, rest = saved[:_NUM_STATS], iter(saved[_NUM_STATS:])
        tensors = [next(rest) if present else None for present in ctx.present]
        return cls(_head([ctx.options, *tensors]), stats)

    def gradients(
        self, upstream: Sequence[Tensor | None], wanted: Wanted, needs: Needs
    ) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
        """Of inputs, weights and bias; `upstream` is that of nll, lse, smooth and entropy."""
        register_formulas()
        nll, lse = (torch.zeros_like(self.stats[0]) if g is None else g for g in upstream[:2])
        smooth = upstream[2] if wanted.smooth else None
        entropy = upstream[3] if wanted.entropy else None
        make = RowGradients.apply if may_be_differentiated() else RowGradients.forward
        grads = make(needs, nll, lse, smooth, entropy, *self.stats, *_flat(self.head))
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
        if self.head.group:
            refuse_sharded_tangent()
        first = self.head.inputs[0]
        ones = first.new_ones(first.shape[0], 1)
        column = None if dbias is None else dbias[:, None]
        pairs = zip((*self.head.inputs, ones), (*dweights, column), strict=True)
        known = [(x, dweight) for x, dweight in pairs if dweight is not None]
        rows, factors = self, list(dinputs)
        if known:
            # One pair, since an engine may take no more than two.
            x, dweight = (torch.cat(side, 1) for side in zip(*known, strict=True))
            inputs = [*self.head.inputs, torch.zeros_like(x)]
            weights = [*self.head.weights, dweight]
            rows = self._replace(head=self.head._replace(inputs=inputs, weights=weights))
            factors = [*dinputs, x]
        needs = Needs([factor is not None for factor in factors], [False] * len(factors), False)

        def tangent(index: int) -> Tensor:
            values = self.stats[index]
            upstream = [torch.ones_like(values) if i == index else None for i in range(4)]
            grads, _, _ = rows.gradients(upstream, Wanted(index == 2, index == 3), needs)
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
    _Rows(head, output).keep(ctx, wanted, needs)


def _exported_backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
    """As `RowLosses.backward`, with the gradients in the order of the operator."""
    gradients = _Rows.saved(ctx).gradients(upstream, ctx.wanted, ctx.needs)
    rest = len(HeadArguments._fields) + len(ctx.wanted) - len(gradients)
    return *gradients, *(None for _ in range(rest))


# For programs by torch.export, which keep the derivatives of operators alone. Elsewhere a function
# around the operator takes less time of the host (read at torch 2.13).
ops._row_stats.register_autograd(_exported_backward, setup_context=_keep_exported)


def halves(tensors: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Inputs and weights out of one flat sequence."""
    count = len(tensors) // 2
    return list(tensors[:count]), list(tensors[count:])
