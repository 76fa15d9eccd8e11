"""A fine-tuning step of a whole model whose weights FSDP2 cuts over the ranks, head by head.

Every contender trains the same model from the same weights on the same tokens, one after another;
only its head differs. The tokens of a step depend on the step and on the number of sequences, never
on the number of ranks, so that losses of runs on different numbers of ranks can be compared.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hf_fused_head.benchmark import contenders, measure
from hf_fused_head.benchmark.model_configs import LLAMA_3_1B
from hf_fused_head.benchmark.ranks import Ranks
from hf_fused_head.benchmark.suite import Guard, Record, clear
from hf_fused_head.benchmark.workloads import zipf_labels

KIND = "training step"
_MODE = "training step"
_LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class TrainedModel:
    """A Llama with random weights.

    Attributes:
        name: What the command line calls it.
        sequence_length: Tokens of a sequence.
        dtype: Of weights and products; gradients are summed in float32.
        config: Arguments of `transformers.LlamaConfig`.
    """

    name: str
    sequence_length: int
    dtype: str
    config: dict[str, Any]


_LLAMA_1B = {**LLAMA_3_1B, "max_position_embeddings": 131072}
_SMOKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 307,
    "tie_word_embeddings": True,
}
MODELS = {
    model.name: model
    for model in (
        TrainedModel("llama-1b", 8192, "bfloat16", _LLAMA_1B),
        TrainedModel("smoke", 24, "float32", _SMOKE),
    )
}


@dataclass(frozen=True)
class Course:
    """How long and on what a model trains.

    Attributes:
        steps: With a loss and a time each.
        warmup: The first of them, whose times do not count.
        sequences: Of a step, on all ranks together.
        seed: Of weights and tokens.
    """

    steps: int
    warmup: int
    sequences: int
    seed: int = 0

    def protocol(self) -> dict[str, object]:
        """The same, in words, for the header."""
        return {
            "repeats": self.steps - self.warmup,
            "warmup": self.warmup,
            "order": "one contender after another, from the same weights",
            "clock": "wall clock around a synchronised step",
            "time": "forward, backward, AdamW; median of the slowest rank, min and max beside it",
            "memory": "fullest rank: all that is held at the peak of a step",
            "errors": "none; losses are compared with stock's",
            "data": f"{self.sequences} sequences a step, Zipf tokens, other ones every step",
            "model": "random weights, gradient checkpointing, fully_shard of layers and root",
            "seed": self.seed,
            "checked": False,
        }


@dataclass
class TrainingRecord(Record):
    """One contender; None for what was not measured."""

    ranks: int = 1
    sequences: int = 1
    tokens_per_second: float | None = None
    held_bytes: int | None = None
    losses: list[float] | None = None
    loss_distance: float | None = None


@dataclass
class _Lane:
    record: TrainingRecord
    step: Callable[[int], float] | None = None
    held: Callable[[], int] | None = None


def _stock(model: Any, device: torch.device) -> None:
    pass


def _ours(model: Any, device: torch.device) -> None:
    from hf_fused_head.patches import apply_patch

    apply_patch(model)


def _liger(model: Any, device: torch.device) -> None:
    contenders.require("liger_kernel", "liger-kernel", device)
    # Its head alone: the other kernels would speed up what all contenders share.
    importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama(
        rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=True, model=model
    )


def _trl(model: Any, device: torch.device) -> None:
    head_loss = contenders.trl_loss(device)

    def forward(input_ids: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:
        hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1]
        loss = head_loss(hidden.flatten(0, 1), model.lm_head.weight, labels[:, 1:].flatten())
        return {"loss": loss}

    model.forward = forward


HEADS = {"stock": _stock, "ours": _ours, "liger": _liger, "trl": _trl}


def measure_training(
    model: TrainedModel,
    names: Sequence[str],
    course: Course,
    ranks: Ranks,
    on_record: Callable[[list[TrainingRecord]], object] = lambda records: None,
) -> list[TrainingRecord]:
    """Trains with every head in turn.

    Args:
        model: Its shape.
        names: Of `HEADS`.
        course: Its steps.
        ranks: Of this process.
        on_record: Called with all records so far, after each contender.

    Returns:
        One record a contender, the same on every rank.

    Raises:
        ValueError: If a name is not known, or the sequences cannot be shared out evenly.
    """
    for name in names:
        if name not in HEADS:
            raise ValueError(f"`--contender` must be one of {', '.join(HEADS)}, got {name!r}")
    if course.sequences % ranks.size:
        raise ValueError(
            f"`--sequences` must be a multiple of the {ranks.size} ranks, got {course.sequences}"
        )
    if not 0 <= course.warmup < course.steps:
        raise ValueError(
            f"`--warmup` must be less than `--steps`, {course.steps}, got {course.warmup}"
        )
    records: list[TrainingRecord] = []
    for name in names:
        lane = _Lane(_record(model, name, course, ranks))
        with Guard(lane):
            _train(lane, model, course, ranks)
        lane.step = lane.held = None
        clear(ranks.device)
        records.append(lane.record)
        _compare_losses(records)
        on_record(records)
    return records


def _record(model: TrainedModel, name: str, course: Course, ranks: Ranks) -> TrainingRecord:
    num_tokens = course.sequences * model.sequence_length
    sizes = num_tokens, model.config["hidden_size"], model.config["vocab_size"]
    return TrainingRecord(
        *(model.name, *sizes, model.dtype, _MODE, 0.0, name),
        ranks=ranks.size,
        sequences=course.sequences,
    )


def _train(lane: _Lane, model: TrainedModel, course: Course, ranks: Ranks) -> None:
    record, device = lane.record, ranks.device
    lane.step, lane.held = _prepare(record.contender, model, course, ranks)
    losses, times = [], []
    for number in range(course.steps):
        ranks.gather(None)
        measure.synchronize(device)
        begin = time.perf_counter()
        loss = lane.step(number)
        measure.synchronize(device)
        every = ranks.gather(((time.perf_counter() - begin) * 1e3, loss))
        times.append(max(elapsed for elapsed, _ in every))
        losses.append(statistics.fmean(loss for _, loss in every))
    held = lane.held()
    _, beyond = measure.peak_of(lambda: lane.step and lane.step(course.steps), device)
    record.losses = losses
    record.loss = losses[-1]
    counted = times[course.warmup :]
    record.samples_ms = [round(value, 4) for value in times]
    record.time_ms = round(statistics.median(counted), 4)
    record.min_ms, record.max_ms = round(min(counted), 4), round(max(counted), 4)
    record.tokens_per_second = round(record.num_tokens / record.time_ms * 1e3, 1)
    every_held, every_peak = zip(*ranks.gather((held, held + beyond)), strict=True)
    record.held_bytes, record.peak_bytes = max(every_held), max(every_peak)


def _prepare(
    name: str, shape: TrainedModel, course: Course, ranks: Ranks
) -> tuple[Callable[[int], float], Callable[[], int]]:
    """The step of a number, which gives this rank's mean loss; and the bytes held between steps."""
    transformers = importlib.import_module("transformers")
    dtype, device = getattr(torch, shape.dtype), ranks.device
    torch.manual_seed(course.seed)
    config = transformers.LlamaConfig(**shape.config, use_cache=False)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.train()
    HEADS[name](model, device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    # Fused, it needs no temporaries as large as the weights, which would hide those of the head.
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, fused=fused)
    share = course.sequences // ranks.size

    def step(number: int) -> float:
        mine = _tokens(shape, course, number, device)[ranks.rank :: ranks.size]
        total = torch.zeros((), device=device)
        for index, row in enumerate(mine):
            model.set_requires_gradient_sync(index == share - 1)
            loss = model(input_ids=row[None], labels=row[None])["loss"] / share
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    def held() -> int:
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device)
        states = [t for state in optimizer.state.values() for t in state.values()]
        return sum(_local_bytes(t) for t in (*model.parameters(), *states))

    return step, held


def _tokens(shape: TrainedModel, course: Course, step: int, device: torch.device) -> Tensor:
    """All sequences of a step: [sequences, length] int64."""
    generator = torch.Generator(device=device).manual_seed(course.seed + 1 + step)
    count = course.sequences * shape.sequence_length
    tokens = zipf_labels(count, shape.config["vocab_size"], generator, device)
    return tokens.view(course.sequences, -1)


def _local_bytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def _compare_losses(records: list[TrainingRecord]) -> None:
    """The largest distance of a loss from stock's at the same step, in nats."""
    stock = next((record.losses for record in records if record.contender == "stock"), None)
    for record in records:
        if stock and record.losses:
            pairs = zip(record.losses, stock, strict=True)
            record.loss_distance = max(abs(ours - theirs) for ours, theirs in pairs)
