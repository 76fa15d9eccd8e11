"""The engines as opaque torch operators: schemas, fakes, and what all engines share.

An engine sees only rows that count. Here the labels are checked, ignored rows are dropped before
and put back after, and the engine is looked up by its name. Sizes that depend on data stay inside
the operators, so `torch.compile` sees fixed shapes whatever the labels are. No operator has an
autograd formula: a second derivative raises instead of being wrong. Under `torch.vmap` an operator
runs once for each part of the batch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_fused_head.distributed.vocab_parallel import (
    WHOLE,
    Terms,
    VocabShard,
    agree,
    report_failure,
)
from hf_fused_head.options import (
    Choice,
    Needs,
    Operands,
    RowStats,
    accumulation_dtype,
    resolve_impl,
    triton_obstacle,
)
from hf_fused_head.run_record import note_engine, note_schedule
from hf_fused_head.transforms import loop, loop_over_gradients

_ENGINES = {
    "reference": "hf_fused_head.reference",
    "torch": "hf_fused_head.bounded",
    "triton": "hf_fused_head.fused",
}

# What every operator takes first, spelled as schema and, in the same order, as `_Head`.
_HEAD = (
    "Tensor[] inputs, Tensor[] weights, Tensor? bias, Tensor? class_weight, Tensor labels, "
    "int ignore_index, float logit_scale, float? softcap, str impl, int budget_bytes, str group, "
    "bool complete_hidden"
)
_STATS = "Tensor nll, Tensor lse, Tensor smooth, Tensor entropy, Tensor correct, Tensor correction"
_NEEDS = "bool[] need_inputs, bool[] need_weights, bool need_bias"


class _Head(NamedTuple):
    """The first arguments of every operator."""

    inputs: list[Tensor]  # [N, H_i] each
    weights: list[Tensor]  # [V, H_i] each
    bias: Tensor | None
    class_weight: Tensor | None
    labels: Tensor  # [...], N in all; the shape is for messages
    ignore_index: int
    logit_scale: float
    softcap: float | None
    impl: str
    budget_bytes: int
    group: str  # name of a process group; "" for a head on one rank
    complete_hidden: bool  # that the ranks sum the gradients of `inputs`

    @classmethod
    def split(cls, arguments: tuple[Any, ...]) -> tuple[_Head, tuple[Any, ...]]:
        """The head, and what an operator takes after it."""
        size = len(cls._fields)
        return cls(*arguments[:size]), arguments[size:]

    @property
    def num_tokens(self) -> int:
        return self.labels.numel()

    def choice(self) -> Choice:
        """The engine that was asked for."""
        return resolve_impl(self.impl, self.labels.device, self.inputs[0].dtype)

    def engine(self) -> ModuleType:
        """The module of the engine that was asked for."""
        choice = self.choice()
        note_engine(choice)
        return importlib.import_module(_ENGINES[choice.impl])

    def shard(self, *terms: Any, smoothing: float = 0.0) -> VocabShard:
        """This rank's part of the vocabulary; ranks that mean different losses all raise.

        Args:
            terms: What is wanted, which has to be the same on all ranks.
            smoothing: One more option of the loss, where the operator has it.
        """
        if not self.group:
            return WHOLE
        try:
            impl = self.choice().impl
        except (ValueError, NotImplementedError):
            report_failure(self.group, self.labels.device)
            raise
        sizes = [matrix.shape[1] for matrix in self.weights]
        options = (self.ignore_index, self.logit_scale, self.softcap, impl, self.budget_bytes)
        shared = None if self.class_weight is None else tuple(self.class_weight.shape)
        shard = agree(
            self.group,
            self.weights[0].shape[0],
            self.labels,
            Terms(
                input=(tuple(self.labels.shape), sizes, self.inputs[0].dtype),
                weight=shared,
                linear_bias=self.bias is not None,
                options=(*options, self.complete_hidden, smoothing),
                wanted=terms,
            ),
            self.complete_hidden,
        )
        vocab_size = shard.total(self.weights[0].shape[0])
        if shared not in (None, (vocab_size,)):
            raise ValueError(
                f"`weight` must have shape {(vocab_size,)}, got {shared}: it has one entry for "
                "each class of the whole vocabulary, on every rank"
            )
        return shard

    def kept_rows(self, shard: VocabShard) -> Tensor | None:
        """The rows that count, [num_valid] int64; None when all do."""
        vocab_size = shard.total(self.weights[0].shape[0])
        return kept_rows(self.labels, self.ignore_index, vocab_size)

    def operands(self, rows: Tensor | None, shard: VocabShard) -> Operands:
        """What an engine takes: matrices with a stride of 1, at the rows that count."""
        inputs = _plain([_take(rows, hidden) for hidden in self.inputs])
        options = (self.bias, self.class_weight, self.logit_scale, self.softcap, shard)
        return Operands(inputs, _plain(self.weights), *options)

    def no_autocast(self) -> torch.autocast:
        """An operator's body runs under the caller's autocast, which would round its products."""
        return torch.autocast(self.labels.device.type, enabled=False)

    def stats(
        self, make: Any, smooth: bool, entropy: bool, correct: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Statistics of all tokens by `torch.empty` or `torch.zeros`."""
        dtype = accumulation_dtype(self.inputs[0].dtype)

        def rows(wanted: bool, kind: torch.dtype = dtype) -> Tensor:
            return make(self.num_tokens if wanted else 0, dtype=kind, device=self.labels.device)

        nll, lse, correction = rows(True), rows(True), rows(True)
        return nll, lse, rows(smooth), rows(entropy), rows(correct, torch.bool), correction

    def grads(self, make: Any, needs: Needs, widen: bool) -> list[Tensor]:
        """Gradients by `torch.empty` or `torch.zeros`; [0] where nobody needs one."""
        parameters = [
            *self.inputs,
            *self.weights,
            self.inputs[0] if self.bias is None else self.bias,
        ]
        wanted = [*needs.inputs, *needs.weights, needs.bias]
        grads = []
        for parameter, want in zip(parameters, wanted, strict=True):
            # A loss scale arrives with the upstream gradient: before it float16 would underflow.
            half = widen and parameter.dtype == torch.float16
            dtype = torch.float32 if half else parameter.dtype
            shape = parameter.shape if want else (0,)
            grads.append(make(shape, dtype=dtype, device=parameter.device))
        return grads


def kept_rows(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor | None:
    """The rows that count, [num_valid] int64; None when all do. One wait for the device.

    Args:
        labels: [...], int64.
        ignore_index: The label of rows that do not count.
        vocab_size: Labels lie in `[0, vocab_size)`.

    Raises:
        ValueError: If a label that counts is out of range.
    """
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "a CUDA graph cannot capture this loss: the host has to learn how many labels count; "
            "use a scalar reduction with impl='triton', which can be captured, or keep the loss "
            "outside of the graph"
        )
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


def _ask(head: _Head, shard: VocabShard, question: Callable[..., Any]) -> tuple[Tensor | None, Any]:
    """Has the engine answer for all rows if few are ignored, else for those that count.

    Args:
        head: The call.
        shard: This rank's part of its vocabulary.
        question: Takes the engine, its operands, labels, rows that they are of, maybe an attempt.

    Returns:
        The rows that the answer is for, None for all; and the answer, None where no row counts.
    """
    engine, rows_here = head.engine(), head.weights[0].shape[0]
    flat = head.labels.reshape(-1)
    if hasattr(engine, "begin") and head.num_tokens > 0:
        # Waiting for a number that decides little would leave the device without work.
        vocab_size = shard.total(rows_here)
        attempt = engine.begin(flat, head.ignore_index, vocab_size, lambda: head.kept_rows(shard))
        labels = shard.columns_of(attempt.labels, rows_here)
        answer = question(engine, head.operands(None, shard), labels, None, attempt=attempt)
        if answer is not None:
            return None, answer
        rows = attempt.kept_rows()
    else:
        rows = head.kept_rows(shard)
    if _no_row(rows, head):
        note_schedule(None)
        return rows, None
    labels = shard.columns_of(_take(rows, flat), rows_here)
    return rows, question(engine, head.operands(rows, shard), labels, rows)


def multiply_(values: Tensor, factor: Tensor) -> Tensor:
    """`values *= factor` in place; on the device, where a kernel of ours sees a factor of 1."""
    if values.is_cuda and triton_obstacle(values.device.type, values.dtype) is None:
        return importlib.import_module(_ENGINES["triton"]).multiply_(values, factor)
    return values.mul_(factor)


def _no_row(rows: Tensor | None, head: _Head) -> bool:
    return head.num_tokens == 0 or (rows is not None and rows.numel() == 0)


def _take(rows: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _take_each(rows: Tensor | None, tensors: tuple[Any, ...]) -> list[Any]:
    """As `_take`; what is None or empty stays so."""
    return [t if t is None or t.numel() == 0 else _take(rows, t) for t in tensors]


def _put(rows: Tensor | None, tensor: Tensor, num_tokens: int) -> Tensor:
    """`tensor` back at its rows among all tokens, zero elsewhere; empty stays empty."""
    if rows is None or tensor.numel() == 0:
        return tensor
    full = tensor.new_zeros((num_tokens, *tensor.shape[1:]))
    return full.index_copy_(0, rows, tensor)


def _plain(tensors: list[Tensor]) -> list[Tensor]:
    """The matrices as products take them: one of the strides is 1."""
    return [t if 1 in t.stride() else t.contiguous() for t in tensors]


def _put_inputs(rows: Tensor | None, grads: list[Tensor], head: _Head) -> list[Tensor]:
    """Gradients with those of the inputs, which come first, back among all tokens."""
    count = len(head.inputs)
    return [*(_put(rows, grad, head.num_tokens) for grad in grads[:count]), *grads[count:]]


@torch.library.custom_op(
    "hf_fused_head::row_stats",
    mutates_args=(),
    schema=f"({_HEAD}, bool smooth, bool entropy, bool correct)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def row_stats(*arguments: Any) -> tuple[Tensor, ...]:
    """Statistics per token, zero where ignored: [N] each, [0] where not asked for."""
    head, wanted = _Head.split(arguments)

    def question(engine: Any, operands: Operands, labels: Tensor, _: Any, **attempt: Any) -> Any:
        return engine.forward(operands, labels, head.budget_bytes, *wanted, **attempt)

    with head.no_autocast():
        rows, stats = _ask(head, head.shard(*wanted), question)
    if stats is None:
        return head.stats(torch.zeros, *wanted)
    correction = torch.ones_like(stats.nll) if stats.correction is None else stats.correction
    return tuple(_put(rows, value, head.num_tokens) for value in (*stats[:5], correction))


@row_stats.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    head, wanted = _Head.split(arguments)
    return head.stats(torch.empty, *wanted)


@torch.library.custom_op(
    "hf_fused_head::stats_and_grads",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor nll_weight, Tensor? smooth_weight, Tensor? z_weight, {_NEEDS}, "
    "bool entropy, bool correct, float smoothing)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
)
def stats_and_grads(*arguments: Any) -> tuple[Any, ...]:
    """Statistics, and the gradients of `sum_t a_t nll_t + b_t smooth_t + c_t lse_t^2`.

    `smoothing` is the share of label smoothing in them: the host knows no more of the weights.
    """
    head, rest = _Head.split(arguments)
    weights, needs, wanted, smoothing = rest[:3], Needs(*rest[3:6]), rest[6:8], rest[8]

    def question(engine: Any, operands: Operands, labels: Tensor, rows: Any, **attempt: Any) -> Any:
        part = _take_each(rows, weights)
        options = (needs, head.budget_bytes, *wanted, smoothing)
        return engine.forward_backward(operands, labels, *part, *options, **attempt)

    with head.no_autocast():
        shard = head.shard(*needs, *wanted, smoothing=smoothing)
        rows, answer = _ask(head, shard, question)
    if answer is None:
        stats = head.stats(torch.zeros, weights[1] is not None, *wanted)
        return (*stats[:5], head.grads(torch.zeros, needs, widen=True))
    stats, grads = answer
    values = (_put(rows, value, head.num_tokens) for value in stats[:5])
    return (*values, _put_inputs(rows, grads, head))


@stats_and_grads.register_fake
def _(*arguments: Any) -> tuple[Any, ...]:
    head, rest = _Head.split(arguments)
    stats = head.stats(torch.empty, rest[1] is not None, *rest[6:8])
    return (*stats[:5], head.grads(torch.empty, Needs(*rest[3:6]), widen=True))


@torch.library.custom_op(
    "hf_fused_head::row_grads",
    mutates_args=(),
    schema=f"({_HEAD}, {_STATS}, Tensor g_nll, Tensor g_lse, Tensor? g_smooth, "
    f"Tensor? g_entropy, {_NEEDS}) -> Tensor[]",
)
def row_grads(*arguments: Any) -> list[Tensor]:
    """Gradients of `sum_t g_nll nll + g_lse lse + g_smooth smooth + g_entropy entropy`."""
    head, rest = _Head.split(arguments)
    needs = Needs(*rest[10:])
    shard = head.shard(*needs, rest[8] is None, rest[9] is None)
    engine = head.engine()
    rows = head.kept_rows(shard)
    if _no_row(rows, head):
        return head.grads(torch.zeros, needs, widen=False)
    labels = shard.columns_of(_take(rows, head.labels.reshape(-1)), head.weights[0].shape[0])
    stats = RowStats(*_take_each(rows, rest[:6]))
    upstream = _take_each(rows, rest[6:10])
    options = (needs, head.budget_bytes)
    with head.no_autocast():
        grads = engine.backward(head.operands(rows, shard), labels, stats, *upstream, *options)
    return _put_inputs(rows, grads, head)


@row_grads.register_fake
def _(*arguments: Any) -> list[Tensor]:
    head, rest = _Head.split(arguments)
    return head.grads(torch.empty, Needs(*rest[10:]), widen=False)


for _operator in (row_stats, stats_and_grads, row_grads):
    _operator.register_vmap(functools.partial(loop, _operator))

# A backward with `is_grads_batched=True` reaches only the operator that takes upstream gradients.
_BATCHES = torch.library.Library("hf_fused_head", "FRAGMENT")
_BATCHES.impl("row_grads", functools.partial(loop_over_gradients, row_grads), "Batched")
