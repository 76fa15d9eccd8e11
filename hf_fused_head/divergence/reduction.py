"""From the divergence of every token to the loss that was asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def item_sum(
    reduction: str, num_tokens: int, mask: Tensor | None, num_items: int | Tensor | None
) -> int | Tensor:
    """What the sum over tokens is divided by.

    Args:
        reduction: "mean" or "sum".
        num_tokens: Tokens, masked ones included.
        mask: [T], bool, or None.
        num_items: With "mean", what it is divided by instead of the tokens that count.
    """
    if reduction == "sum":
        return 1
    if isinstance(num_items, Tensor):
        return num_items.detach().reshape(())
    if num_items is not None:
        return num_items
    return num_tokens if mask is None else mask.sum()


def reduced(per_token: Tensor, reduction: str, items: int | Tensor) -> Tensor:
    """The loss: 0-d, or `per_token` as it is.

    Args:
        per_token: Of any shape, 0 where masked.
        reduction: "mean", "sum" or "none".
        items: What the sum is divided by.
    """
    if reduction == "none":
        return per_token
    if isinstance(items, Tensor):
        items = items.to(per_token.device)
    return per_token.sum() / items


def row_weights(per_token: Tensor, items: int | Tensor) -> Tensor:
    """The factor of every token in a scalar loss, in the shape of `per_token`."""
    if isinstance(items, Tensor):
        items = items.to(per_token.device)
    return torch.ones_like(per_token) / items
