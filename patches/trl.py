"""TRL's fused LM head, as its trainers ask for it, read at TRL 1.16 (`trl/trainer/utils.py`).

`add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs)` puts a function
`_fused_forward` on the model. Its trainers call `model(..., labels=labels, fused_lm_head=True)`, or
`shift_labels`, and get a `FusedCausalLMOutput` with a value per token. A patched model returns the
same output without TRL's projection: the function is known by its code, what it was made with is
read from its closure, and the stock forward runs through it with `fused_lm_head=False`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_UTILS = "trl.trainer.utils"
_REDIRECTION = ("trl.models.utils", "wrapped_forward")
_CAST_HEAD = ("trl.trainer.grpo_trainer", "cast_forward_to_fp32")
_IGNORED = -100  # TRL's label without loss; it takes no other.
# Trainers whose losses are made of what the fused head returns, those of subclasses included.
_FUSED = {
    *("SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer"),
    *("AsyncGRPOTrainer", "GMPOTrainer"),
}


class FusedLMHead(NamedTuple):
    """What `add_fused_lm_head` was called with, and the type that its forward returns."""

    temperature: float
    cast_to_float32: bool
    outputs: tuple[str, ...]
    output_type: Callable[..., Any]
    # To the module whose forward it runs; None if it cannot tell. No deep copy moves it.
    owner: weakref.ref[Any] | None

    def runs_another(self, model: Any) -> bool:
        """Whether its forward is that of another model, as on a deep copy."""
        owner = None if self.owner is None else self.owner()
        return isinstance(owner, torch.nn.Module) and owner is not model


class TokenRequest(NamedTuple):
    """One call with `fused_lm_head=True`.

    Attributes:
        head: What the values are.
        labels: [batch, tokens], as they were given.
        shifted: Whether they stand at the position that predicts them.
        num_items: What the sum of the loss is divided by; None for the number of labels.
        needs_aux_loss: Whether the caller asked for router logits, so for their auxiliary loss.
    """

    head: FusedLMHead
    labels: Tensor
    shifted: bool
    num_items: int | Tensor | None
    needs_aux_loss: bool

    @classmethod
    def of(cls, head: FusedLMHead, kwargs: dict[str, Any]) -> TokenRequest:
        """The request in the keywords of a forward."""
        labels, shift_labels = kwargs.get("labels"), kwargs.get("shift_labels")
        shifted = shift_labels is not None
        given = shift_labels if shifted else labels
        if not isinstance(given, Tensor):
            raise ValueError(
                f"`labels` must be a tensor with fused_lm_head=True, got {given!r}: pass `labels` "
                "or `shift_labels`"
            )
        needs_aux_loss = bool(kwargs.get("output_router_logits"))
        return cls(head, given, shifted, kwargs.get("num_items_in_batch"), needs_aux_loss)

    def stock_keywords(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of the same forward without TRL's head, with labels for the model."""
        own = ("fused_lm_head", "labels", "shift_labels", "num_items_in_batch", "use_cache")
        kept = {name: value for name, value in kwargs.items() if name not in own}
        return {**kept, "labels": self.labels, "use_cache": False}

    def target(self) -> Tensor:
        """[batch, tokens], each label at the position that predicts it."""
        if self.shifted:
            return self.labels
        padded = torch.nn.functional.pad(self.labels, (0, 1), value=_IGNORED)
        return padded[..., 1:].contiguous()

    def output(self, values: dict[str, Tensor | None], target: Tensor, aux_loss: Any, coef: float):
        """TRL's output.

        Args:
            values: [batch, tokens] by name, 0 where ignored.
            target: That of the values.
            aux_loss: Of the model's routers, or None.
            coef: Its factor in the loss.
        """
        if not self.shifted:
            # The last token predicts no label.
            values = {n: None if v is None else v[..., :-1] for n, v in values.items()}
            target = target[..., :-1]
        mask = target != _IGNORED
        log_probs = values["log_probs"]
        items = mask.sum().clamp(min=1) if self.num_items is None else self.num_items
        loss = -log_probs.sum() / items  # type: ignore[union-attr]
        if aux_loss is not None:
            loss = loss + coef * aux_loss
        return self.head.output_type(loss=loss, label_mask=mask, aux_loss=aux_loss, **values)


def fused_lm_head(functions: Iterable[Any]) -> FusedLMHead | None:
    """What the first of TRL's fused heads among these functions was made with.

    Args:
        functions: A forward and what it wraps, without binding.
    """
    for function in functions:
        if is_fused_lm_head(function):
            cells = _closure(function)
            owner = getattr(cells["original_forward"], "__self__", None)
            return FusedLMHead(
                float(cells["temperature"]),
                bool(cells["cast_lm_head_to_fp32"]),
                tuple(cells["outputs"]),
                function.__globals__["FusedCausalLMOutput"],
                None if owner is None else weakref.ref(owner),
            )
    return None


def is_fused_lm_head(function: Any) -> bool:
    """Whether this is TRL's forward, with the protocol that is understood here.

    Its code is asked, since `functools.wraps` copies a function's attributes to its wrappers.
    """
    needed = {"temperature", "cast_lm_head_to_fp32", "outputs", "original_forward"}
    return (
        _is_defined_in(function, _UTILS, "_fused_forward")
        and needed <= _closure(function).keys()
        and "fused_lm_head" in function.__code__.co_varnames
        and "FusedCausalLMOutput" in function.__globals__
    )


def casts_to_float32(forward: Any, head: Any) -> bool:
    """Whether a forward on the head is that of `cast_lm_head_to_fp32`, for this very head.

    It runs the head in float32 on hidden states of lower precision.
    """
    return _is_defined_in(forward, *_CAST_HEAD) and _closure(forward).get("lm_head") is head


def is_redirection(forward: Any) -> bool:
    """Whether a method of a trainer runs in the place of the forward, for one call.

    `_ForwardRedirection` does so for trainers that read the head's weight, to be inside the forward
    of a wrapper such as DDP.
    """
    return _is_defined_in(forward, *_REDIRECTION)


def trainer_obstacle(trainer: Any) -> str | None:
    """Why a loss of this trainer of TRL does not come from the fused head; None where it does.

    Args:
        trainer: A trainer, with its models as TRL leaves them.

    Raises:
        TypeError: If it is no trainer of TRL.
    """
    cls = next((c for c in type(trainer).__mro__ if c.__module__.partition(".")[0] == "trl"), None)
    if cls is None:
        raise TypeError(
            f"`trainer` must be a trainer of TRL, got {type(trainer).__name__}: use "
            "FusedHeadTrainer in the place of transformers.Trainer"
        )
    name = cls.__name__
    if name not in _FUSED:
        return (
            f"{name} makes its loss from logits or from the head's weight by itself, not from "
            "TRL's fused head: train it without the patch"
        )
    if name != "SFTTrainer":
        return None
    if trainer.compute_loss_func is not None:
        return "`compute_loss_func` reads logits: leave it out"
    if trainer.label_smoother is not None and trainer.args.loss_type == "nll":
        return "`label_smoothing_factor` smooths logits: leave it out, or use FusedHeadTrainer"
    return None


def missing_head(model: Any) -> str:
    """Why a model in a trainer of TRL lacks the fused head that is understood here."""
    version = getattr(sys.modules.get("trl"), "__version__", "of an unknown version")
    return (
        f"{type(model).__name__} has no fused head of TRL with the protocol of TRL 1.16, got TRL "
        f"{version}: install a TRL with it, or train with FusedHeadTrainer"
    )


def _is_defined_in(function: Any, module: str, name: str) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and (function.__globals__.get("__name__"), code.co_name) == (
        module,
        name,
    )


def _closure(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }
