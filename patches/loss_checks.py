"""Whether what reaches the loss is what the head has made and what the forward was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What FSDP's casts, moves to another device and copies leave in the graph.
_COPIES = ("ToCopyBackward0", "CloneBackward0", "AliasBackward0")


def is_copy(loss: Tensor, made: Tensor) -> bool:
    """Whether a tensor is another one, cast, moved or copied."""
    if not made.requires_grad or not loss.requires_grad:
        return not made.requires_grad and torch.equal(loss, made.to(loss))
    node: Any = loss.grad_fn
    while node is not None and node is not made.grad_fn:
        node = node.next_functions[0][0] if node.name() in _COPIES else None
    return node is not None


class WithValue(torch.autograd.Function):
    """The value of the second argument on the path of the first."""

    @staticmethod
    def forward(ctx: Any, path: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = path.dtype
        # Not `clone`, for the reason given in `FinishedLoss`.
        return value[None].sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def same_values(name: str, expected: Tensor, got: Any) -> bool:
    """Whether `got` is the expected tensor, flattened or moved to another device.

    Args:
        name: What they are, for people: a compiled forward says itself where they differ.
        expected: As the forward was given it.
        got: As the loss gets it.
    """
    if not isinstance(got, Tensor) or got.numel() != expected.numel():
        return False
    if torch.compiler.is_compiling():
        # Neither addresses nor values are known yet: the compiled code compares them.
        same = (got.reshape(-1).to(expected.device) == expected.reshape(-1)).all()
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            same,
            f"the loss must get the {name} that the forward starts with, got another one: this "
            "model changes it on the way, leave it stock (remove_patch)",
        )
        return True
    if got.data_ptr() == expected.data_ptr() and got.is_contiguous():
        return True
    return torch.equal(got.reshape(-1).to(expected.device), expected.reshape(-1))
