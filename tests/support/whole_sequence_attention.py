"""Attention over sequences whose tokens lie on several processes, for the CPU.

torch's context parallelism takes the place of CUDA kernels, Ulysses that of whole layers. Here each
process gets the keys and values of all and computes the rows of its own tokens, so that everything
around the attention can run where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class _Gathered(torch.autograd.Function):
    """The tokens of all processes, in order of rank; the gradient of a token goes home."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat(parts, dim=2)  # [batch, heads, tokens, width]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), dim=2)[dist.get_rank()]


def split_attention(places: Tensor | None) -> None:
    """From now on every "sdpa" attention is that of tokens on several processes.

    Args:
        places: Of the tokens in the whole sequence, in order of rank; None for whole sequences.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        theirs = mine = torch.arange(query.shape[2])
        if places is not None:
            theirs, mine = places, places.chunk(dist.get_world_size())[dist.get_rank()]
            key, value = _Gathered.apply(key), _Gathered.apply(value)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
        future = theirs[None, :] > mine[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention


def head_and_tail(length: int) -> Tensor:
    """Each rank has one piece from the front and one from the back, as under torch's ring."""
    world = dist.get_world_size()
    pieces = torch.arange(length).chunk(2 * world)
    return torch.cat([torch.cat([pieces[rank], pieces[-1 - rank]]) for rank in range(world)])
