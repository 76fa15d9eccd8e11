"""Every class with an LM head of this transformers trains like stock or is refused by name.

Causal, sequence-to-sequence and masked ones, and the text path of multimodal ones. A run takes a
share of the classes that the date picks, the next one on the next day; `-m slow` takes all of them.
What a run found is repeated with `CONFORMANCE_SHARE`, which a failure names, or by the name of the
class with `-m slow -k`. The committed verdicts (patches/conformance.json) are held to what the run
finds.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import os
import warnings

import conformance
import pytest
import tiny_classes
import torch
import transformers

from hf_fused_head.patches.fused_forward import FusedForward
from hf_fused_head.patches.settings import LossSettings

SHARES = 6
TODAY = datetime.date.today().toordinal()
SHARE = int(os.environ.get("CONFORMANCE_SHARE", TODAY)) % SHARES

CLASSES = [name for part in conformance.PARTS for name in conformance.class_names(part)]
MINE = conformance.share_of(CLASSES, SHARE, SHARES)


@functools.cache
def committed() -> dict:
    return conformance.read_result()


def check(name: str) -> None:
    """Fused or refused, nothing else; and as committed where that is of this transformers."""
    record = conformance.judge(name)
    known = next((committed()[p][name] for p in conformance.PARTS if name in committed()[p]), {})
    version = transformers.__version__
    told = f"CONFORMANCE_SHARE={SHARE}: {record['verdict']}: {record['reason']}"
    if committed()["transformers"] == version:
        assert conformance.gist(record) == conformance.gist(known), told
    if record["verdict"] == "not built":
        pytest.skip(f"{name} of transformers {version}: {record['reason']}")
    assert record["verdict"] in ("fused", "refused"), told
    if record["verdict"] == "refused":
        assert record["reason"]
        if known.get("verdict") != "refused":
            # Named in the summary: it is no mistake to refuse what is new, only to be silent.
            message = f"{name} of transformers {version} is refused: {record['reason']}"
            warnings.warn(message, stacklevel=2)


@pytest.mark.newest
@pytest.mark.parametrize("name", MINE)
def test_a_share_of_the_classes(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_class(name: str) -> None:
    check(name)


def test_shares_are_fair_and_cover_every_class() -> None:
    shares = [conformance.share_of(CLASSES, share, SHARES) for share in range(SHARES)]
    assert sorted(name for share in shares for name in share) == sorted(CLASSES)
    assert max(map(len, shares)) <= len(CLASSES) / SHARES * 1.5


FUSED = {"classes": 165, "multimodal": 73, "seq2seq": 34, "masked": 41, "pretraining": 7}
"""How many classes of a part are fused at least."""


@pytest.mark.parametrize("part", conformance.PARTS)
def test_the_committed_sweep_is_whole_and_clean(part: str) -> None:
    records = committed()[part]
    if committed()["transformers"] == transformers.__version__:
        assert sorted(records) == sorted(conformance.class_names(part))
    verdicts = [record["verdict"] for record in records.values()]
    allowed = ("fused", "refused") if part == "classes" else ("fused", "refused", "not built")
    assert set(verdicts) <= set(allowed)
    assert verdicts.count("fused") >= FUSED[part]
    for name, record in records.items():
        assert record["verdict"] == "fused" or record["reason"], name


def test_every_scenario_was_exercised() -> None:
    """By nearly every fused class; the router's by those that have one."""
    fused = [record for record in committed()["classes"].values() if record["verdict"] == "fused"]
    counts = collections.Counter(name for record in fused for name in record["equal"])
    for scenario in conformance.SCENARIOS:
        some = 20 if scenario.truth == "router" else len(fused) - 3
        assert counts[scenario.name] >= some, scenario.name
    # Whatever is not equal is stock's own failure, told with its error.
    for record in fused:
        ways = {*record["equal"], *record.get("stock_fails", {}), *record.get("refused", {})}
        applicable = [s.name for s in conformance.SCENARIOS if s.truth != "router"]
        assert ways.issuperset(applicable), record


def test_the_scenarios_are_different_calls() -> None:
    """Each moves the stock loss, or the form of the output, as it says."""
    model = tiny_classes.build("MixtralForCausalLM")
    results = {
        scenario.name: conformance.run(model, scenario) for scenario in conformance.SCENARIOS
    }
    losses = {name: result.loss.item() for name, result in results.items()}
    assert losses["num_items int"] == losses["num_items tensor"]
    assert losses["router loss by keyword"] == losses["router loss by config"]
    for name in ("num_items int", "shift_labels", "router loss by keyword", "autocast"):
        assert losses[name] != losses["plain"], name
    assert results["return_dict=False"].layout != results["plain"].layout
    assert set(results["evaluation"].values) == {"logits"}


@pytest.mark.parametrize("field", sorted(tiny_classes.TRANSFORMS))
def test_a_forgotten_transform_would_be_seen(field: str) -> None:
    """It moves the loss by thousands of roundings."""
    scenario = "router loss by keyword" if "aux_loss" in field else "plain"
    for name in tiny_classes.FELT[field]:
        with_it, without = (
            conformance.run(
                tiny_classes.build(name, **{field: values[field]}), conformance.SCENARIO[scenario]
            ).loss
            for values in (tiny_classes.TRANSFORMS, tiny_classes.NEUTRAL)
        )
        rounding = torch.finfo(torch.float32).eps * with_it.item()
        assert (with_it - without).abs().item() > 1000 * rounding, name


def test_the_judge_sees_a_wrong_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap that is one part in a thousand off would be a mismatch, were it not refused before."""
    stock_settings = FusedForward._settings

    def wrong_settings(self: FusedForward) -> LossSettings:
        settings = stock_settings(self)
        cap = settings.options.softcap * 1.001
        return settings._replace(options=dataclasses.replace(settings.options, softcap=cap))

    monkeypatch.setattr(FusedForward, "_settings", wrong_settings)
    judge = conformance.Judge(tiny_classes.build("Gemma2ForCausalLM"))
    assert judge.outcome(conformance.SCENARIO["plain"]).status == "mismatch"
