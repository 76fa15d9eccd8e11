"""What is fused and what is not, as the sweep over every class of transformers found it.

conformance.json holds the verdicts that `python tests/support/conformance.py --write` came to; the
facts of the families (registry.py) are what the loss has to know of a class. No line is written
by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .families.family import Family
from .registry import FAMILIES

CONFORMANCE = Path(__file__).with_name("conformance.json")
TASKS = {
    "classes": "causal",
    "multimodal": "multimodal",
    "seq2seq": "seq2seq",
    "masked": "masked",
    "pretraining": "pretraining",
}
"""The parts of the file, by what the support table calls them."""


@dataclass(frozen=True)
class SupportRow:
    """One line of the support table: the classes of a model family that fare alike.

    Attributes:
        family: Name of the registered family, or the model type that transformers gives the class.
        classes: The classes of transformers that it covers.
        task: "causal", "seq2seq", "masked", "pretraining" (masked tokens and a class for the whole
            text), or "multimodal" where the text path was swept.
        status: "fused", "refused", "not built" where no tiny model of it could be made, or "not
            swept" where the class is of a later transformers than the sweep.
        reason: Why it is not fused, "" where it is.
        scale: How the logits are scaled, "" where they are not.
        softcap: The config field of the cap, "" where there is none.
        shift: Where the labels are not shifted: by whom the loss is computed; "" where they are.
        added: The bias that the forward adds to the head's output, "" where there is none.
        bias: Whether the head has a bias.
        extras: What the stock forward adds to the loss by itself.
        scenarios: How many ways to call the forward gave stock's loss and every gradient of it.
        registered: Whether the package states facts of it.
        transformers: The version of the sweep; for "not swept" the one that has the class.
    """

    family: str
    classes: tuple[str, ...]
    task: str
    status: str
    reason: str
    scale: str
    softcap: str
    shift: str
    added: str
    bias: bool
    extras: str
    scenarios: int
    registered: bool
    transformers: str


def supported_models() -> list[SupportRow]:
    """Every class that was swept, one row a model family and verdict.

    A class of transformers that is in no row is fused where its forward does nothing to the head's
    output that is not known, and refused by name elsewhere.

    Returns:
        Rows with facts first, in the order of the registry; then those that need none.
    """
    result = json.loads(CONFORMANCE.read_text())
    rows: dict[tuple[str, ...], SupportRow] = {}
    for name, task, record in (*_swept(result), *_not_swept(result)):
        family = _family_of(name)
        row = _row(name, task, record, family, result["transformers"])
        key = (row.family, task, row.status, row.reason)
        rows[key] = row if key not in rows else _joined(rows[key], row)
    order = {family.name: place for place, family in enumerate(FAMILIES)}
    return sorted(rows.values(), key=lambda row: order.get(row.family, len(order)))


def _swept(result: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for part, task in TASKS.items():
        for name, record in result[part].items():
            yield name, task, record


def _not_swept(result: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Classes whose facts are known and that the swept transformers does not have."""
    for family in FAMILIES:
        for name in family.classes:
            if not any(name in result[part] for part in TASKS):
                task = "causal" if name.endswith("ForCausalLM") else "multimodal"
                version = {"transformers": family.transformers}
                yield name, task, {"verdict": "not swept", "reason": "", **version}


def _family_of(name: str) -> Family | None:
    return next((family for family in FAMILIES if name in family.classes), None)


def _row(
    name: str, task: str, record: dict[str, Any], family: Family | None, version: str
) -> SupportRow:
    types = record.get("model_types") or [name]
    return SupportRow(
        family=types[0] if family is None else family.name,
        classes=(name,),
        task=task,
        status=record["verdict"],
        reason=record["reason"],
        scale="" if family is None else _spell_scale(family),
        softcap="" if family is None else family.softcap_field or "",
        shift=record["labels"] if "labels" in record else _spell_shift(family),
        added="" if family is None or not family.bias_field else f"+ {family.bias_field}",
        bias=record.get("bias", False),
        extras="router auxiliary loss" if record.get("router_loss") else "",
        scenarios=len(record.get("equal", ())),
        registered=family is not None,
        transformers=record.get("transformers", version),
    )


def _joined(one: SupportRow, other: SupportRow) -> SupportRow:
    """One row for two classes of a family; it claims what holds for both."""
    return SupportRow(
        **{
            **one.__dict__,
            "classes": (*one.classes, *other.classes),
            "bias": one.bias or other.bias,
            "extras": one.extras or other.extras,
            "scenarios": min(one.scenarios, other.scenarios),
        }
    )


def _spell_scale(family: Family) -> str:
    if family.scale_field is None:
        return ""
    return f"{'/' if family.scale_divides else '*'} config.{family.scale_field}"


def _spell_shift(family: Family | None) -> str:
    if family is None or not (family.own_loss or family.unshifted):
        return ""
    return spell_shift(family.own_loss)


def spell_shift(own_loss: str) -> str:
    """What the support table says of labels that are not shifted.

    Args:
        own_loss: What the forward calls itself, "" where it uses `self.loss_function`.
    """
    return f"not shifted, {own_loss} of its own" if own_loss else "not shifted"
