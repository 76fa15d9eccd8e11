"""Checks of every tensor argument of the divergences, once, at the door, under public names."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from hf_fused_head.options import FLOAT_DTYPES, Impl
from hf_fused_head.transforms import in_transform
from hf_fused_head.validation import check_num_items


def check_pair(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    mask: Tensor | None,
) -> None:
    """Shapes, dtypes and devices of two heads; names are those of `linear_kl_div`.

    Args:
        student: Hidden states, weight and bias.
        teacher: The same.
        mask: Tokens that count, or None.
    """
    for name, head in (("student", student), ("teacher", teacher)):
        _check_head(name, *head, student[0])
    tokens = student[0].shape[:-1]
    if teacher[0].shape[:-1] != tokens:
        raise ValueError(
            f"`teacher` must have shape {(*tokens, teacher[0].shape[-1])}, got "
            f"{tuple(teacher[0].shape)}: one hidden state of the teacher for each of the student"
        )
    vocab_size, teacher_vocab_size = student[1].shape[0], teacher[1].shape[0]
    if teacher_vocab_size != vocab_size:
        raise ValueError(
            f"`teacher_weight` must have the {vocab_size} rows of `student_weight`, got "
            f"{teacher_vocab_size}: the classes of both heads must be the same; cut off the rows "
            "that only pad a vocabulary, student_weight[:vocab_size]"
        )
    _check_mask(mask, student[0], tuple(tokens))


def check_sparse(
    log_probs: Tensor,
    teacher_log_probs: Tensor,
    tail: bool,
    mask: Tensor | None,
    num_items: int | Tensor | None,
) -> None:
    """The arguments of `sparse_kl_div` under their names."""
    for name, tensor in (("log_probs", log_probs), ("teacher_log_probs", teacher_log_probs)):
        _check_dtype(name, tensor)
    if log_probs.dim() == 0 or log_probs.shape[-1] == 0:
        raise ValueError(
            f"`log_probs` must have shape (..., K) with at least one class, got "
            f"{tuple(log_probs.shape)}: ask token_log_probs for K candidates a token"
        )
    if teacher_log_probs.shape != log_probs.shape:
        raise ValueError(
            f"`teacher_log_probs` must have shape {tuple(log_probs.shape)}, got "
            f"{tuple(teacher_log_probs.shape)}: both hold the same K classes of every token"
        )
    _check_device("teacher_log_probs", teacher_log_probs, log_probs)
    if not isinstance(tail, bool):
        raise TypeError(
            f"`tail` must be a bool, got {tail!r}: True adds a class for the mass outside the K"
        )
    _check_mask(mask, log_probs, tuple(log_probs.shape[:-1]))
    check_num_items(num_items)


def check_impl(impl: str) -> str:
    """The engine that a name means here, "torch" or "reference".

    Args:
        impl: A name of the interface.
    """
    if impl not in get_args(Impl):
        raise ValueError(
            f"`impl` must be one of {get_args(Impl)}, got {impl!r}: 'auto' picks a fitting one"
        )
    if impl == "triton":
        raise NotImplementedError(
            "`impl` must be 'auto', 'torch' or 'reference' for a divergence, got 'triton': no "
            "Triton kernel computes one; use impl='torch', which runs on any device"
        )
    return "torch" if impl == "auto" else impl


def refuse_transforms(name: str) -> None:
    """Raises inside `torch.func` and with dual tensors.

    Args:
        name: Of the public function.
    """
    if in_transform():
        raise NotImplementedError(
            f"`{name}` must be called outside of torch.func and of dual tensors, got a call in a "
            "transform or in forward mode: use torch.autograd in reverse mode, or F.linear and "
            "F.kl_div inside the transform"
        )


def _check_head(
    name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor
) -> None:
    _check_dtype(name, hidden)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"`{name}_weight` must have shape (vocab, hidden) with at least one row and column, "
            f"got {tuple(weight.shape)}: pass the head's matrix as nn.Linear stores it"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"`{name}` must have shape (..., {weight.shape[1]}), got {tuple(hidden.shape)}: its "
            f"last dimension is the columns of `{name}_weight`"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"`{name}_bias` must have shape {(weight.shape[0],)}, got {tuple(bias.shape)}: it has "
            f"one entry per row of `{name}_weight`"
        )
    for part, tensor in ((f"{name}_weight", weight), (f"{name}_bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"`{part}` must have the dtype of `{name}`, {hidden.dtype}, got {tensor.dtype}: "
                "convert one of them or use torch.autocast"
            )
    for part, tensor in ((name, hidden), (f"{name}_weight", weight), (f"{name}_bias", bias)):
        if tensor is not None:
            _check_device(part, tensor, first)


def _check_mask(mask: Tensor | None, first: Tensor, tokens: tuple[int, ...]) -> None:
    if mask is None:
        return
    if tuple(mask.shape) != tokens:
        raise ValueError(
            f"`mask` must have shape {tokens}, got {tuple(mask.shape)}: one entry per token"
        )
    if mask.dtype != torch.bool:
        raise TypeError(f"`mask` must be bool, got {mask.dtype}: call mask.bool()")
    _check_device("mask", mask, first)


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"`{name}` must be float16, bfloat16, float32 or float64, got {tensor.dtype}: "
            "convert it"
        )


def _check_device(name: str, tensor: Tensor, first: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(f"`{name}` must be on {first.device}, got {tensor.device}: move it there")
