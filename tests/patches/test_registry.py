"""The facts of the families: true of the real forward, complete, and refused when wrong."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
import transformers
from oracle import assert_close_as_torch
from packaging.version import Version
from tiny_models import FAMILIES, batch, build
from torch import Tensor, nn
from trains_like import assert_trains_like

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report, supported_models
from hf_fused_head.patches import registry, support
from hf_fused_head.patches.families.family import Family
from hf_fused_head.patches.registry import Facts, facts_of, family_of


def raw_and_final_logits(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The head's own output and what the model makes of it."""
    raw = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: raw.append(output.detach())
    )
    with torch.no_grad():
        final = model(input_ids=batch(model)["input_ids"]).logits
    handle.remove()
    return raw[0], final


def applied(facts: Facts, raw: Tensor) -> Tensor:
    scaled = facts.logit_scale * raw
    return scaled if facts.softcap is None else facts.softcap * (scaled / facts.softcap).tanh()


@pytest.mark.newest
@pytest.mark.parametrize("family", FAMILIES)
def test_the_facts_are_what_the_stock_forward_does(family: str) -> None:
    model = build(family)
    facts = facts_of(model, family_of(model))
    raw, final = raw_and_final_logits(model)
    _, truth = raw_and_final_logits(copy.deepcopy(model).double())
    assert_close_as_torch("logits", applied(facts, raw), final, truth)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_names_the_family_whose_facts_are_used(family: str) -> None:
    model = build(family)
    found = family_of(model)
    assert found is None or type(model).__name__ in found.classes
    name = "" if found is None else found.name
    assert patch_report(apply_patch(model)).family == name


@pytest.mark.parametrize("family", registry.FAMILIES, ids=lambda family: family.name)
def test_a_family_states_a_fact(family: Family) -> None:
    plain = Family(family.name, family.classes, family.transformers)
    assert family != plain


@pytest.mark.parametrize(
    ("family", "field", "value", "facts"),
    [
        ("gemma2", "final_logit_softcapping", 3.0, Facts(1.0, 3.0)),
        ("gemma2", "final_logit_softcapping", None, Facts(1.0, None)),
        ("cohere", "logit_scale", 0.4, Facts(0.4)),
        ("cohere", "logit_scale", 2.5, Facts(2.5)),
        ("granite", "logits_scaling", 4.0, Facts(0.25)),
        ("granite", "logits_scaling", 0.5, Facts(2.0)),
    ],
)
def test_facts_follow_the_config(
    family: str, field: str, value: float | None, facts: Facts
) -> None:
    model = build(family, **{field: value})
    assert facts_of(model, family_of(model)) == facts
    stock = copy.deepcopy(model)
    assert_trains_like(apply_patch(model), stock, batch(model))


def test_a_subclass_has_the_facts_of_its_family() -> None:
    class MyGemma(transformers.Gemma2ForCausalLM):
        pass

    model = MyGemma(build("gemma2").config)
    found = family_of(model)
    assert found is not None and "Gemma2ForCausalLM" in found.classes


def test_a_class_without_a_family_is_taken_for_plain_and_fused() -> None:
    model = transformers.OlmoForCausalLM(
        transformers.OlmoConfig(
            vocab_size=101, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
        )
    )  # fmt: skip
    assert family_of(model) is None
    stock = copy.deepcopy(model)
    assert_trains_like(apply_patch(model), stock, batch(model))
    assert patch_report(model).fused


def without_families(monkeypatch: pytest.MonkeyPatch, *families: Family) -> None:
    monkeypatch.setattr(registry, "FAMILIES", families)


@pytest.mark.parametrize(
    ("family", "seen"), [("gemma2", "softcap"), ("cohere", "mul"), ("granite", "div")]
)
def test_a_forgotten_fact_is_refused(
    family: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_families(monkeypatch)
    model = apply_patch(build(family))
    with pytest.raises(UnsupportedModelError, match=seen):
        model(**batch(model))
    assert not patch_report(model).fused


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("granite", {"scale_divides": False}),
        ("cohere", {"scale_divides": True}),
        ("gemma2", {"softcap_field": "hidden_size"}),
    ],
)
def test_a_wrong_fact_is_refused(
    family: str, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    right = family_of(model)
    assert right is not None
    without_families(monkeypatch, dataclasses.replace(right, **change))
    apply_patch(model)
    with pytest.raises(UnsupportedModelError, match="what is known of its class"):
        model(**batch(model))


def test_the_support_table_names_existing_classes_once() -> None:
    rows = supported_models()
    names = [name for row in rows for name in row.classes]
    assert len(names) == len(set(names))
    assert len({(row.family, row.task, row.status, row.reason) for row in rows}) == len(rows)
    installed = Version(transformers.__version__)
    for row in rows:
        for name in row.classes:
            # Facts may be of classes that this version does not have yet.
            assert hasattr(transformers, name) or installed < Version(row.transformers), name
    by_family = {row.family: row for row in rows if row.status == "fused"}
    assert by_family["Granite"].scale == "/ config.logits_scaling"
    assert by_family["Cohere"].scale == "* config.logit_scale"
    assert by_family["Gemma 2 / 3"].softcap == "final_logit_softcapping"
    assert by_family["BART"].added == "+ final_logits_bias"
    assert by_family["bart"].shift == "not shifted, CrossEntropyLoss of its own"
    assert by_family["modernbert"].shift == "not shifted" and not by_family["llama"].shift
    assert by_family["phi"].bias and not by_family["llama"].bias
    assert by_family["qwen2_moe"].extras and not by_family["qwen2"].extras


def test_the_support_table_is_the_committed_sweep() -> None:
    """Every class that was swept stands in one row, with its verdict and no more than its ways."""
    swept = json.loads(support.CONFORMANCE.read_text())
    by_class = {name: row for row in supported_models() for name in row.classes}
    later = [name for name, row in by_class.items() if row.status == "not swept"]
    assert len(by_class) - len(later) == sum(len(swept[part]) for part in support.TASKS)
    for part, task in support.TASKS.items():
        for name, record in swept[part].items():
            row = by_class[name]
            assert (row.task, row.status, row.reason) == (task, record["verdict"], record["reason"])
            assert row.scenarios <= len(record.get("equal", ()))
            assert row.scenarios >= 5 or row.status != "fused", name
    # Facts may be known of classes that only a later transformers has.
    assert all(Version(swept["transformers"]) < Version(by_class[n].transformers) for n in later)


def test_the_facts_that_a_row_tells_are_those_of_its_family() -> None:
    rows = {row.family: row for row in supported_models() if row.status == "fused"}
    for family in registry.FAMILIES:
        row = rows.get(family.name)
        if row is not None:
            assert (family.scale_field or "") in row.scale
            assert (family.softcap_field or "") == row.softcap
            assert (family.bias_field in row.added) if family.bias_field else not row.added
            assert row.shift or not (family.own_loss or family.unshifted)
            assert family.own_loss in row.shift
