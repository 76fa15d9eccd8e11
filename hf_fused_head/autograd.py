"""The two ways a loss meets autograd, shared by all engines.

A scalar loss knows the weight of every row before its products run, so its gradients are made in
the forward and `FinishedLoss` carries them to the backward, where the one number that was missing,
the upstream gradient, scales them. A loss per token takes any upstream vector, so `RowLosses` keeps
the operands and makes the gradients in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hf_fused_head import ops


def refuse_second_derivative() -> None:
    """Raises under `create_graph=True`: the engines have first derivatives only."""
    # A compiled backward is traced without gradients and refuses double backward by itself.
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise NotImplementedError(
            "`create_graph` must be False for the fused cross-entropy, got True: it has no second "
            "derivative; use F.linear and F.cross_entropy where one is needed"
        )


def scaled(grads: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Every gradient times the upstream scalar, with no pass and no memory that can be spared."""
    if torch.compiler.is_compiling():
        return [grad * upstream for grad in grads]
    # Reading the number is free on the CPU; elsewhere it would wait for the device.
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return grads
    if graph_is_kept():
        return [grad * upstream for grad in grads]
    return [ops.multiply_(grad, upstream) for grad in grads]


def graph_is_kept() -> bool:
    """Whether a second backward may ask for the same gradients; True when torch cannot tell."""
    # AOTAutograd asks the same private question before it donates its buffers.
    private = getattr(torch._C, "_autograd", None)
    ask = getattr(private, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


class FinishedLoss(Function):
    """Ties a loss to the gradients that were computed beside it.

    Saved: the gradients, in the dtype of their parameters (float16 ones in float32, since the loss
    scale only arrives with the upstream gradient); neither hidden states nor weights.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, num_parameters: int, *tensors: Tensor) -> Tensor:
        """`tensors` are the parameters, then their gradients (empty where nobody needs one)."""
        parameters, grads = tensors[:num_parameters], tensors[num_parameters:]
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.needed = [parameter.requires_grad for parameter in parameters]
        ctx.save_for_backward(*grads)
        # Not `clone`: inductor (read at torch 2.13) makes one output of two copies of a value, and
        # that output has no gradient if one of them is detached, as a logged loss is.
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Every gradient times the upstream scalar."""
        refuse_second_derivative()
        needed = [grad for grad, need in zip(ctx.saved_tensors, ctx.needed, strict=True) if need]
        finished = iter(scaled(needed, upstream))
        grads = [
            next(finished).to(dtype) if need else None
            for dtype, need in zip(ctx.dtypes, ctx.needed, strict=True)
        ]
        return (None, None, *grads, *(None for _ in grads))


class RowLosses(Function):
    """nll, lse, smooth and entropy per token, each differentiable.

    Saved: the operands and O(tokens) statistics, so the backward can make the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        num_pairs: int,
        config: tuple,
        wanted: tuple[bool, bool, bool],
        labels: Tensor,
        class_weight: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`tensors` are inputs, weights and, where there is one, the bias."""
        inputs, weights, bias = split_parameters(tensors, num_pairs)
        stats = ops.row_stats(inputs, weights, bias, class_weight, labels, *config, *wanted)
        ctx.num_pairs, ctx.config, ctx.wanted = num_pairs, config, wanted
        ctx.needed = [tensor.requires_grad for tensor in tensors]
        ctx.has_class_weight = class_weight is not None
        extra = (labels,) if class_weight is None else (labels, class_weight)
        ctx.save_for_backward(*stats, *extra, *tensors)
        nll, lse, smooth, entropy, correct, _ = stats
        ctx.mark_non_differentiable(correct)
        return nll, lse, smooth, entropy, correct

    @staticmethod
    def backward(
        ctx: Any, g_nll: Tensor, g_lse: Tensor, g_smooth: Tensor, g_entropy: Tensor, _: Any
    ) -> tuple[Tensor | None, ...]:
        """The logits once more, and from them the gradients of what is not frozen."""
        refuse_second_derivative()
        # Read once: under activation checkpointing a second look would compute everything again.
        saved = ctx.saved_tensors
        stats, rest = saved[:6], saved[6:]
        class_weight = rest[1] if ctx.has_class_weight else None
        tensors = rest[2:] if ctx.has_class_weight else rest[1:]
        inputs, weights, bias = split_parameters(tensors, ctx.num_pairs)
        want_smooth, want_entropy, _ = ctx.wanted
        needed, num_pairs = ctx.needed, ctx.num_pairs
        grads = ops.row_grads(
            inputs,
            weights,
            bias,
            class_weight,
            rest[0],
            *ctx.config,
            *stats,
            g_nll,
            g_lse,
            g_smooth if want_smooth else None,
            g_entropy if want_entropy else None,
            needed[:num_pairs],
            needed[num_pairs : 2 * num_pairs],
            bias is not None and needed[-1],
        )
        parameter_grads = [
            grad if need else None for grad, need in zip(grads[: len(tensors)], needed, strict=True)
        ]
        return (None, None, None, None, None, *parameter_grads)


def split_parameters(
    tensors: tuple[Tensor, ...], num_pairs: int
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Inputs, weights and bias out of one flat tuple."""
    bias = tensors[2 * num_pairs] if len(tensors) > 2 * num_pairs else None
    return list(tensors[:num_pairs]), list(tensors[num_pairs : 2 * num_pairs]), bias
