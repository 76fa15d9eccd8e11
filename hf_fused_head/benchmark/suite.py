"""Cases and their records: check every contender, then time all of them in turn."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_fused_head.benchmark import accuracy, contenders, measure
from hf_fused_head.benchmark.accuracy import Errors, Result
from hf_fused_head.benchmark.contenders import Entrant, Step, Unavailable
from hf_fused_head.benchmark.workloads import (
    CPU_WORKLOADS,
    CUDA_WORKLOADS,
    WORKLOADS,
    Batch,
    Workload,
    make_batch,
)
from hf_fused_head.planning.problem import DEFAULT_MEMORY_BUDGET_MIB


@dataclass(frozen=True)
class Case:
    """One table: a workload, what is computed, and how many tokens are ignored."""

    workload: Workload
    mode: str
    ignored: float
    dtype: str

    def __str__(self) -> str:
        ignored = f", {self.ignored:.0%} ignored" if self.ignored else ""
        return f"{self.workload.name} {self.workload.shape} {self.dtype} {self.mode}{ignored}"


@dataclass(frozen=True)
class Settings:
    """How a case is measured."""

    repeats: int
    warmup: int
    check: bool
    every_schedule: bool = False
    seed: int = 0

    def protocol(self, device: torch.device) -> dict[str, object]:
        """The same, in words, for the header."""
        on_gpu = device.type == "cuda"
        return {
            "repeats": self.repeats,
            "warmup": self.warmup,
            "order": "one process, contenders in turn, every other repeat backwards",
            "clock": f"CUDA events, last half of {2 * measure.SETTLE_MS} ms in a row"
            f" after {measure.REST_MS} ms of rest"
            if on_gpu
            else "wall clock",
            "time": "median; min and max beside it",
            **({"host": "until a step is issued to an idle GPU, fastest of 5"} if on_gpu else {}),
            "memory": "peak of torch's allocator beyond inputs, outputs and gradients included",
            "errors": "relative Frobenius norm against plain torch in float64 (truth_dtype)",
            "data": "Zipf labels, targets raised to a mean loss near 2, random, fixed seed",
            "seed": self.seed,
            "checked": self.check,
        }


@dataclass
class Record:
    """One contender in one case; None for what was not measured."""

    workload: str
    num_tokens: int
    hidden_size: int
    vocab_size: int
    dtype: str
    mode: str
    ignored: float
    contender: str
    status: str = "ok"
    reason: str | None = None
    impl: str | None = None
    schedule: str | None = None
    memory_budget_bytes: int | None = None
    time_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    samples_ms: list[float] | None = None
    host_ms: float | None = None
    floor_ratio: float | None = None
    peak_bytes: int | None = None
    gradient_bytes: int | None = None
    loss: float | None = None
    loss_error: float | None = None
    dhidden_error: float | None = None
    dweight_error: float | None = None
    truth_dtype: str | None = None
    check: str | None = None


class CheckFailed(Exception):
    """One of ours is wrong; nothing is timed."""


class DoesNotFit(Exception):
    """The data of a case, or the truth about them, are larger than the device's memory."""


@dataclass
class _Lane:
    """A contender in a case: its record, its step while it can run, and whether it is ours."""

    record: Record
    entrant: Entrant
    step: Step | None = None


def cases(
    names: Sequence[str],
    modes: Sequence[str],
    ignored: Sequence[float],
    dtype: str | None,
    device: torch.device,
) -> list[Case]:
    """Every combination of what was asked for.

    Args:
        names: Of workloads; empty for those that are meant for the device.
        modes: Of `contenders.MODES`.
        ignored: Fractions of the labels.
        dtype: None for each workload's own.
        device: Where they will run.

    Raises:
        ValueError: If a name is not known.
    """
    names = names or (CUDA_WORKLOADS if device.type == "cuda" else CPU_WORKLOADS)
    for kind, given, known in (
        ("WORKLOAD", names, WORKLOADS),
        ("--mode", modes, contenders.MODES),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"`{kind}` must be one of {', '.join(known)}, got {name!r}")
    return [
        Case(WORKLOADS[name], mode, fraction, dtype or WORKLOADS[name].dtype)
        for mode in modes
        for fraction in ignored
        for name in names
    ]


def run_case(
    case: Case,
    entrants: Sequence[Entrant],
    settings: Settings,
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Measures one case.

    Args:
        case: What is computed.
        entrants: Who computes it.
        settings: How it is measured.
        device: Where.
        on_step: Called after every step, for a progress bar.

    Returns:
        One record a contender, in their order.

    Raises:
        CheckFailed: With `settings.check`, if one of ours is further from the truth than stock
            arithmetic allows; nothing has been timed then.
        DoesNotFit: If there is too little memory for the data; a contender's own lack of memory
            is noted in its record instead.
    """
    try:
        return _run_case(case, entrants, settings, device, on_step)
    except RuntimeError as error:
        # A GPU has an error of its own, the CPU's allocator a message.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise DoesNotFit(f"{case} does not fit the memory of {device}") from error


def _run_case(
    case: Case,
    entrants: Sequence[Entrant],
    settings: Settings,
    device: torch.device,
    on_step: Callable[[], None],
) -> list[Record]:
    dtype = getattr(torch, case.dtype)
    batch = make_batch(case.workload, dtype, device, case.ignored, settings.seed)
    if settings.every_schedule:
        entrants = [
            entry
            for entrant in entrants
            for entry in contenders.every_schedule(entrant, batch, case.mode)
        ]
    lanes = [_Lane(_record(case, entrant, batch), entrant) for entrant in entrants]
    for lane in lanes:
        _prepare(lane, batch, case.mode)
    _judge(lanes, batch, case.mode, settings.check, on_step)
    clear(device)
    _time(lanes, settings, device, on_step)
    clear(device)
    return [lane.record for lane in lanes]


def _record(case: Case, entrant: Entrant, batch: Batch) -> Record:
    workload = case.workload
    record = Record(
        workload.name,
        workload.num_tokens,
        workload.hidden_size,
        workload.vocab_size,
        case.dtype,
        case.mode,
        case.ignored,
        entrant.name,
    )
    record.gradient_bytes = sum(
        tensor.numel() * tensor.element_size()
        for tensor, wanted in (
            (batch.hidden, case.mode != "fwd"),
            (batch.weight, case.mode == "fwd+bwd"),
        )
        if wanted
    )
    return record


def _prepare(lane: _Lane, batch: Batch, mode: str) -> None:
    with Guard(lane):
        lane.step = lane.entrant.prepare(batch, mode)
        schedule = contenders.schedule_of(lane.entrant, batch, mode)
        if schedule is not None:
            budget_mib = lane.entrant.budget_mib or DEFAULT_MEMORY_BUDGET_MIB
            lane.record.impl = contenders.choice_of(lane.entrant, batch).name
            lane.record.schedule = schedule.name
            lane.record.memory_budget_bytes = int(budget_mib * 2**20)


def _is_of_compiler(kind: type) -> bool:
    # Compilers of kernels derive their errors from Exception, and need not be installed.
    return kind.__module__.partition(".")[0] in ("triton", "cutlass")


class Guard:
    """Turns what a contender dies of into the status of its row, and takes it out of the run.

    Args:
        lane: What has a `record` and, while it can run, a `step`.
    """

    def __init__(self, lane: Any) -> None:
        self.lane = lane

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if kind is None or error is None:
            return False
        if isinstance(error, Unavailable):
            self.lane.record.status = error.status
            self.lane.record.reason = str(error)
        elif isinstance(error, torch.OutOfMemoryError):
            self.lane.record.status = "out of memory"
        elif isinstance(error, contenders.FAILURES) or _is_of_compiler(kind):
            lines = str(error).strip().splitlines() or [""]
            self.lane.record.status = "failed"
            self.lane.record.reason = f"{kind.__name__}: {lines[0]}"[:200]
        else:
            return False
        self.lane.step = None
        return True


def _judge(
    lanes: list[_Lane], batch: Batch, mode: str, check: bool, on_step: Callable[[], None]
) -> None:
    """Errors and peak memory of every contender, and the verdict."""
    device = batch.weight.device
    truth = accuracy.truth_of(batch, mode)
    plain = accuracy.plain_result(batch, mode, batch.weight.dtype)
    stock = accuracy.errors_of_stock(plain, truth)
    del plain
    for lane in lanes:
        if lane.step is not None:
            with Guard(lane):
                _judge_one(lane, lane.step, truth, stock, batch, device)
        on_step()
    wrong = [
        f"{lane.record.contender}: {lane.record.check or lane.record.reason}"
        for lane in lanes
        if lane.entrant.is_ours
        and ((lane.record.check or "passed") != "passed" or lane.record.status == "failed")
    ]
    if check and wrong:
        raise CheckFailed(f"{lanes[0].record.workload} {mode}: {'; '.join(wrong)}")


def _judge_one(
    lane: _Lane, step: Step, truth: Result, stock: Errors, batch: Batch, device: torch.device
) -> None:
    record = lane.record
    with measure.poisoned():
        result = step()
    if lane.entrant is contenders.FLOOR:
        # Its buffers were made before the clock starts, and its products are no loss.
        return
    errors = accuracy.errors_of(result, truth)
    record.loss = float(result.loss)
    record.loss_error, record.dhidden_error, record.dweight_error = errors
    record.truth_dtype = str(truth.loss.dtype).removeprefix("torch.")
    found = accuracy.objections(errors, stock, batch.weight.dtype)
    record.check = "failed: " + ", ".join(found) if found else "passed"
    del result
    # Pays for compilation, tuning and the workspaces that libraries keep, without the poison.
    step()
    _, record.peak_bytes = measure.peak_of(step, device)


def _time(
    lanes: list[_Lane], settings: Settings, device: torch.device, on_step: Callable[[], None]
) -> None:
    """Times the contenders in turn, so that a slow minute of the machine meets all of them.

    Every other turn goes backwards, so that no contender always follows the same other one.
    """
    samples: dict[str, list[float]] = {lane.record.contender: [] for lane in lanes}
    steps: dict[str, int] = {}
    for lane in lanes:
        if lane.step is not None:
            with Guard(lane):
                steps[lane.record.contender] = measure.steps_to_settle(lane.step, device)
                host_ms = measure.host_ms(lane.step, device)
                lane.record.host_ms = None if host_ms is None else round(host_ms, 4)
    for repeat in range(-settings.warmup, settings.repeats):
        for lane in lanes[:: -1 if repeat % 2 else 1]:
            if lane.step is not None:
                with Guard(lane):
                    measure.rest(device)
                    elapsed = measure.time_ms(lane.step, device, steps[lane.record.contender])
                    if repeat >= 0:
                        samples[lane.record.contender].append(elapsed)
            on_step()
    for lane in lanes:
        values = samples[lane.record.contender]
        if lane.step is not None and values:
            record = lane.record
            record.samples_ms = [round(value, 4) for value in values]
            record.time_ms = round(statistics.median(values), 4)
            record.min_ms, record.max_ms = round(min(values), 4), round(max(values), 4)
    floor = next((lane.record.time_ms for lane in lanes if lane.entrant is contenders.FLOOR), None)
    for lane in lanes:
        if floor and lane.record.time_ms:
            lane.record.floor_ratio = round(lane.record.time_ms / floor, 4)


def num_steps(num_entrants: int, settings: Settings) -> int:
    """How often `run_case` calls `on_step`."""
    return num_entrants * (1 + settings.warmup + settings.repeats)


def clear(device: torch.device) -> None:
    """Gives back what the allocator keeps for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
