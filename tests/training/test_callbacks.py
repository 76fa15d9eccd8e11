"""Logs: metrics in every callback, speed and peak memory, the line at the start."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trainer import SEQ, build, rows
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_fused_head import FusedHeadTrainer
from hf_fused_head.callbacks import SpeedCallback, start_line

METRICS = {"mean_token_accuracy", "entropy", "perplexity"}


class Recorder(TrainerCallback):
    """What a logging integration is handed."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def arguments(tmp_path: Path, **settings: Any) -> TrainingArguments:
    settings = {"report_to": "none", "eval_strategy": "steps", "eval_steps": 2, **settings}
    return TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=4,
        use_cpu=not torch.cuda.is_available(),
        **settings,
    )


def trained(
    tmp_path: Path, *callbacks: TrainerCallback, kind: type[Trainer] = FusedHeadTrainer, **more: Any
) -> Trainer:
    trainer = kind(
        build(),
        arguments(tmp_path, **more),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def test_every_callback_gets_the_metrics_beside_the_loss(tmp_path: Path) -> None:
    recorder = Recorder()
    trained(tmp_path, recorder)
    training = [logs for logs in recorder.seen if "loss" in logs]
    evaluation = [logs for logs in recorder.seen if "eval_loss" in logs]
    assert len(training) == len(evaluation) == 2
    for logs in training:
        assert logs.keys() >= METRICS and all(isinstance(logs[name], float) for name in METRICS)
    for logs in evaluation:
        assert {f"eval_{name}" for name in METRICS} <= logs.keys()


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    trained(tmp_path, SpeedCallback(), report_to="tensorboard")
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    tags: set[str] = set()
    for file in files:
        events = reader.EventAccumulator(str(file))
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in METRICS} | {"train/loss"} <= tags
    assert {f"eval/{name}" for name in METRICS} | {"eval/loss"} <= tags
    assert "train/tokens_per_second" in tags


@pytest.mark.parametrize("kind", [FusedHeadTrainer, Trainer])
def test_speed_is_tokens_over_the_time_of_steps(kind: type[Trainer], tmp_path: Path) -> None:
    """Two steps of 4 rows; their time is at most that between the logs, without evaluation."""
    late = Recorder()

    class Slow(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            time.sleep(3.0)

        def on_substep_end(self, args, state, control, **kwargs):
            time.sleep(0.05)

    trainer = trained(tmp_path, SpeedCallback(), late, Slow(), kind=kind)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all("tokens_per_second" in entry for entry in logs)
    seen = [entry["tokens_per_second"] for entry in late.seen if "loss" in entry]
    assert seen == [entry["tokens_per_second"] for entry in logs]
    # The evaluation before the second window took three seconds, which are not counted.
    assert logs[1]["tokens_per_second"] > 2 * 4 * SEQ / 3
    assert ("peak_memory_mib" in logs[0]) == torch.cuda.is_available()


def test_tokens_are_counted_exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a clock that ticks once a call, a step takes a tick and the log another."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("hf_fused_head.callbacks.time.perf_counter", lambda: float(next(ticks)))
    trainer = trained(tmp_path, SpeedCallback(), eval_strategy="no")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["tokens_per_second"] for entry in logs] == [2 * 4 * SEQ / 3] * 2


@pytest.mark.gpu
def test_peak_memory_is_that_of_the_allocator(tmp_path: Path) -> None:
    trainer = trained(tmp_path, SpeedCallback(), eval_strategy="no")
    peaks = [entry["peak_memory_mib"] for entry in trainer.state.log_history if "loss" in entry]
    weights = sum(weight.numel() * 4 for weight in trainer.model.parameters()) / 2**20
    assert all(peak > weights for peak in peaks)


def test_one_line_says_what_is_fused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "Fused head" in line]
    assert len(lines) == 1
    assert lines[0].startswith("Fused head of LlamaForCausalLM: kernel torch: ")
    assert "; schedule gradient_in_forward: " in lines[0]


def test_the_line_names_a_wrapper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = FusedHeadTrainer(
        build(lora=True), arguments(tmp_path, eval_strategy="no"), train_dataset=rows()
    )
    trainer.train()
    assert "wrapper LoRA; kernel torch: " in capsys.readouterr().out


def test_the_line_says_why_a_model_stays_stock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build()
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    assert start_line(model).startswith("The loss is stock: ")
    trainer = FusedHeadTrainer(
        build(),
        arguments(tmp_path, eval_strategy="no"),
        train_dataset=rows(),
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean(),
        head_options={"strict": False},
    )
    with pytest.warns(UserWarning, match="labels"):
        trainer.train()
    out = capsys.readouterr().out
    assert "The loss is stock: not fused" in out


def test_the_line_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hf_fused_head.callbacks import StartLine

    trainer = FusedHeadTrainer(
        build(), arguments(tmp_path, eval_strategy="no"), train_dataset=rows()
    )
    assert isinstance(trainer.callback_handler, CallbackHandler)
    trainer.remove_callback(StartLine)
    trainer.train()
    assert "Fused head" not in capsys.readouterr().out
