"""Records that a kernel takes as one argument each.

Inside a kernel a field is a pointer for a tensor, a scalar for a number, and a compile-time None
where something is absent. `RowSums`, `RowFactors`, `RowWeights` and `RowOutputs` are passed in the
same way. Two details follow from Triton:

* A launcher passes `tuple(record)`, and the kernel restores the names, `RowSums(*sums)`: a launch
  costs the host 0.5 us less with it than with a NamedTuple (Triton 3.6).
* A record whose fields may be None is never None itself, but holds None in every field: Triton 3.6
  cannot test a tuple that holds a None for `is None`.

Sizes that change from batch to batch stay arguments of their own: `do_not_specialize` names whole
arguments, and without it a new size may compile one more kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from hf_fused_head.kernels.operands import Head, RowFactors, RowSums


class MatrixPair(NamedTuple):
    """Two matrices to be multiplied, `hidden @ weight.T`, with unit stride along `size`."""

    hidden: Tensor  # [T, size]
    weight: Tensor  # [V, size]
    stride_hidden_t: int
    stride_weight_v: int
    size: int


class LogitOptions(NamedTuple):
    """What makes logits of products; None where an option is not used.

    logits = softcap * tanh(logit_scale * (product + bias) / softcap) * row_scale
    """

    bias: Tensor | None  # [V]
    class_weight: Tensor | None  # [V], for the smoothing term
    logit_scale: float | None
    softcap: float | None
    row_scale: Tensor | None  # [T] float32


class StoredTile(NamedTuple):
    """Memory for a tile of exponents or gradients, with unit stride along V."""

    ptr: Tensor  # [T, V]
    stride_t: int


class Launch(NamedTuple):
    """What all tiles of a launch share; made inside the kernel, of its arguments."""

    num_tokens: Any
    local_vocab_size: Any  # rows of the launch's weight: this rank's shard, or a window of it
    labels: Any  # [T] int64
    anchor: Any  # [T] float32: what exponents are taken around; the lse with row factors
    vocab_start: Any  # first row of the window
    logit_options: LogitOptions
    sums: RowSums
    gradient: RowFactors


def pair_of(head: Head) -> tuple:
    """The fields of the `MatrixPair` of hidden states and weight."""
    hidden, weight = head.hidden, head.weight
    return tuple(MatrixPair(hidden, weight, hidden.stride(0), weight.stride(0), hidden.shape[1]))


def low_pair_of(head: Head) -> tuple | None:
    """The fields of the low-rank `MatrixPair`, if the head has one."""
    hidden, weight = head.low, head.low_weight
    if hidden is None or weight is None:
        return None
    return tuple(MatrixPair(hidden, weight, hidden.stride(0), weight.stride(0), hidden.shape[1]))


def options_of(head: Head) -> tuple:
    """The fields of the head's `LogitOptions`; a scale of 1 counts as absent."""
    return tuple(
        LogitOptions(
            head.bias,
            head.class_weight,
            None if head.logit_scale == 1.0 else float(head.logit_scale),
            None if head.softcap is None else float(head.softcap),
            head.row_scale,
        )
    )


def stored_tile(store: Tensor | None) -> tuple | None:
    """The fields of the `StoredTile` of a store, if there is one."""
    return None if store is None else tuple(StoredTile(store, store.stride(0)))
