"""The facts of every family in one place: what the loss must know before the forward is seen.

A fact is never trusted: the real pass records what the model does to its head's output and must
reproduce it. A class without a family is taken for plain (no scale, no cap) and is held to that in
the same way, so it is fused when it is plain and refused by the operation seen when it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from . import (
    bart,
    cohere,
    falcon,
    gemma,
    gpt2,
    granite,
    hyperclovax,
    llama,
    mistral,
    nanochat,
    phi,
    qwen,
    xlm,
    xlstm,
)
from .family import Family

FAMILIES: tuple[Family, ...] = tuple(
    family
    for module in (
        *(llama, qwen, mistral, gemma, cohere, granite, phi, gpt2),
        *(falcon, hyperclovax, nanochat, xlstm, bart, xlm),
    )
    for family in module.FAMILIES
)


class Facts(NamedTuple):
    """What happens between the head and the loss: `cap * tanh(scale * z / cap)`.

    `own_loss` is `Family.own_loss`.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    own_loss: str = ""


@dataclass(frozen=True)
class SupportRow:
    """One line of the support table.

    Attributes:
        family: Name for people.
        classes: The classes of transformers that it covers.
        scale: How the logits are scaled, "" where they are not.
        softcap: The config field of the cap, "" where there is none.
        bias: Whether the head has a bias.
        extras: What the stock forward adds to the loss by itself.
        transformers: The version whose source the facts were read from.
    """

    family: str
    classes: tuple[str, ...]
    scale: str
    softcap: str
    bias: bool
    extras: str
    transformers: str


def supported_models() -> list[SupportRow]:
    """One row a model family whose facts are known; other plain models are fused as well.

    Returns:
        Rows in the order of the registry.
    """
    return [
        SupportRow(
            family=family.name,
            classes=family.classes,
            scale=_spell_scale(family),
            softcap=family.softcap_field or "",
            bias=family.bias,
            extras=family.extras,
            transformers=family.transformers,
        )
        for family in FAMILIES
    ]


def family_of(model: nn.Module) -> Family | None:
    """The family of the model's class or of the nearest class it derives from."""
    for cls in type(model).__mro__:
        for family in FAMILIES:
            if cls.__name__ in family.classes:
                return family
    return None


def facts_of(model: Any, family: Family | None) -> Facts:
    """Scale and cap as the model's config states them now."""
    if family is None:
        return Facts()
    config = model.config.get_text_config()
    scale = 1.0
    if family.scale_field is not None:
        value = float(getattr(config, family.scale_field, None) or 1.0)
        scale = 1.0 / value if family.scale_divides else value
    softcap = None
    if family.softcap_field is not None:
        softcap = getattr(config, family.softcap_field, None)
    return Facts(scale, None if softcap is None else float(softcap), family.own_loss)


def _spell_scale(family: Family) -> str:
    if family.scale_field is None:
        return ""
    return f"{'/' if family.scale_divides else '*'} config.{family.scale_field}"
