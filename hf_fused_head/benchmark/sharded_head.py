"""A head sharded along the vocabulary beside the same rows alone: what communication costs.

With R ranks and V words, "sharded" is the loss of V words on V/R rows a rank; "alone" is the loss
of V/R words on the same rows, with no group. Both multiply the same matrices, so their ratio is
what a GPU keeps of its speed: the efficiency.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import torch

from hf_fused_head.benchmark import accuracy, contenders, measure
from hf_fused_head.benchmark.accuracy import Result
from hf_fused_head.benchmark.contenders import Entrant, Step
from hf_fused_head.benchmark.ranks import Ranks
from hf_fused_head.benchmark.suite import Guard, Record, Settings, clear
from hf_fused_head.benchmark.wire import given_bytes, sent
from hf_fused_head.benchmark.workloads import Batch, Workload, make_batch
from hf_fused_head.options import Impl

KIND = "sharded head"
_MODE = "fwd+bwd"


@dataclass
class ShardedRecord(Record):
    """One of the two; times and memory of the slowest and the fullest rank."""

    ranks: int = 1
    rows: int = 0
    efficiency: float | None = None
    forward_sent_bytes: int | None = None
    backward_sent_bytes: int | None = None
    forward_sent_bytes_per_token: float | None = None


@dataclass
class _Lane:
    record: ShardedRecord
    entrant: Entrant
    batch: Batch
    step: Step | None = None


def protocol(settings: Settings, device: torch.device) -> dict[str, object]:
    """How `measure_head` measures, in words."""
    return {
        **settings.protocol(device),
        "order": "alone and sharded in turn, every repeat, all ranks at once",
        "time": "median over repeats of the slowest rank; min and max beside it",
        "memory": "fullest rank: peak of torch's allocator beyond inputs",
        "sent": "bytes that a rank gives to collectives, counted as they are called",
    }


def measure_head(
    workload: Workload,
    dtype_name: str,
    impl: Impl,
    budget_mib: int | None,
    settings: Settings,
    ranks: Ranks,
) -> list[ShardedRecord]:
    """Checks and times the head of a workload on all ranks.

    Args:
        workload: The whole head.
        dtype_name: Of hidden states and head.
        impl: Of both ways.
        budget_mib: Workspace of a rank; None for the default.
        settings: How it is measured.
        ranks: Of this process.

    Returns:
        The records of "alone" and "sharded", the same on every rank.

    Raises:
        ValueError: If there are fewer words than ranks.
    """
    if workload.vocab_size < ranks.size:
        raise ValueError(
            f"`--nproc-per-node` must be at most the vocabulary of {workload.name}, "
            f"{workload.vocab_size}, got {ranks.size}"
        )
    dtype = getattr(torch, dtype_name)
    whole = make_batch(workload, dtype, ranks.device, seed=settings.seed)
    rows = _rows(workload.vocab_size, ranks)
    mine = replace(whole, weight=whole.weight[rows].clone())
    # A label of another rank's rows becomes one of this rank's, its own stay what they are.
    local = (whole.labels - rows.start) % len(mine.weight)
    ways = {"alone": (None, replace(mine, labels=local)), "sharded": (ranks.group, mine)}
    lanes = [
        _Lane(_record(workload, name, dtype_name, mine, ranks), entrant, batch)
        for name, (group, batch) in ways.items()
        for entrant in [contenders.ours(impl, budget_mib, group)]
    ]
    for lane in lanes:
        _prepare(lane)
    sharded = lanes[1]
    if sharded.step is not None:
        with Guard(sharded):
            _judge(sharded, sharded.step, whole, rows, ranks)
    del whole
    clear(ranks.device)
    _count(sharded)
    _time(lanes, settings, ranks)
    return [lane.record for lane in lanes]


def _rows(vocab_size: int, ranks: Ranks) -> slice:
    """As evenly as it goes; the first rank never has fewer than another."""
    share, more = divmod(vocab_size, ranks.size)
    first = ranks.rank * share + min(ranks.rank, more)
    return slice(first, first + share + (ranks.rank < more))


def _record(
    workload: Workload, name: str, dtype_name: str, mine: Batch, ranks: Ranks
) -> ShardedRecord:
    sizes = workload.num_tokens, workload.hidden_size, workload.vocab_size
    return ShardedRecord(
        *(workload.name, *sizes, dtype_name, _MODE, 0.0, name),
        ranks=ranks.size,
        rows=len(mine.weight),
        gradient_bytes=sum(t.numel() * t.element_size() for t in (mine.hidden, mine.weight)),
    )


def _prepare(lane: _Lane) -> None:
    with Guard(lane):
        lane.step = lane.entrant.prepare(lane.batch, _MODE)
        lane.record.impl = contenders.choice_of(lane.entrant, lane.batch).name
        schedule = contenders.schedule_of(lane.entrant, lane.batch, _MODE)
        lane.record.schedule = None if schedule is None else schedule.name


def _judge(lane: _Lane, step: Step, whole: Batch, rows: slice, ranks: Ranks) -> None:
    """The worst errors of any rank against the whole head in float64, and the verdict."""
    truth = _part(accuracy.truth_of(whole, _MODE), rows)
    plain = _part(accuracy.plain_result(whole, _MODE, whole.weight.dtype), rows)
    with measure.poisoned():
        result = step()
    errors = accuracy.errors_of(result, truth)
    stock = accuracy.errors_of_stock(plain, truth)
    found = accuracy.objections(errors, stock, whole.weight.dtype)
    record = lane.record
    record.loss = float(result.loss)
    record.truth_dtype = str(truth.loss.dtype).removeprefix("torch.")
    every = ranks.gather((tuple(errors), found))
    worst = [max(values) for values in zip(*(errors for errors, _ in every), strict=True)]
    record.loss_error, record.dhidden_error, record.dweight_error = worst
    objections = [f"rank {n}: {text}" for n, (_, texts) in enumerate(every) for text in texts]
    record.check = "failed: " + ", ".join(objections) if objections else "passed"


def _part(result: Result, rows: slice) -> Result:
    return result._replace(dweight=None if result.dweight is None else result.dweight[rows].clone())


def _count(lane: _Lane) -> None:
    """What this rank gives to collectives in the loss alone, and in its backward beside it."""
    record = lane.record
    if lane.step is None:
        return
    with Guard(lane):
        with sent() as forward:
            lane.entrant.prepare(lane.batch, "fwd")()
        with sent() as both:
            lane.step()
        record.forward_sent_bytes = given_bytes(forward)
        record.backward_sent_bytes = given_bytes(both) - given_bytes(forward)
        record.forward_sent_bytes_per_token = given_bytes(forward) / record.num_tokens


def _time(lanes: list[_Lane], settings: Settings, ranks: Ranks) -> None:
    samples: dict[str, list[float]] = {lane.record.contender: [] for lane in lanes}
    for lane in lanes:
        if lane.step is not None:
            with Guard(lane):
                lane.step()
                _, peak = measure.peak_of(lane.step, ranks.device)
                lane.record.peak_bytes = max(ranks.gather(peak))
    for repeat in range(-settings.warmup, settings.repeats):
        for lane in lanes:
            if lane.step is not None:
                with Guard(lane):
                    # No rank waits for a late one.
                    ranks.gather(None)
                    elapsed = max(ranks.gather(measure.time_ms(lane.step, ranks.device)))
                    if repeat >= 0:
                        samples[lane.record.contender].append(elapsed)
    for lane in lanes:
        values = samples[lane.record.contender]
        if lane.step is not None and values:
            lane.record.samples_ms = [round(value, 4) for value in values]
            lane.record.time_ms = round(statistics.median(values), 4)
            lane.record.min_ms = round(min(values), 4)
            lane.record.max_ms = round(max(values), 4)
    alone, sharded = (lane.record for lane in lanes)
    if alone.time_ms and sharded.time_ms and not ranks.shared:
        sharded.efficiency = round(alone.time_ms / sharded.time_ms, 4)
