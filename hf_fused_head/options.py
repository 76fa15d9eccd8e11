"""The options of the loss as frozen data, what travels to an engine, and which engine it is."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hf_fused_head.distributed.vocab_parallel import WHOLE, VocabShard

Impl = Literal["auto", "triton", "torch", "reference"]
Reduction = Literal["mean", "sum", "none"]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# That of torch, where `None` means it too.
DEFAULT_IGNORE_INDEX = -100

# What a loss can tell beside itself; "accuracy" is told token by token, as `correct`.
STAT_NAMES = ("accuracy", "entropy")


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
        if self.reduction not in get_args(Reduction):
            raise ValueError(
                f"`reduction` must be one of {get_args(Reduction)}, got {self.reduction!r}: "
                "use 'none' for one loss per token"
            )
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


class Operands(NamedTuple):
    """The head: logits are `softcap * tanh(scale * (sum_i X_i W_i^T + bias) / softcap)`."""

    inputs: list[Tensor]  # [N, H_i] each
    weights: list[Tensor]  # [V, H_i] each, the rows of `shard`
    bias: Tensor | None  # [V], of `shard`
    class_weight: Tensor | None  # of the whole vocabulary, in the dtype of the statistics
    logit_scale: float
    softcap: float | None
    shard: VocabShard = WHOLE

    @property
    def num_rows(self) -> int:
        """Rows of the head that are here."""
        return self.weights[0].shape[0]

    @property
    def vocab_size(self) -> int:
        """Rows of the whole head."""
        return self.shard.total(self.num_rows)

    @property
    def part_weight(self) -> Tensor | None:
        """The class weights of the rows that are here."""
        return self.shard.part(self.class_weight, self.num_rows)


class RowStats(NamedTuple):
    """Per row, float32 (float64 for float64 inputs); an empty tensor where not asked for."""

    nll: Tensor  # [N], -log p of the target
    lse: Tensor  # [N], log-sum-exp of the logits
    smooth: Tensor  # [N] or [0], mean over the vocabulary of w_j * -log p_j
    entropy: Tensor  # [N] or [0]
    correct: Tensor  # [N] or [0], bool
    # [N], p_j = correction * exp(z_j - lse): what rounding took from lse, for a later backward.
    correction: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients somebody wants."""

    inputs: list[bool]
    weights: list[bool]
    bias: bool

    def any(self) -> bool:
        """Whether there is any gradient to make."""
        return self.bias or any(self.inputs) or any(self.weights)


class Choice(NamedTuple):
    """An engine and, for people, why it is the one."""

    impl: str
    reason: str


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, losses and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolve_impl(impl: str, device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The engine that `impl` means for tensors of this device and dtype.

    Args:
        impl: "auto", "triton", "torch" or "reference".
        device: Where the tensors lie.
        dtype: The dtype of the hidden states and the head.

    Raises:
        ValueError: If there is no such implementation.
        NotImplementedError: If the named one does not support device or dtype.
    """
    if impl not in get_args(Impl):
        raise ValueError(
            f"`impl` must be one of {get_args(Impl)}, got {impl!r}: 'auto' picks a fitting one"
        )
    if impl in ("torch", "reference"):
        return Choice(impl, f"impl={impl!r} was asked for and runs on any device")
    device_type = torch.device(device).type
    obstacle = triton_obstacle(device_type, dtype)
    if impl == "triton":
        if obstacle is not None:
            raise NotImplementedError(
                f"`impl` must support the inputs, got 'triton': {obstacle}; "
                "use impl='torch' or impl='auto'"
            )
        return Choice("triton", "impl='triton' was asked for and supports these inputs")
    if device_type != "cuda":
        return Choice("torch", f"the tensors are on {device_type!r}, Triton kernels need CUDA")
    if obstacle is not None:
        return Choice("torch", f"the Triton kernels cannot be used: {obstacle}")
    fused = importlib.import_module("hf_fused_head.fused")
    doubt = fused.unverified_reason(device_type)
    if doubt is not None:
        return Choice("torch", f"impl='triton' has to be asked for by name here: {doubt}")
    reasons = [f"the tensors are on CUDA and the Triton kernels support {dtype}"]
    slower = fused.slower_reason(dtype)
    return Choice("triton", "; ".join(reasons if slower is None else [*reasons, slower]))


def triton_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton engine cannot take such tensors; None when it can."""
    if importlib.util.find_spec("hf_fused_head.fused") is None:
        return "this version of hf_fused_head has no Triton engine"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    # By name, at first use: options lies below the engines and must not need triton.
    return importlib.import_module("hf_fused_head.fused").unavailable_reason(device_type, dtype)


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
