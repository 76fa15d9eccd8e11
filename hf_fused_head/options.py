"""The options of the loss as frozen data that checks itself when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch", "reference"]
Reduction = Literal["mean", "sum", "none"]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# That of torch, where `None` means it too.
DEFAULT_IGNORE_INDEX = -100

# Statistics that a loss can return beside itself; "accuracy" comes per token, as `correct`.
STAT_NAMES = ("accuracy", "entropy")

# The fields of `TokenLogProbs`.
LOG_PROB_NAMES = ("log_probs", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs")


@dataclass(frozen=True)
class LossOptions:
    """What the loss is, apart from its tensors; checks itself when it is made.

    Attributes:
        reduction: "mean", "sum" or "none" (one loss per token).
        ignore_index: The label of tokens without loss; None becomes -100, as in torch.
        label_smoothing: Share of the target that is spread over the vocabulary, 0 to 1.
        logit_scale: Factor on the logits.
        softcap: `softcap * tanh(logits / softcap)`; None for no cap.
        z_loss: Factor on the squared log-sum-exp.
    """

    reduction: Reduction = "mean"
    ignore_index: int = DEFAULT_IGNORE_INDEX
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ignore_index", "label_smoothing", "logit_scale", "softcap", "z_loss"):
            value = getattr(self, name)
            plain = plain_number(value)
            if name == "ignore_index" and value is None:
                plain = DEFAULT_IGNORE_INDEX
            if plain is not value:
                object.__setattr__(self, name, plain)
        _check_reduction(self.reduction)
        if not _is_int(self.ignore_index):
            raise TypeError(
                f"`ignore_index` must be an int, got {self.ignore_index!r}: "
                "pass the label that marks tokens without loss"
            )
        _check_number("label_smoothing", self.label_smoothing, "lie in [0, 1]", 0.0, 1.0)
        _check_number("z_loss", self.z_loss, "be at least 0 and finite", 0.0, None)
        _check_number("logit_scale", self.logit_scale, "be finite", None, None)
        if self.softcap is not None:
            _check_number("softcap", self.softcap, "be positive or None", 0.0, None)
            if self.softcap == 0:
                raise ValueError(
                    f"`softcap` must be positive or None, got {self.softcap!r}: "
                    "pass None for logits without a cap"
                )


@dataclass(frozen=True)
class DivergenceOptions:
    """What a divergence of two heads is, apart from its tensors; checks itself when it is made.

    Attributes:
        temperature: What both heads' logits are divided by.
        beta: 0 for KL(teacher || student), 1 for KL(student || teacher), between them from the
            mixture.
        reduction: "mean", "sum" or "none" (one divergence per token).
        student_logit_scale: Factor on the student's logits.
        student_softcap: Cap of the student's logits; None for no cap.
        teacher_logit_scale: Factor on the teacher's logits.
        teacher_softcap: Cap of the teacher's logits; None for no cap.
    """

    temperature: float = 1.0
    beta: float = 0.0
    reduction: Reduction = "mean"
    student_logit_scale: float = 1.0
    student_softcap: float | None = None
    teacher_logit_scale: float = 1.0
    teacher_softcap: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            plain = plain_number(value)
            if plain is not value:
                object.__setattr__(self, field.name, plain)
        _check_reduction(self.reduction)
        _check_positive("temperature", self.temperature, "1.0 leaves the logits as they are")
        _check_number("beta", self.beta, "lie in [0, 1]", 0.0, 1.0)
        for head in ("student", "teacher"):
            scale, softcap = (
                getattr(self, f"{head}_{name}") for name in ("logit_scale", "softcap")
            )
            _check_number(f"{head}_logit_scale", scale, "be finite", None, None)
            if softcap is not None:
                _check_positive(f"{head}_softcap", softcap, "pass None for logits without a cap")

    def student(self) -> tuple[float, float | None]:
        """The student's scale and softcap, the temperature within."""
        return _cooled(self.student_logit_scale, self.student_softcap, self.temperature)

    def teacher(self) -> tuple[float, float | None]:
        """The teacher's scale and softcap, the temperature within."""
        return _cooled(self.teacher_logit_scale, self.teacher_softcap, self.temperature)


@dataclass(frozen=True)
class LogProbOptions:
    """What log-probabilities are, apart from tensors; checks itself when it is made.

    Attributes:
        temperature: What the logits are divided by; None where every token has its own.
        outputs: Names of the fields that are asked for.
        ignore_index: The target of tokens that do not count; None becomes -100.
        logit_scale: Factor on the logits.
        softcap: Cap of the logits; None for no cap.
    """

    temperature: float | None = 1.0
    outputs: tuple[str, ...] = ("log_probs", "entropy")
    ignore_index: int = DEFAULT_IGNORE_INDEX
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        of_logits = LossOptions("none", self.ignore_index, 0.0, self.logit_scale, self.softcap)
        for name in ("ignore_index", "logit_scale", "softcap"):
            object.__setattr__(self, name, getattr(of_logits, name))
        object.__setattr__(self, "temperature", plain_number(self.temperature))
        if self.temperature is not None:
            _check_positive("temperature", self.temperature, "1.0 leaves the logits as they are")
        if isinstance(self.outputs, str):
            raise TypeError(
                f"`outputs` must be a tuple of names, got {self.outputs!r}: "
                f"pass ({self.outputs!r},)"
            )
        unknown = [name for name in self.outputs if name not in LOG_PROB_NAMES]
        if unknown or not self.outputs:
            raise ValueError(
                f"`outputs` must name some of {LOG_PROB_NAMES}, got {self.outputs!r}: "
                "leave out what there is no field for"
            )

    def cooled(self) -> tuple[float, float | None]:
        """Scale and softcap, with a temperature of all tokens within."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return _cooled(float(self.logit_scale), self.softcap, temperature)


def _cooled(scale: float, softcap: float | None, temperature: float) -> tuple[float, float | None]:
    """Of logits divided by the temperature: `cap tanh(scale x / cap) / T` has both divided by T."""
    return scale / temperature, None if softcap is None else softcap / temperature


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, losses and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def item_count(num_items: Any) -> Any:
    """A number of items as `plain_number` has it, or as the tensor that a graph can hold."""
    plain = num_items is None or isinstance(num_items, (int, float, Tensor))
    if torch.compiler.is_compiling() and not plain:
        return torch.as_tensor(num_items)
    return plain_number(num_items)


def plain_number(value: Any) -> Any:
    """The Python number of a NumPy scalar or of an array of one element; others as they are."""
    # The compiler reads no attribute of a number that changes from call to call.
    if isinstance(value, (int, float, Tensor)) or getattr(value, "size", None) != 1:
        return value
    return value.item()


def _check_reduction(reduction: object) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"`reduction` must be one of {get_args(Reduction)}, got {reduction!r}: "
            "use 'none' for one loss per token"
        )


def _check_positive(name: str, value: object, remedy: str) -> None:
    _check_number(name, value, "be positive and finite", 0.0, None)
    if value == 0:
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}: {remedy}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(
    name: str, value: object, contract: str, low: float | None, high: float | None
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}: pass a Python float")
    finite = value == value and value not in (float("inf"), float("-inf"))
    if not finite or (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"`{name}` must {contract}, got {value!r}: choose a value in this range")
