"""The options of a patch and of one loss, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hf_fused_head.options import LossOptions


@dataclass(frozen=True)
class PatchOptions:
    """What `apply_patch` was asked for; its arguments under the same names."""

    impl: str = "auto"
    memory_budget_mib: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    stats: tuple[str, ...] = ()
    strict: bool = True


class LossSettings(NamedTuple):
    """One loss: what it is and how it may be computed."""

    options: LossOptions
    num_items: int | Tensor | None
    impl: str
    memory_budget_mib: float | None
    stats: tuple[str, ...]
    logit_bias: Tensor | None = None  # [1, V], added to the logits beside the head's own bias


class TokenSettings(NamedTuple):
    """Values per token: what they are and how they may be computed.

    Attributes:
        options: Scale and softcap of the logits, and the label that is ignored.
        temperature: What the logits are divided by.
        outputs: Fields of `TokenLogProbs`.
        impl: As for `apply_patch`.
        memory_budget_mib: As for `apply_patch`.
        logit_bias: As for a loss.
        in_float32: Whether a head of lower precision is copied to float32.
    """

    options: LossOptions
    temperature: float
    outputs: tuple[str, ...]
    impl: str
    memory_budget_mib: float | None
    logit_bias: Tensor | None = None
    in_float32: bool = False


Settings = LossSettings | TokenSettings
