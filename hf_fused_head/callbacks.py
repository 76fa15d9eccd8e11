"""Callbacks of a Trainer: what is fused, in a line at the start; speed and peak memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fused_head.patches import patch_report


class SpeedCallback(TrainerCallback):
    """Adds `tokens_per_second` and `peak_memory_mib` to the logs of training.

    Both are of the steps since the last log; evaluation and saving do not count. Tokens are those
    that all processes were given, as `include_num_input_tokens_seen` of the Trainer counts them,
    which this callback turns on ("all"). The peak is that of torch's CUDA allocator in this
    process; it is left out on other devices.

    `FusedHeadTrainer` hands both to every other callback, such as TensorBoard's, beside the loss.
    With another Trainer they are in `state.log_history`, and callbacks that come later see them.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._begin = self._end = time.perf_counter()
        self._tokens_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Turns the Trainer's count of tokens on, and starts at what a checkpoint has seen."""
        if args.include_num_input_tokens_seen == "no":
            args.include_num_input_tokens_seen = "all"
        self._restart(int(state.num_input_tokens_seen))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The clock runs from here."""
        self._begin = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The clock stops; on a GPU the work of the step may still run."""
        self._end = time.perf_counter()
        self._seconds += self._end - self._begin

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Adds the metrics where the Trainer has not done so."""
        if logs is None or "loss" not in logs or "tokens_per_second" in logs:
            return
        metrics = self.metrics(state)
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def metrics(self, state: TrainerState) -> dict[str, float]:
        """Those of the steps since the last call, once their loss has been read."""
        # Reading the loss has waited for the device, whose work is part of the steps.
        seconds = self._seconds + time.perf_counter() - self._end
        tokens = int(state.num_input_tokens_seen) - self._tokens_before
        found = {"tokens_per_second": tokens / seconds}
        if torch.cuda.is_available():
            found["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self._restart(int(state.num_input_tokens_seen))
        return found

    def _restart(self, tokens: int) -> None:
        self._seconds, self._tokens_before = 0.0, tokens
        self._begin = self._end = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


class StartLine(TrainerCallback):
    """Writes after the first step, once a run, what is fused, by which path and schedule."""

    def __init__(self) -> None:
        self._written = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A new run writes a new line."""
        self._written = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """The schedule is known once a forward has run."""
        if self._written or model is None:
            return
        self._written = True
        if state.is_world_process_zero:
            # As the Trainer writes its logs: around a progress bar, where there is one.
            tqdm.write(start_line(model))


def start_line(model: nn.Module) -> str:
    """What is fused, by which path, with which schedule."""
    report = patch_report(model)
    if not report.fused or report.last_loss.startswith("not fused"):
        return f"The loss is stock: {report.last_loss if report.fused else report.reason}"
    around = [
        f"{name} {value}"
        for name, value in (("wrapper", report.wrapper), ("sharding", report.sharding))
        if value != "none"
    ]
    # A compiled forward chooses its schedule inside.
    schedule = report.schedule or "chosen in the compiled graph"
    parts = (*around, f"kernel {report.kernel}", f"schedule {schedule}")
    return f"Fused head of {type(model).__name__}: {'; '.join(parts)}"
