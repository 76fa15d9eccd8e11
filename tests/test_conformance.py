"""Every causal LM class of this transformers, patched, trains like stock or is refused by name.

One run takes a share of the classes, another one every week; `-m slow` takes all of them. The
committed verdicts (patches/conformance.json) are held to what the run finds.
"""

from __future__ import annotations

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

from hf_fused_head.patches import call
from hf_fused_head.patches.settings import LossSettings

SHARES = 4
# A week is a share; CONFORMANCE_SHARE names another one.
WEEK = datetime.date.today().isocalendar().week
SHARE = int(os.environ.get("CONFORMANCE_SHARE", WEEK)) % SHARES

CLASSES = conformance.class_names()
MINE = conformance.share_of(CLASSES, SHARE, SHARES)


@functools.cache
def committed() -> dict:
    return conformance.read_result()


def check(name: str) -> None:
    """Fused or refused, nothing else; and as committed where that is of this transformers."""
    record = conformance.judge(name)
    known = committed()["classes"].get(name, {})
    version = transformers.__version__
    if committed()["transformers"] == version:
        assert conformance.gist(record) == conformance.gist(known), record["reason"]
    elif record["verdict"] == "not built":
        pytest.skip(f"{name} of transformers {version}: {record['reason']}")
    assert record["verdict"] in ("fused", "refused"), record["reason"]
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


@pytest.mark.slow
@pytest.mark.parametrize("name", conformance.multimodal_names())
def test_the_text_path_of_every_multimodal_class(name: str) -> None:
    record = conformance.judge(name)
    if record["verdict"] == "not built":
        pytest.skip(f"{name}: {record['reason']}")
    assert record["verdict"] in ("fused", "refused"), record["reason"]


def test_shares_are_fair_and_cover_every_class() -> None:
    shares = [conformance.share_of(CLASSES, share, SHARES) for share in range(SHARES)]
    assert sorted(name for share in shares for name in share) == sorted(CLASSES)
    assert max(map(len, shares)) <= len(CLASSES) / SHARES * 1.5


def test_the_committed_sweep_is_whole_and_clean() -> None:
    records = committed()["classes"]
    if committed()["transformers"] == transformers.__version__:
        assert sorted(records) == sorted(CLASSES)
    verdicts = [record["verdict"] for record in records.values()]
    assert set(verdicts) <= {"fused", "refused"}
    assert verdicts.count("fused") >= 165
    others = [record["verdict"] for record in committed()["multimodal"].values()]
    assert set(others) <= {"fused", "refused", "not built"}
    for name, record in records.items():
        assert record["verdict"] == "fused" or record["reason"], name


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
    stock_settings = call.Call._settings

    def wrong_settings(self: call.Call) -> LossSettings:
        settings = stock_settings(self)
        cap = settings.options.softcap * 1.001
        return settings._replace(options=dataclasses.replace(settings.options, softcap=cap))

    monkeypatch.setattr(call.Call, "_settings", wrong_settings)
    judge = conformance.Judge(tiny_classes.build("Gemma2ForCausalLM"))
    assert judge.outcome(conformance.SCENARIO["plain"]).status == "mismatch"
