"""The facts of every family in one place: what the loss must know before the forward is seen.

Whether a class computes its loss itself is read from the names in the code of its forward, so that
only those that hide it need a family for that. A fact is never trusted: the real pass records what
the model does to its head's output and must reproduce it. A class without a family is taken for
plain (no scale, no cap, no bias) and is held to that in the same way, so it is fused when it is
plain and refused by the operation seen when it is not.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .families import (
    bart,
    cohere,
    falcon,
    gemma,
    granite,
    hyperclovax,
    masked,
    mistral,
    nanochat,
    xlstm,
)
from .families.family import Family

FAMILIES: tuple[Family, ...] = tuple(
    family
    for module in (
        *(mistral, gemma, cohere, granite),
        *(falcon, hyperclovax, nanochat, xlstm, bart, masked),
    )
    for family in module.FAMILIES
)


class Facts(NamedTuple):
    """What happens between the head and the loss: `cap * tanh(scale * (z + bias) / cap)`.

    Attributes:
        logit_scale: The factor.
        softcap: The cap, None for none.
        logit_bias: What is added to the logits of every token beside the head's own bias.
        own_loss: What the forward calls itself, "cross_entropy" or "CrossEntropyLoss", on labels
            that are not shifted; "" where it uses `self.loss_function`.
        unshifted: As in `Family`.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    logit_bias: Tensor | None = None
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
    """What the model's class, its config and its buffers state now."""
    own_loss = own_loss_of(type(model))
    if family is None:
        return Facts(own_loss=own_loss)
    scale, softcap = 1.0, None
    if family.scale_field is not None or family.softcap_field is not None:
        scale, softcap = _scale_and_cap(model.config.get_text_config(), family)
    bias = operator.attrgetter(family.bias_field)(model) if family.bias_field else None
    return Facts(scale, softcap, bias, family.own_loss or own_loss, family.unshifted)


def _scale_and_cap(config: Any, family: Family) -> tuple[float, float | None]:
    scale = 1.0
    if family.scale_field is not None:
        value = float(getattr(config, family.scale_field, None) or 1.0)
        scale = 1.0 / value if family.scale_divides else value
    softcap = None
    if family.softcap_field is not None:
        softcap = getattr(config, family.softcap_field, None)
    return scale, None if softcap is None else float(softcap)


# The compiler cannot look into code: it evaluates this, and guards on the class.
@torch.compiler.assume_constant_result
def own_loss_of(cls: type) -> str:
    """What the forward of a class calls in the place of `self.loss_function`; "" if it does not.

    A forward that names neither, as that of a subclass may, leaves it to the next one that it
    derives from.
    """
    for base in cls.__mro__:
        code = getattr(inspect.unwrap(base.__dict__.get("forward", None)), "__code__", None)
        names = () if code is None else code.co_names
        if "loss_function" in names:
            return ""
        for own_loss in ("CrossEntropyLoss", "cross_entropy"):
            if own_loss in names:
                return own_loss
    return ""
