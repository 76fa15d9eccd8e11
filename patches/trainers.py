"""`patch_trainer`: patches the models that a trainer of TRL holds, or says why it cannot."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, TypeVar

from . import wrappers
from .adapter import apply_patch, check_keywords, options_of, remove_patch, state_of
from .errors import UnsupportedModelError
from .report import patch_report
from .trl import missing_head, trainer_obstacle

Trainer = TypeVar("Trainer")


def patch_trainer(trainer: Trainer, **options: Any) -> Trainer:
    """Makes a trainer of TRL compute its log-probabilities inside the fused head.

    Its model and its reference model are patched. Those of SFTTrainer, DPOTrainer, KTOTrainer,
    GRPOTrainer, RLOOTrainer, AsyncGRPOTrainer and GMPOTrainer are fused. The others of TRL read
    logits or the head's weight (CPO, ORPO, TPO, GKD, GOLD, online DPO, distillation, ...).

    A model that is patched already keeps its options, but for those given by name. As the loss is
    made of log-probabilities by the trainer, `label_smoothing` and `z_loss` must be 0, and
    `last_stats` has nothing to tell.

    Args:
        trainer: One of TRL's, before or after its training; changed in place.
        **options: Keywords of `apply_patch`.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: If a loss of this trainer would not go through the fused head; its
            models are then as they were.
        TypeError: If it is no trainer of TRL, or an option is unknown.
        ValueError: If an option is out of range.
    """
    check_keywords("options", options)
    obstacle = trainer_obstacle(trainer)
    if obstacle is not None:
        raise _not_fused(trainer, obstacle)
    found = (getattr(trainer, name, None) for name in ("model", "ref_model"))
    models = [model for model in found if model is not None]
    former = [None if state_of(model) is None else options_of(model) for model in models]
    try:
        for model in models:
            _patch(trainer, model, options)
    except (UnsupportedModelError, ValueError):
        for model, kept in zip(models, former, strict=True):
            remove_patch(model) if kept is None else apply_patch(model, **asdict(kept))
        raise
    return trainer


def _patch(trainer: Any, model: Any, given: dict[str, Any]) -> None:
    options = {**asdict(options_of(model)), **given}
    for name in ("label_smoothing", "z_loss"):
        if options[name]:
            raise ValueError(
                f"`{name}` must be 0 for a trainer of TRL, which makes its loss from "
                f"log-probabilities, got {options[name]!r}: leave it out"
            )
    target = wrappers.unwrapped(model)
    if wrappers.trl_head(target.forward) is None:
        raise _not_fused(trainer, missing_head(target))
    apply_patch(model, **options)
    report = patch_report(model)
    if not report.fused:
        raise _not_fused(trainer, report.reason)


def _not_fused(trainer: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the loss of {type(trainer).__name__} would not come from the fused head: {reason}"
    )
