"""The facts of every family in one place: what the loss must know before the forward is seen.

A fact is never trusted: the real pass records what the model does to its head's output and must
reproduce it. A class without a family is taken for plain (no scale, no cap) and is held to that in
the same way, so it is fused when it is plain and refused by the operation seen when it is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from .families import (
    bart,
    cohere,
    falcon,
    gemma,
    granite,
    hyperclovax,
    mistral,
    nanochat,
    xlm,
    xlstm,
)
from .families.family import Family

FAMILIES: tuple[Family, ...] = tuple(
    family
    for module in (
        *(mistral, gemma, cohere, granite),
        *(falcon, hyperclovax, nanochat, xlstm, bart, xlm),
    )
    for family in module.FAMILIES
)


class Facts(NamedTuple):
    """What happens between the head and the loss: `cap * tanh(scale * z / cap)`.

    `own_loss` and `unshifted` are those of `Family`.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    own_loss: str = ""
    unshifted: bool = False


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
    if family.scale_field is None and family.softcap_field is None:
        return Facts(own_loss=family.own_loss, unshifted=family.unshifted)
    config = model.config.get_text_config()
    scale = 1.0
    if family.scale_field is not None:
        value = float(getattr(config, family.scale_field, None) or 1.0)
        scale = 1.0 / value if family.scale_divides else value
    softcap = None
    if family.softcap_field is not None:
        softcap = getattr(config, family.softcap_field, None)
    softcap = None if softcap is None else float(softcap)
    return Facts(scale, softcap, family.own_loss, family.unshifted)
