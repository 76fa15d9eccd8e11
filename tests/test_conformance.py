"""Every causal LM class of this transformers, patched, trains like stock or is refused by name.

One run takes a share of the classes, another one every week; `-m slow` takes all of them. The
committed verdicts (patches/conformance.json) are held to what the run finds.
"""

from __future__ import annotations

import datetime
import functools
import os

import conformance
import pytest
import torch
import transformers

SHARES = 4
# A week is a share; CONFORMANCE_SHARE names another one.
WEEK = datetime.date.today().isocalendar().week
SHARE = int(os.environ.get("CONFORMANCE_SHARE", WEEK)) % SHARES

CLASSES = conformance.class_names()
MINE = conformance.share_of(CLASSES, SHARE, SHARES)
REST = [name for name in CLASSES if name not in MINE]


@functools.cache
def committed() -> dict:
    return conformance.read_result()


def check(name: str) -> None:
    """Fused or refused, nothing else; and as committed where that is of this transformers."""
    record = conformance.judge(name)
    if name not in committed()["classes"] and record["verdict"] == "not built":
        pytest.skip(f"new in transformers {transformers.__version__}: {record['reason']}")
    assert record["verdict"] in ("fused", "refused"), record["reason"]
    assert record["verdict"] == "fused" or record["reason"]
    if committed()["transformers"] == transformers.__version__:
        assert conformance.gist(record) == conformance.gist(committed()["classes"][name])


@pytest.mark.newest
@pytest.mark.parametrize("name", MINE)
def test_a_share_of_the_classes(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_the_rest_of_the_classes(name: str) -> None:
    check(name)


def test_shares_are_fair_and_cover_every_class() -> None:
    shares = [conformance.share_of(CLASSES, share, SHARES) for share in range(SHARES)]
    assert sorted(sum(shares, [])) == sorted(CLASSES)
    assert max(map(len, shares)) <= len(CLASSES) / SHARES * 1.5


def test_the_committed_sweep_is_whole_and_clean() -> None:
    records = committed()["classes"]
    if committed()["transformers"] == transformers.__version__:
        assert sorted(records) == sorted(CLASSES)
    verdicts = [record["verdict"] for record in records.values()]
    assert set(verdicts) <= {"fused", "refused"}
    assert verdicts.count("fused") >= 165
    for name, record in records.items():
        assert record["verdict"] == "fused" or record["reason"], name


@pytest.mark.parametrize("field", sorted(conformance.TRANSFORMS))
def test_a_forgotten_transform_would_be_seen(field: str) -> None:
    """Some class that has the field loses by far more than rounding when it is left out."""
    for name in conformance.FELT[field]:
        plain = conformance.SCENARIOS[0]
        if "aux_loss" in field:
            plain = conformance.SCENARIOS[4]
        losses = []
        for value in (conformance.TRANSFORMS[field], conformance.NEUTRAL[field]):
            model = conformance.build(name, **{field: value})
            losses.append(conformance.run(model, plain).loss)
        difference = (losses[0] - losses[1]).abs().item()
        assert difference > 1000 * torch.finfo(torch.float32).eps * losses[0].item(), name


def test_the_judge_sees_a_wrong_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap that is three parts in a thousand off is a mismatch, were it not refused before."""
    from hf_fused_head.patches import call

    stock_facts = call.Call._settings

    def wrong(self: call.Call) -> call.LossSettings:
        settings = stock_facts(self)
        options = settings.options
        return settings._replace(options=replace(options, softcap=options.softcap * 1.003))

    from dataclasses import replace

    monkeypatch.setattr(call.Call, "_settings", wrong)
    outcome = conformance.Judge(conformance.build("Gemma2ForCausalLM")).outcome(
        conformance.SCENARIOS[0]
    )
    assert outcome.status == "mismatch"
