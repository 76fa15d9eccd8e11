"""The divergence per token for autograd: any upstream gradient, made in the backward.

A scalar loss has its gradients made in the forward and needs no function of its own
(`hf_fused_head.autograd.FinishedLoss`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hf_fused_head.autograd import Gradients, may_be_differentiated
from hf_fused_head.divergence.ops import PairArguments, Upstream, divergence
from hf_fused_head.engines.protocol import DivergenceNeeds


class TokenDivergences(Function):
    """The divergence and the entropy per token; the divergence is differentiable.

    Saved: both heads and the mask. The backward makes both heads' logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, needs: DivergenceNeeds, config: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`tensors` and `config` are the fields of `PairArguments`, tensors first."""
        pair = PairArguments(*tensors, *config)  # type: ignore[arg-type]
        ctx.needs, ctx.config = needs, config
        ctx.save_for_backward(*tensors)
        nothing = DivergenceNeeds(False, False, False, needs.entropy)
        empty = pair.student.new_empty(0, dtype=pair.dtype)
        per_token, entropy, _ = divergence(pair, Upstream(empty, False), nothing)
        ctx.mark_non_differentiable(entropy)
        return per_token, entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the student's hidden states, weight and bias."""
        # Read once: under activation checkpointing a second look would compute everything again.
        tensors = ctx.saved_tensors
        needs = ctx.needs._replace(entropy=False)
        with torch.no_grad():
            pair = PairArguments(*tensors, *ctx.config)
            grads = divergence(pair, Upstream(upstream.contiguous(), False), needs)[2]
        if may_be_differentiated():
            sources = [upstream, *(tensor for tensor in tensors[:3] if tensor is not None)]
            grads = Gradients.apply(len(sources), *sources, *grads)
        wanted = (grad if need else None for grad, need in zip(grads, needs[:3], strict=True))
        return None, None, *wanted, *(None for _ in tensors[3:])
