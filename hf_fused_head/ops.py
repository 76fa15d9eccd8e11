"""The engines as opaque torch operators: schemas, fakes, and what all engines share.

An engine sees only rows that count. Here the labels are checked, ignored rows are dropped before
and put back after, the schedule is planned and the engine is looked up by its name. Sizes that
depend on data stay inside the operators, so `torch.compile` sees fixed shapes whatever the labels
are. Their derivatives are attached in `autograd`; a second one raises instead of being wrong.
Under `torch.vmap` an operator runs once for each part of the batch.

    row_stats        statistics of every token
    stats_and_grads  the same, and the gradients of a scalar objective of them
    row_grads        the gradients for any upstream gradient of the statistics
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_fused_head.distributed.vocab_parallel import (
    NAMES,
    WHOLE,
    Terms,
    VocabShard,
    agree,
    report_failure,
)
from hf_fused_head.engines.protocol import Engine, Needs, Operands, Rejected, Speculation
from hf_fused_head.engines.select import Choice, engine_named, resolve_impl, triton_obstacle
from hf_fused_head.objective import DTYPES, RowStats, RowWeights, Upstream, Wanted
from hf_fused_head.options import accumulation_dtype
from hf_fused_head.planning.cards import card_of
from hf_fused_head.planning.problem import Problem
from hf_fused_head.planning.schedule import Schedule, plan
from hf_fused_head.records import flatten, schema_of, unflatten
from hf_fused_head.run_record import note_engine, note_schedule
from hf_fused_head.transforms import loop, loop_over_gradients


class HeadArguments(NamedTuple):
    """One head and its labels, as every operator takes them first."""

    inputs: list[Tensor]  # [T, H_i] each
    weights: list[Tensor]  # [local V, H_i] each
    bias: Tensor | None  # [local V]
    class_weight: Tensor | None  # [V]
    row_scale: Tensor | None  # [T], the factor on every row's logits, in the dtype of statistics
    labels: Tensor  # [...], T in all; the shape is for messages
    ignore_index: int
    logit_scale: float
    softcap: float | None
    label_smoothing: float  # its share of the objective: the host knows no more of the row weights
    impl: str
    budget_bytes: int
    group: str  # name of a process group; "" for a head on one rank
    complete_hidden: bool  # whether the ranks sum the gradients of `inputs`
    # Whether the statistics of a row are the same bits whatever other rows there are.
    batch_invariant: bool

    @property
    def num_tokens(self) -> int:
        """Rows, ignored ones included."""
        return self.labels.numel()

    def detached(self) -> HeadArguments:
        """For an operator: its gradients are attached elsewhere, not by autograd."""
        return self._replace(
            inputs=[hidden.detach() for hidden in self.inputs],
            weights=[weight.detach() for weight in self.weights],
            bias=None if self.bias is None else self.bias.detach(),
        )

    def choice(self) -> Choice:
        """The engine that `impl` means for these tensors, and why."""
        return resolve_impl(self.impl, self.labels.device, self.inputs[0].dtype)

    def shard(self, *terms: Any) -> VocabShard:
        """This rank's shard; ranks that mean different losses all raise."""
        if not self.group:
            return WHOLE
        try:
            choice = self.choice()
        except (ValueError, NotImplementedError):
            report_failure(self.group, self.labels.device)
            raise
        sizes = [matrix.shape[1] for matrix in self.weights]
        logits = (self.ignore_index, self.logit_scale, self.softcap, self.label_smoothing)
        options = (*logits, choice.impl, choice.product, self.budget_bytes)
        shared = None if self.class_weight is None else tuple(self.class_weight.shape)
        labels, names = self.labels, None
        if self.row_scale is not None:
            labels = labels.reshape(-1) + self.row_scale.float().view(torch.int32)
            names = (*NAMES, "`target` or `temperature`")
        shard = agree(
            self.group,
            self.weights[0].shape[0],
            labels,
            Terms(
                input=(tuple(self.labels.shape), sizes, self.inputs[0].dtype),
                weight=shared,
                linear_bias=self.bias is not None,
                options=(*options, self.complete_hidden, self.batch_invariant),
                wanted=terms,
            ),
            self.complete_hidden,
            names,
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
        return kept_rows(self.labels, self.ignore_index, shard.total(self.weights[0].shape[0]))

    def operands(self, rows: Tensor | None, shard: VocabShard) -> Operands:
        """What an engine takes: matrices with a stride of 1, at the rows that count."""
        inputs = _unit_stride([_take(rows, hidden) for hidden in self.inputs])
        options = (self.bias, self.class_weight, self.logit_scale, self.softcap, shard)
        row_scale = None if self.row_scale is None else _take(rows, self.row_scale)
        return Operands(inputs, _unit_stride(self.weights), *options, row_scale)

    def schedule(
        self, operands: Operands, needs: Needs | None, wanted: Wanted, per_token: bool = False
    ) -> Schedule:
        """The plan for these operands: the one place where the planner is asked."""
        sizes = [weight.shape[1] for weight in operands.weights]
        columns = [] if needs is None else zip(sizes, needs.weights, strict=True)
        choice = self.choice()
        problem = Problem(
            num_tokens=operands.inputs[0].shape[0],
            hidden_size=sum(sizes),
            vocab_size=operands.shard.largest(operands.local_vocab_size),
            dtype=operands.inputs[0].dtype,
            impl=choice.impl,
            card=card_of(self.labels.device),
            grad_hidden=needs is not None and any(needs.inputs),
            grad_weight=needs is not None and (any(needs.weights) or needs.bias),
            grad_columns=sum(size for size, need in columns if need),
            per_token=per_token,
            smoothing=self.label_smoothing if wanted.smooth else 0.0,
            softcap=operands.softcap is not None,
            class_weight=operands.class_weight is not None,
            entropy=wanted.entropy or wanted.log_sum_sq,
            batch_invariant=self.batch_invariant and needs is None,
            product=choice.product,
            sums_hidden=operands.shard.sums_hidden,
            budget_bytes=self.budget_bytes,
        )
        schedule = plan(problem.rounded())
        note_schedule(schedule)
        return schedule

    def no_autocast(self) -> torch.autocast:
        """An operator's body runs under the caller's autocast, which would round its products."""
        return torch.autocast(self.labels.device.type, enabled=False)

    def empty_stats(self, make: Any, wanted: Wanted) -> RowStats:
        """Statistics of all tokens, made by `torch.empty` or `torch.zeros`."""
        dtype = accumulation_dtype(self.inputs[0].dtype)

        def rows(present: bool, kind: torch.dtype = dtype) -> Tensor:
            return make(self.num_tokens if present else 0, dtype=kind, device=self.labels.device)

        asked = {
            name: rows(want, DTYPES.get(name, dtype)) for name, want in wanted._asdict().items()
        }
        return RowStats(rows(True), rows(True), **asked, correction=rows(True))

    def empty_grads(self, make: Any, needs: Needs, widen: bool) -> list[Tensor]:
        """Gradients, made by `torch.empty` or `torch.zeros`; [0] where not needed."""
        absent_bias = self.inputs[0] if self.bias is None else self.bias
        parameters = [*self.inputs, *self.weights, absent_bias]
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


class _Rows(NamedTuple):
    """The rows that an engine is called with."""

    engine: Engine
    index: Tensor | None  # int64; None for all rows
    operands: Operands
    labels: Tensor  # int64, columns of this rank's logits
    speculation: Speculation | None


def _rows_to_try(head: HeadArguments, shard: VocabShard) -> Iterator[_Rows]:
    """All rows on speculation, then, for an engine that rejects those, the rows that count.

    Nothing where no row counts. A generator, so that an engine is called by the operator itself.
    """
    choice, local_vocab_size = head.choice(), head.weights[0].shape[0]
    note_engine(choice)
    engine = engine_named(choice.impl)
    flat = head.labels.reshape(-1)
    speculation = None
    if head.num_tokens:
        # To wait for a number that decides little would leave the device idle.
        vocab_size = shard.total(local_vocab_size)
        speculation = engine.speculate(
            flat, head.ignore_index, vocab_size, lambda: head.kept_rows(shard)
        )
    if speculation is None:
        index = head.kept_rows(shard)
    else:
        labels = shard.columns_of(speculation.labels, local_vocab_size)
        yield _Rows(engine, None, head.operands(None, shard), labels, speculation)
        index = speculation.kept_rows()
    if _no_row(index, head):
        note_schedule(None)
        return
    labels = shard.columns_of(_take(index, flat), local_vocab_size)
    yield _Rows(engine, index, head.operands(index, shard), labels, None)


def multiply_(values: Tensor, factor: Tensor) -> Tensor:
    """`values *= factor` in place; a kernel of ours decides on the device about a factor of 1."""
    if values.is_cuda and triton_obstacle(values.device.type, values.dtype) is None:
        engine: Any = engine_named("triton")
        return engine.multiply_(values, factor)
    return values.mul_(factor)


def _no_row(index: Tensor | None, head: HeadArguments) -> bool:
    return head.num_tokens == 0 or (index is not None and index.numel() == 0)


def _take(index: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor if index is None else tensor.index_select(0, index)


def _take_each(index: Tensor | None, tensors: tuple[Tensor | None, ...]) -> list[Any]:
    """As `_take`; what is None or empty stays so."""
    return [t if t is None or t.numel() == 0 else _take(index, t) for t in tensors]


def _put(index: Tensor | None, tensor: Tensor, num_tokens: int) -> Tensor:
    """`tensor` back at its rows among all tokens, zero elsewhere; empty stays empty."""
    if index is None or tensor.numel() == 0:
        return tensor
    full = tensor.new_zeros((num_tokens, *tensor.shape[1:]))
    return full.index_copy_(0, index, tensor)


def _unit_stride(tensors: list[Tensor]) -> list[Tensor]:
    """The matrices as products take them: one of the strides is 1."""
    return [t if 1 in t.stride() else t.contiguous() for t in tensors]


def _put_inputs(index: Tensor | None, grads: list[Tensor], head: HeadArguments) -> list[Tensor]:
    """Gradients with those of the inputs, which come first, back among all tokens."""
    count = len(head.inputs)
    return [*(_put(index, grad, head.num_tokens) for grad in grads[:count]), *grads[count:]]


# All but `correction`, which a scalar loss has no use for.
_STATS = ", ".join(f"Tensor {name}" for name in RowStats._fields[:-1])


@torch.library.custom_op(
    "hf_fused_head::row_stats",
    mutates_args=(),
    schema=f"({schema_of(head=HeadArguments, wanted=Wanted)}) -> ({_STATS}, Tensor correction)",
)
def _row_stats(*arguments: Any) -> tuple[Tensor, ...]:
    head, wanted = unflatten(arguments, HeadArguments, Wanted)

    with head.no_autocast():
        for rows in _rows_to_try(head, head.shard(*wanted)):
            schedule = head.schedule(rows.operands, None, wanted)
            try:
                stats = rows.engine.row_stats(
                    rows.operands, rows.labels, wanted, schedule, rows.speculation
                )
            except Rejected:
                continue
            if stats.correction is None:
                stats = stats._replace(correction=torch.ones_like(stats.nll))
            return tuple(_put(rows.index, value, head.num_tokens) for value in stats)  # type: ignore[arg-type]
    return head.empty_stats(torch.zeros, wanted)


@_row_stats.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    head, wanted = unflatten(arguments, HeadArguments, Wanted)
    return tuple(head.empty_stats(torch.empty, wanted))  # type: ignore[arg-type]


def row_stats(head: HeadArguments, wanted: Wanted) -> RowStats:
    """Statistics per token, zero where ignored: [T] each, [0] where not asked for."""
    return RowStats(*_row_stats(*flatten(head, wanted)))


@torch.library.custom_op(
    "hf_fused_head::stats_and_grads",
    mutates_args=(),
    schema=f"({schema_of(head=HeadArguments, weights=RowWeights, needs=Needs, wanted=Wanted)})"
    f" -> ({_STATS}, Tensor[] grads)",
)
def _stats_and_grads(*arguments: Any) -> tuple[Any, ...]:
    head, weights, needs, wanted = unflatten(arguments, HeadArguments, RowWeights, Needs, Wanted)

    with head.no_autocast():
        for rows in _rows_to_try(head, head.shard(*needs, *wanted)):
            schedule = head.schedule(rows.operands, needs, wanted)
            rows_weights = RowWeights(*_take_each(rows.index, weights))
            options = (needs, wanted, schedule, rows.speculation)
            try:
                stats, grads = rows.engine.stats_and_grads(
                    rows.operands, rows.labels, rows_weights, *options
                )
            except Rejected:
                continue
            values = (_put(rows.index, value, head.num_tokens) for value in stats[:-1])
            return (*values, _put_inputs(rows.index, grads, head))
    grads = head.empty_grads(torch.zeros, needs, widen=True)
    return (*head.empty_stats(torch.zeros, wanted)[:-1], grads)


@_stats_and_grads.register_fake
def _(*arguments: Any) -> tuple[Any, ...]:
    head, _, needs, wanted = unflatten(arguments, HeadArguments, RowWeights, Needs, Wanted)
    grads = head.empty_grads(torch.empty, needs, widen=True)
    return (*head.empty_stats(torch.empty, wanted)[:-1], grads)


def stats_and_grads(
    head: HeadArguments, weights: RowWeights, needs: Needs, wanted: Wanted
) -> tuple[RowStats, list[Tensor]]:
    """Statistics, and the gradients of `sum_t a_t nll_t + b_t smooth_t + c_t lse_t^2`."""
    *stats, grads = _stats_and_grads(*flatten(head, weights, needs, wanted))
    return RowStats(*stats), grads


@torch.library.custom_op(
    "hf_fused_head::row_grads",
    mutates_args=(),
    schema=f"({schema_of(head=HeadArguments, stats=RowStats, upstream=Upstream, needs=Needs)})"
    " -> Tensor[]",
)
def _row_grads(*arguments: Any) -> list[Tensor]:
    head, stats, upstream, needs = unflatten(arguments, HeadArguments, RowStats, Upstream, Needs)
    shard = head.shard(*needs, upstream.smooth is None, upstream.entropy is None)
    engine = engine_named(head.choice().impl)
    index = head.kept_rows(shard)
    if _no_row(index, head):
        return head.empty_grads(torch.zeros, needs, widen=False)
    labels = _take(index, head.labels.reshape(-1))
    operands = head.operands(index, shard)
    wanted = Wanted(entropy=upstream.entropy is not None)
    with head.no_autocast():
        grads = engine.row_grads(
            operands,
            shard.columns_of(labels, operands.local_vocab_size),
            RowStats(*_take_each(index, stats)),
            Upstream(*_take_each(index, upstream)),
            needs,
            head.schedule(operands, needs, wanted, per_token=True),
        )
    return _put_inputs(index, grads, head)


@_row_grads.register_fake
def _(*arguments: Any) -> list[Tensor]:
    head, _, _, needs = unflatten(arguments, HeadArguments, RowStats, Upstream, Needs)
    return head.empty_grads(torch.empty, needs, widen=False)


def row_grads(
    head: HeadArguments, stats: RowStats, upstream: Upstream, needs: Needs
) -> list[Tensor]:
    """Gradients of `sum_t g_nll nll + g_lse lse + g_smooth smooth + g_entropy entropy`."""
    return _row_grads(*flatten(head, stats, upstream, needs))


for _operator in (_row_stats, _stats_and_grads, _row_grads):
    _operator.register_vmap(functools.partial(loop, _operator))

# A backward with `is_grads_batched=True` reaches only the operator that takes upstream gradients.
_BATCHES = torch.library.Library("hf_fused_head", "FRAGMENT")
_BATCHES.impl("row_grads", functools.partial(loop_over_gradients, _row_grads), "Batched")
