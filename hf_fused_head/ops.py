"""The engines as opaque torch operators: schemas, fakes, and what all engines share.

An engine sees only rows that count. Here the labels are checked, ignored rows are dropped before
and put back after, and the engine is looked up by its name. Sizes that depend on data stay inside
the operators, so `torch.compile` sees fixed shapes whatever the labels are. No operator has an
autograd formula: a second derivative raises instead of being wrong.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from hf_fused_head.options import (
    Needs,
    Operands,
    RowStats,
    accumulation_dtype,
    resolve_impl,
    triton_obstacle,
)

_ENGINES = {
    "reference": "hf_fused_head.reference",
    "torch": "hf_fused_head.bounded",
    "triton": "hf_fused_head.fused",
}

# How every operator spells the head and the run.
_HEAD = (
    "Tensor[] inputs, Tensor[] weights, Tensor? bias, Tensor? class_weight, Tensor labels, "
    "int ignore_index, float logit_scale, float? softcap"
)
_RUN = "str impl, int budget_bytes"
_STATS = "Tensor nll, Tensor lse, Tensor smooth, Tensor entropy, Tensor correct"


def _engine(impl: str, inputs: list[Tensor]) -> ModuleType:
    choice = resolve_impl(impl, inputs[0].device, inputs[0].dtype)
    return importlib.import_module(_ENGINES[choice.impl])


def kept_rows(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor | None:
    """The rows that count, [num_valid] int64; None when all do. One host read.

    Args:
        labels: [...], int64.
        ignore_index: The label of rows that do not count.
        vocab_size: Labels lie in `[0, vocab_size)`.

    Raises:
        ValueError: If a label that counts is out of range.
    """
    flat = labels.reshape(-1)
    keep = flat != ignore_index
    bad = keep & ((flat < 0) | (flat >= vocab_size))
    num_valid, num_bad = torch.stack((keep.sum(), bad.sum())).tolist()
    if num_bad:
        first = int(bad.nonzero()[0, 0])
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), labels.shape))
        raise ValueError(
            f"`target` must hold class ids in [0, {vocab_size}) or ignore_index={ignore_index}, "
            f"got {int(flat[first])} at position {index}: mark tokens without loss with "
            "ignore_index and check that the tokenizer and the head agree on the vocabulary size"
        )
    return None if num_valid == flat.numel() else keep.nonzero()[:, 0]


def multiply_(tensor: Tensor, factor: Tensor) -> Tensor:
    """`tensor *= factor`; the Triton engine spares the pass when the factor turns out to be 1."""
    if tensor.is_cuda and triton_obstacle("cuda", tensor.dtype) is None:
        return importlib.import_module(_ENGINES["triton"]).multiply_(tensor, factor)
    return tensor.mul_(factor)


def _take(rows: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    return tensor if rows is None or tensor is None else tensor.index_select(0, rows)


def _plain(tensors: list[Tensor]) -> list[Tensor]:
    """The matrices as products take them: one of the strides is 1."""
    return [t if 1 in t.stride() else t.contiguous() for t in tensors]


def _put(rows: Tensor | None, tensor: Tensor, num_tokens: int) -> Tensor:
    """`tensor` back at its rows among all tokens, zero elsewhere; empty stays empty."""
    if rows is None or tensor.numel() == 0:
        return tensor
    full = tensor.new_zeros((num_tokens, *tensor.shape[1:]))
    return full.index_copy_(0, rows, tensor)


def _empty_stats(
    labels: Tensor, dtype: torch.dtype, smooth: bool, entropy: bool, correct: bool, zero: bool
) -> RowStats:
    num_tokens = labels.numel()
    make = torch.zeros if zero else torch.empty

    def rows(wanted: bool, kind: torch.dtype = dtype) -> Tensor:
        return make(num_tokens if wanted else 0, dtype=kind, device=labels.device)

    return RowStats(rows(True), rows(True), rows(smooth), rows(entropy), rows(correct, torch.bool))


def _empty_grads(
    inputs: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    needs: Needs,
    zero: bool,
    widen: bool,
) -> list[Tensor]:
    """Gradients without values: shapes and dtypes of the protocol."""
    parameters = [*inputs, *weights, inputs[0] if bias is None else bias]
    wanted = [*needs.inputs, *needs.weights, needs.bias]
    grads = []
    for parameter, need in zip(parameters, wanted, strict=True):
        dtype = _gradient_dtype(parameter.dtype, widen)
        shape = parameter.shape if need else (0,)
        make = parameter.new_zeros if zero else parameter.new_empty
        grads.append(make(shape, dtype=dtype))
    return grads


def _gradient_dtype(dtype: torch.dtype, widen: bool) -> torch.dtype:
    # A loss scale arrives with the upstream gradient only: before it float16 would underflow.
    return torch.float32 if widen and dtype == torch.float16 else dtype


def _no_autocast(tensor: Tensor) -> torch.autocast:
    # An operator's body runs under the caller's autocast, which would round its products.
    return torch.autocast(tensor.device.type, enabled=False)


@torch.library.custom_op(
    "hf_fused_head::row_stats",
    mutates_args=(),
    schema=f"({_HEAD}, {_RUN}, bool smooth, bool entropy, bool correct)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def row_stats(
    inputs,
    weights,
    bias,
    class_weight,
    labels,
    ignore_index,
    logit_scale,
    softcap,
    impl,
    budget_bytes,
    smooth,
    entropy,
    correct,
):
    """Statistics per token, zero where ignored: [N] each, [0] where not asked for."""
    engine = _engine(impl, inputs)
    rows = kept_rows(labels, ignore_index, weights[0].shape[0])
    if labels.numel() == 0 or (rows is not None and rows.numel() == 0):
        dtype = accumulation_dtype(inputs[0].dtype)
        return tuple(_empty_stats(labels, dtype, smooth, entropy, correct, zero=True))
    kept = _plain([_take(rows, hidden) for hidden in inputs])
    operands = Operands(kept, _plain(weights), bias, class_weight, logit_scale, softcap)
    targets = _take(rows, labels.reshape(-1))
    with _no_autocast(labels):
        stats = engine.forward(operands, targets, budget_bytes, smooth, entropy, correct)
    return tuple(_put(rows, value, labels.numel()) for value in stats)


@row_stats.register_fake
def _(
    inputs,
    weights,
    bias,
    class_weight,
    labels,
    ignore_index,
    logit_scale,
    softcap,
    impl,
    budget_bytes,
    smooth,
    entropy,
    correct,
):
    dtype = accumulation_dtype(inputs[0].dtype)
    return tuple(_empty_stats(labels, dtype, smooth, entropy, correct, zero=False))


@torch.library.custom_op(
    "hf_fused_head::stats_and_grads",
    mutates_args=(),
    schema=f"({_HEAD}, {_RUN}, Tensor nll_weight, Tensor? smooth_weight, Tensor? z_weight, "
    "bool[] need_inputs, bool[] need_weights, bool need_bias, bool entropy, bool correct)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
)
def stats_and_grads(
    inputs,
    weights,
    bias,
    class_weight,
    labels,
    ignore_index,
    logit_scale,
    softcap,
    impl,
    budget_bytes,
    nll_weight,
    smooth_weight,
    z_weight,
    need_inputs,
    need_weights,
    need_bias,
    entropy,
    correct,
):
    """Statistics, and the gradients of `sum_t a_t nll_t + b_t smooth_t + c_t lse_t^2`."""
    engine = _engine(impl, inputs)
    needs = Needs(need_inputs, need_weights, need_bias)
    smooth = smooth_weight is not None
    rows = kept_rows(labels, ignore_index, weights[0].shape[0])
    if labels.numel() == 0 or (rows is not None and rows.numel() == 0):
        dtype = accumulation_dtype(inputs[0].dtype)
        stats = _empty_stats(labels, dtype, smooth, entropy, correct, zero=True)
        return (*stats, _empty_grads(inputs, weights, bias, needs, zero=True, widen=True))
    kept = _plain([_take(rows, hidden) for hidden in inputs])
    operands = Operands(kept, _plain(weights), bias, class_weight, logit_scale, softcap)
    targets = _take(rows, labels.reshape(-1))
    row_weights = [_take(rows, weight) for weight in (nll_weight, smooth_weight, z_weight)]
    with _no_autocast(labels):
        stats, grads = engine.forward_backward(
            operands, targets, *row_weights, needs, budget_bytes, entropy, correct
        )
    for index in range(len(inputs)):
        grads[index] = _put(rows, grads[index], labels.numel())
    return (*(_put(rows, value, labels.numel()) for value in stats), grads)


@stats_and_grads.register_fake
def _(
    inputs,
    weights,
    bias,
    class_weight,
    labels,
    ignore_index,
    logit_scale,
    softcap,
    impl,
    budget_bytes,
    nll_weight,
    smooth_weight,
    z_weight,
    need_inputs,
    need_weights,
    need_bias,
    entropy,
    correct,
):
    dtype = accumulation_dtype(inputs[0].dtype)
    smooth = smooth_weight is not None
    stats = _empty_stats(labels, dtype, smooth, entropy, correct, zero=False)
    needs = Needs(need_inputs, need_weights, need_bias)
    return (*stats, _empty_grads(inputs, weights, bias, needs, zero=False, widen=True))


@torch.library.custom_op(
    "hf_fused_head::row_grads",
    mutates_args=(),
    schema=f"({_HEAD}, {_RUN}, {_STATS}, Tensor g_nll, Tensor g_lse, Tensor? g_smooth, "
    "Tensor? g_entropy, bool[] need_inputs, bool[] need_weights, bool need_bias) -> Tensor[]",
)
def row_grads(
    inputs,
    weights,
    bias,
    class_weight,
    labels,
    ignore_index,
    logit_scale,
    softcap,
    impl,
    budget_bytes,
    nll,
    lse,
    smooth,
    entropy,
    correct,
    g_nll,
    g_lse,
    g_smooth,
    g_entropy,
    need_inputs,
    need_weights,
    need_bias,
):
    """Gradients of `sum_t g_nll nll + g_lse lse + g_smooth smooth + g_entropy entropy`."""
    engine = _engine(impl, inputs)
    needs = Needs(need_inputs, need_weights, need_bias)
    rows = kept_rows(labels, ignore_index, weights[0].shape[0])
    if labels.numel() == 0 or (rows is not None and rows.numel() == 0):
        return _empty_grads(inputs, weights, bias, needs, zero=True, widen=False)
    kept = _plain([_take(rows, hidden) for hidden in inputs])
    operands = Operands(kept, _plain(weights), bias, class_weight, logit_scale, softcap)
    targets = _take(rows, labels.reshape(-1))
    values = (nll, lse, smooth, entropy, correct)
    stats = RowStats(*(_take(rows, value) if value.numel() else value for value in values))
    upstream = [_take(rows, grad) for grad in (g_nll, g_lse, g_smooth, g_entropy)]
    with _no_autocast(labels):
        grads = engine.backward(operands, targets, stats, *upstream, needs, budget_bytes)
    for index in range(len(inputs)):
        grads[index] = _put(rows, grads[index], labels.numel())
    return grads


@row_grads.register_fake
def _(
    inputs,
    weights,
    bias,
    class_weight,
    labels,
    ignore_index,
    logit_scale,
    softcap,
    impl,
    budget_bytes,
    nll,
    lse,
    smooth,
    entropy,
    correct,
    g_nll,
    g_lse,
    g_smooth,
    g_entropy,
    need_inputs,
    need_weights,
    need_bias,
):
    needs = Needs(need_inputs, need_weights, need_bias)
    return _empty_grads(inputs, weights, bias, needs, zero=False, widen=False)
