"""`FusedHeadTrainer`: transformers' Trainer, with the whole loss inside the model's head.

The stock Trainer leaves the model's loss in two cases. With label smoothing it takes the labels
away and smooths logits itself; here the smoothing is an option of the fused loss, which gives the
same value. When a metric wants predictions it takes logits out of the output; here they are made
for those steps and for no others. All else (gradient accumulation, token counts across devices) is
stock code that sees a model whose loss happens to be cheap.

Beside the loss one thing differs from stock: a model that tensor parallelism sharded, or
transformers when it loaded it, is saved and resumed by all processes. transformers
5.17 has one alone gather the weights, whose collectives the others do not join, and writes that
one's part of the optimizer as if all ranks had it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import logging

from hf_fused_head.callbacks import SpeedCallback, StartLine
from hf_fused_head.distributed.dtensor import has_dtensors
from hf_fused_head.distributed.sharded_checkpoint import (
    gathered_tensors,
    load_optimizer,
    loads_gathered_tensors,
    save_optimizer,
    saves_optimizer_itself,
)
from hf_fused_head.options import STAT_NAMES
from hf_fused_head.patches import last_stats, patch_report, require_fused
from hf_fused_head.patches.adapter import check_keywords, options_of, patch_for_trainer
from hf_fused_head.patches.eligibility import shifts_labels

if TYPE_CHECKING:
    from hf_fused_head.functional import LossStats

logger = logging.get_logger(__name__)

_IGNORED = -100  # The label without loss, all over transformers.
_Gather = Callable[[Tensor], Tensor]


class FusedHeadTrainer(Trainer):
    """`transformers.Trainer` whose model computes its loss without logits; same results.

    Logs of training also hold `mean_token_accuracy`, `entropy` and `perplexity`: means over the
    tokens with loss since the last log, on all processes. Evaluation returns them with its prefix.
    `perplexity` is that of the plain cross-entropy, whatever smoothing or z-loss is trained on.
    Every callback gets them beside the loss, as it gets stock metrics; those of
    `callbacks.SpeedCallback` too.

    After the first step a line says what is fused, by which path and schedule.

    With label smoothing a mixture-of-experts model keeps its auxiliary loss; the stock Trainer,
    which takes the labels away from the model, loses it there.

    Steps that need logits get them from the stock head and say so once: those with
    `compute_metrics` or `predict()`, and all of them with `compute_loss_func`.

    Checkpoints of a sharded model hold full tensors, as those of one process do; all processes
    have to call `save_model`.

    A step whose loss did not come from the head, whatever has been done to the model since, is an
    error, unless the model is patched with strict=False.

    The options of a model that is patched already are kept. An option named in `head_options`
    replaces the model's; a nonzero `label_smoothing_factor` does so for this trainer only. Empty
    `stats` become ("accuracy", "entropy"), unless `head_options` names them.

    Args:
        model: As for the Trainer; patched in place. What `model_init` returns is patched too.
        args: As for the Trainer; `label_smoothing_factor` becomes part of the fused loss.
        *positional: Further arguments of the Trainer.
        head_options: Keywords of `apply_patch`; an option that is left out keeps its value.
        **keywords: Further arguments of the Trainer.

    Raises:
        TypeError: If `head_options` holds an unknown key.
        ValueError: If `args` contradict `head_options` or a fused head.
        UnsupportedModelError: If the model cannot be fused, unless it is patched with strict=False.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        head_options: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        self.head_options = _checked_options(head_options, args)
        self._strict = True
        self._train_sums = TokenSums()
        self._eval_sums = TokenSums()
        self._targets: Tensor | None = None
        with saves_optimizer_itself(model, args):
            super().__init__(model, args, *positional, **keywords)
        self.add_callback(StartLine())
        if model is not None:
            self._patch(model)
        # Put back if the model turns out, at its first forward, to be one that cannot be fused.
        self._stock_smoother = self.label_smoother
        self.label_smoother = None if self._is_fused() else self._stock_smoother
        if self.compute_loss_func is not None:
            logger.warning_once(
                "`compute_loss_func` reads logits, so every step computes them and the fused head "
                "is not used: leave it out to train without logits."
            )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model, patched."""
        return self._patch(super().call_model_init(trial))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the stock Trainer does; the first logging window starts empty."""
        self._train_sums = TokenSums()
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The stock method; with label smoothing the labels stay with the model, if it is fused."""
        # Context parallelism shards the labels, in place and only while the loss is computed.
        self._targets = self._targets_of(inputs)
        smoothed_by_head = self._stock_smoother is not None and self.label_smoother is None
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if smoothed_by_head and not self._is_fused():
            # This forward was the first, was refused (strict=False) and gave the plain loss.
            self.label_smoother = self._stock_smoother
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return result

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        """The stock step; sums of its token statistics stay on the device until they are logged."""
        has_labels = self._loss_is_from_head(inputs)
        with require_fused(model) if has_labels and self._strict else nullcontext():
            loss = super().training_step(model, inputs, *args, **kwargs)
        if has_labels:
            self._train_sums.add(self._last_stats(model))
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The stock step, without logits when only the loss is wanted."""
        if not prediction_loss_only:
            logger.warning_once(
                "Predictions were asked for, so these evaluation steps compute logits with the "
                "stock head: pass prediction_loss_only=True or no `compute_metrics` to do without."
            )
            # Logits cannot be taken out of a compiled fused forward.
            model = getattr(model, "_orig_mod", model)
        has_labels = self._loss_is_from_head(inputs)
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if has_labels:
            whole_rows = self.args.world_size > 1 and not self._rows_are_split()
            gather = self._gather_rows if whole_rows else None
            self._eval_sums.add(self._last_stats(model), self._targets, gather)
        return result

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The stock loop; its metrics also hold those that need no logits."""
        self._eval_sums = TokenSums()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        metrics = cast(dict[str, float], output.metrics)
        reduce = self._over_processes if self._rows_are_split() else None
        for name, value in self._eval_sums.means(reduce).items():
            metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock log; that of a training window also holds the metrics that need no logits."""
        if self.is_in_train and "loss" in logs:
            logs.update(self._train_sums.means(self._over_processes))
            self._train_sums = TokenSums()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, SpeedCallback):
                    logs.update(callback.metrics(self.state))
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The stock method; sharded weights are gathered by all processes, and one writes them."""
        if not self._is_sharded():
            super().save_model(output_dir, _internal_call)
            return
        model: Any = self.model
        folder: Any = self.args.output_dir if output_dir is None else output_dir
        weights = gathered_tensors(model.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            self._save(folder, state_dict=weights)
        elif isinstance(model, PreTrainedModel):
            # It waits in its own `save_pretrained` for all processes.
            model.save_pretrained(folder, is_main_process=False, state_dict=weights)
        # What is written may be read at once, by any process.
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._is_sharded():
            files = _optimizer_files(output_dir)
            save_optimizer(self.optimizer, self.lr_scheduler, files, keep=self.args.should_save)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._is_sharded():
            load_optimizer(self.optimizer, self.lr_scheduler, _optimizer_files(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        with loads_gathered_tensors(model or self.model) if self._is_sharded() else nullcontext():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with loads_gathered_tensors(self.model) if self._is_sharded() else nullcontext():
            super()._load_best_model()

    def _is_sharded(self) -> bool:
        """Whether weights are sharded, and no engine of accelerate handles their checkpoints."""
        engine = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not engine and has_dtensors(self.model)

    def _patch(self, model: nn.Module) -> nn.Module:
        """`model`, patched; its own options stay where `head_options` names none."""
        own = replace(options_of(model), **self.head_options)
        if "stats" not in self.head_options and not own.stats:
            own = replace(own, stats=STAT_NAMES)
        self._strict = own.strict
        smoothing = self.args.label_smoothing_factor or own.label_smoothing
        return patch_for_trainer(model, own, label_smoothing=smoothing)

    def _over_processes(self, sums: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(sums, "sum"))

    def _rows_are_split(self) -> bool:
        """Whether processes evaluate parts of the same sequences; Ulysses evaluates whole ones."""
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        return parallelism is not None and parallelism.cp_enabled

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all processes in the order of the data, none of them twice."""
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        sharers = 1 if parallelism is None else parallelism.tp_size
        if sharers == 1:
            return cast(_Gather, self.gather_function)(rows)
        # Ranks of a group share their rows, which accelerate counts once and gathers from each.
        gathered = cast(Tensor, self.accelerator.gather(rows)).unflatten(
            0, (-1, sharers, len(rows))
        )
        once, state = gathered[:, 0].flatten(0, 1), self.accelerator.gradient_state
        repeats = state.end_of_dataloader and state.remainder > 0
        return once[: state.remainder] if repeats else once

    def _is_fused(self) -> bool:
        return patch_report(self.accelerator.unwrap_model(self.model)).fused

    def _loss_is_from_head(self, inputs: Mapping[str, Any]) -> bool:
        # Ulysses' data loader leaves the shifted labels alone.
        labels = inputs.get("labels", inputs.get("shift_labels"))
        return labels is not None and self.compute_loss_func is None

    def _targets_of(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The labels that the model's loss compares with, [batch, tokens]; if any."""
        shifted, labels = inputs.get("shift_labels"), inputs.get("labels")
        if shifted is not None or labels is None:
            return shifted
        return labels[..., 1:] if shifts_labels(self.model) else labels

    def _last_stats(self, model: nn.Module) -> LossStats | None:
        return last_stats(self.accelerator.unwrap_model(model, keep_torch_compile=False))


def _optimizer_files(checkpoint: str) -> tuple[str, str]:
    """Those of the optimizer and of its scheduler."""
    return os.path.join(checkpoint, OPTIMIZER_NAME), os.path.join(checkpoint, SCHEDULER_NAME)


class TokenSums:
    """Sums of token statistics, on the device: adding never waits, reading does once."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # [1 + len(names)], the number of tokens first

    def add(
        self,
        stats: LossStats | None,
        targets: Tensor | None = None,
        gather: _Gather | None = None,
    ) -> None:
        """Adds the tokens of one forward.

        Args:
            stats: Those of the forward; None, where no fused head ran, adds nothing.
            targets: Needed with `gather`: the labels as the loss sees them, [batch, tokens].
            gather: Collects rows of all processes and drops those that a sampler repeated.
        """
        if stats is None:
            return
        values = {"cross_entropy": stats.nll, "mean_token_accuracy": stats.correct}
        values["entropy"] = stats.entropy
        kept = {name: value for name, value in values.items() if value is not None}
        # Counts beyond 2**24 are no float32 numbers; MPS has nothing wider.
        wide = torch.float32 if stats.nll.device.type == "mps" else torch.float64
        if gather is not None and targets is not None and len(targets) == len(stats.nll):
            valid = targets.to(stats.nll.device).ne(_IGNORED)
            rows = [value.sum(-1, dtype=wide) for value in (valid, *kept.values())]
            sums = gather(torch.stack(rows, dim=-1)).sum(0)
        else:
            totals = [value.sum(dtype=wide) for value in kept.values()]
            sums = torch.stack([stats.num_valid.to(wide), *totals])
        self._names = tuple(kept)
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The metrics; waits for the device.

        Args:
            reduce: Sums a tensor over processes, where `add` did not gather.
        """
        if self._sums is None:
            return {}
        sums = self._sums if reduce is None else reduce(self._sums)
        num_tokens, *totals = sums.tolist()
        means = {
            name: total / num_tokens if num_tokens else float("nan")
            for name, total in zip(self._names, totals, strict=True)
        }
        means["perplexity"] = torch.tensor(means.pop("cross_entropy")).exp().item()
        return means


def _checked_options(
    head_options: Mapping[str, Any] | None, args: TrainingArguments | None
) -> dict[str, Any]:
    """The keywords for `apply_patch` that are given by name."""
    options = dict(head_options or {})
    check_keywords("head_options", options)
    if args is None:
        return options
    if args.use_liger_kernel:
        raise ValueError(
            "`use_liger_kernel` must be False for FusedHeadTrainer, got True: both would replace "
            "the head's loss; apply Liger's other kernels to the model yourself, with "
            "fused_linear_cross_entropy=False, or use transformers.Trainer"
        )
    smoothing = args.label_smoothing_factor
    if smoothing and options.get("label_smoothing", smoothing) != smoothing:
        raise ValueError(
            "`head_options['label_smoothing']` must equal args.label_smoothing_factor="
            f"{smoothing!r}, got {options['label_smoothing']!r}: name the smoothing in one place"
        )
    return options
