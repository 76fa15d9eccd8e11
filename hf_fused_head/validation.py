"""Checks of every tensor argument, once, at the door, under the names of the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fused_head.options import FLOAT_DTYPES, STAT_NAMES
from hf_fused_head.planning.problem import DEFAULT_MEMORY_BUDGET_MIB
from hf_fused_head.transforms import in_transform, is_differentiated


def check_arguments(
    pairs: list[tuple[Tensor, Tensor]],
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    num_items: int | Tensor | None,
    memory_budget_mib: float | None,
    stats: tuple[str, ...],
    sharded: bool,
) -> None:
    """Every shape, dtype and device, once; names are those of `linear_cross_entropy`.

    What takes knowing the other ranks' rows is left to `ops`: with `sharded`, that there are rows
    here at all, and the length of `weight`.
    """
    vocab_size = pairs[0][1].shape[0] if pairs[0][1].dim() == 2 else 0
    _check_target_dtype(target, pairs[0][0])
    for hidden, matrix in pairs:
        _check_pair(hidden, matrix, pairs[0][0], vocab_size, target, sharded)
    whole = None if sharded else weight
    for name, vector in (("linear_bias", bias), ("weight", whole)):
        if vector is not None and tuple(vector.shape) != (vocab_size,):
            raise ValueError(
                f"`{name}` must have shape {(vocab_size,)}, got {tuple(vector.shape)}: "
                "it has one entry per row of `linear_weight`"
            )
    _check_same("linear_bias", bias, pairs[0][0])
    if weight is not None and not weight.is_floating_point():
        raise TypeError(f"`weight` must be floating point, got {weight.dtype}: call weight.float()")
    if weight is not None and weight.device != target.device:
        raise ValueError(f"`weight` must be on {target.device}, got {weight.device}: move it there")
    if weight is not None and is_differentiated(weight):
        raise NotImplementedError(
            "`weight` must not require grad, got one that is differentiated: class weights are "
            "constants, pass weight.detach()"
        )
    check_num_items(num_items)
    check_memory_budget(memory_budget_mib)
    unknown = [name for name in stats if name not in STAT_NAMES]
    if unknown:
        raise ValueError(
            f"`stats` must name some of {STAT_NAMES}, got {unknown[0]!r}: leave it out"
        )


def _check_target_dtype(target: Tensor, hidden: Tensor) -> None:
    if target.dtype == torch.int64:
        return
    if not target.is_floating_point():
        raise TypeError(f"`target` must be int64 class ids, got {target.dtype}: call target.long()")
    if target.dim() == hidden.dim():
        raise NotImplementedError(
            f"`target` must be int64 class ids, got class probabilities, {target.dtype} of shape "
            f"{tuple(target.shape)}: use F.linear and F.cross_entropy, which take them"
        )
    raise TypeError(
        f"`target` must be int64 class ids, got {target.dtype} of shape {tuple(target.shape)}: "
        "class ids are made as integers, float32 holds none exactly beyond 2**24; class "
        "probabilities, one number for each class, take F.linear and F.cross_entropy"
    )


def _check_pair(
    hidden: Tensor,
    matrix: Tensor,
    first: Tensor,
    vocab_size: int,
    target: Tensor,
    sharded: bool,
) -> None:
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"`input` must be float16, bfloat16, float32 or float64, got {hidden.dtype}: convert it"
        )
    if matrix.dim() > 2:
        raise NotImplementedError(
            f"`linear_weight` must have shape (vocab, hidden), got {tuple(matrix.shape)}: use "
            "torch.nn.functional.linear_cross_entropy for the heads of a K-dimensional loss; one "
            "head takes `input` [..., hidden] and `target` [...] of any number of dimensions"
        )
    empty = vocab_size == 0 and not sharded
    if matrix.dim() != 2 or matrix.shape[0] != vocab_size or empty:
        raise ValueError(
            f"`linear_weight` must have shape (vocab, hidden) with a vocabulary of at least one, "
            f"got {tuple(matrix.shape)}: pass the head's matrix as nn.Linear stores it"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != matrix.shape[1] or matrix.shape[1] == 0:
        raise ValueError(
            f"`input` must have shape (..., {matrix.shape[1]}) with a hidden size of at least one, "
            f"got {tuple(hidden.shape)}: its last dimension is the columns of `linear_weight`"
        )
    if tuple(target.shape) != tuple(hidden.shape[:-1]):
        raise ValueError(
            f"`target` must have shape {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}: "
            "one class id per hidden state, shifted by the caller"
        )
    if target.device != hidden.device:
        raise ValueError(f"`target` must be on {hidden.device}, got {target.device}: move it there")
    _check_same("input", hidden, first)
    _check_same("linear_weight", matrix, first)


def _check_same(name: str, tensor: Tensor | None, first: Tensor) -> None:
    if tensor is None:
        return
    if tensor.dtype != first.dtype:
        raise TypeError(
            f"`{name}` must have the dtype of `input`, {first.dtype}, got {tensor.dtype}: "
            "convert one of them or use torch.autocast"
        )
    if tensor.device != first.device:
        raise ValueError(f"`{name}` must be on {first.device}, got {tensor.device}: move it there")


def check_memory_budget(memory_budget_mib: float | None) -> None:
    """The budget is a positive number or None."""
    is_number = isinstance(memory_budget_mib, (int, float)) and memory_budget_mib > 0
    if memory_budget_mib is not None and not is_number:
        raise ValueError(
            f"`memory_budget_mib` must be positive or None, got {memory_budget_mib!r}: "
            f"None means {DEFAULT_MEMORY_BUDGET_MIB}"
        )


def has_candidates(target: Tensor, hidden: Tensor) -> bool:
    """Whether `target` is [..., K], with a last dimension of candidates."""
    if target.dim() != hidden.dim() or target.dim() < 2:
        return False
    if target.shape[-1] == 0:
        raise ValueError(
            f"`target` must have at least one candidate a token, got shape {tuple(target.shape)}: "
            "pass [...] for one class a token, or [..., K]"
        )
    return True


def check_temperatures(temperature: Tensor, target: Tensor) -> None:
    """One positive number for each token; their values are read where that waits for no device."""
    if not temperature.is_floating_point():
        raise TypeError(
            f"`temperature` must be floating point, got {temperature.dtype}: call "
            "temperature.float()"
        )
    if temperature.shape != target.shape:
        raise ValueError(
            f"`temperature` must have shape {tuple(target.shape)}, got "
            f"{tuple(temperature.shape)}: pass a float, or one number for each token"
        )
    if temperature.device != target.device:
        raise ValueError(
            f"`temperature` must be on {target.device}, got {temperature.device}: move it there"
        )
    if is_differentiated(temperature):
        raise NotImplementedError(
            "`temperature` must not require grad, got one that is differentiated: it is a "
            "constant, pass temperature.detach()"
        )
    if temperature.device.type != "cpu" or torch.compiler.is_compiling() or in_transform():
        return
    if not bool(((temperature > 0) & temperature.isfinite()).all()):
        raise ValueError(
            f"`temperature` must be positive and finite at every token, got "
            f"{float(temperature.min())} among them: 1.0 leaves the logits as they are"
        )


def check_num_items(num_items: int | Tensor | None) -> None:
    """A number of items is at least 0: a number or a tensor of one element."""
    if num_items is None:
        return
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(
                f"`num_items` must be an int or a tensor of one element, got shape "
                f"{tuple(num_items.shape)}: pass the sum over devices and micro-batches"
            )
        return
    if isinstance(num_items, bool) or not isinstance(num_items, (int, float)):
        raise TypeError(
            f"`num_items` must be an int or a tensor of one element, got {num_items!r}: "
            "pass the number of tokens in the whole batch"
        )
    if num_items < 0:
        raise ValueError(
            f"`num_items` must be at least 0, got {num_items!r}: pass the number of tokens"
        )
