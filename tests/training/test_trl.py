"""A patched model under TRL's trainers: refused by name, or stock, and never harmed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs trl (pip install trl)")

import torch
from peft import LoraConfig
from torch import nn
from trl_cases import TRAINERS, trainer

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report, remove_patch

MILD = functools.partial(apply_patch, strict=False)
ADVICE = r"trl\.trainer\.utils.*FusedHeadTrainer.*remove_patch.*TRL's own fused head"


def change_models(made: Any, change: Callable[[nn.Module], nn.Module]) -> None:
    """Does something to the policy and to the reference model of a trainer."""
    change(made.model)
    if getattr(made, "ref_model", None) is not None:
        change(made.ref_model)


def run(made: Any) -> Any:
    """The trainer after its training, from the same random state."""
    torch.manual_seed(0)
    made.train()
    return made


def assert_same_run(ours: Any, stock: Any) -> None:
    """Every number in the logs but the times, and every weight, bit for bit."""
    entries = zip(ours.state.log_history, stock.state.log_history, strict=True)
    for found, wanted in entries:
        assert found.keys() == wanted.keys()
        same = [key for key in found if "time" not in key and "per_second" not in key]
        assert {key: found[key] for key in same} == {key: wanted[key] for key in same}
    for (name, found), wanted in zip(
        ours.model.named_parameters(), stock.model.parameters(), strict=True
    ):
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", TRAINERS)
def test_a_model_that_may_stay_stock_trains_as_without_a_patch(
    name: str, when: str, tmp_path: Path
) -> None:
    stock = run(trainer(name, tmp_path))
    assert any(entry.get("grad_norm", 0.0) > 0 for entry in stock.state.log_history)
    with pytest.warns(UserWarning, match=f"stays stock.*{ADVICE}"):
        if when == "before":
            ours = trainer(name, tmp_path, MILD)
        else:
            ours = trainer(name, tmp_path)
            change_models(ours, MILD)
        run(ours)
    assert_same_run(ours, stock)
    assert "trl.trainer.utils" in patch_report(ours.model).reason


def adapters() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="gaussian")


@pytest.mark.parametrize("name", ["sft", "dpo"])
@pytest.mark.parametrize(
    "changes",
    [{"peft_config": adapters()}, {"bf16": True}, {"gradient_checkpointing": True}],
    ids=["adapters", "bf16", "checkpointing"],
)
def test_what_lies_between_trl_and_the_patch(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    stock = run(trainer(name, tmp_path, **changes))
    with pytest.warns(UserWarning, match=f"stays stock.*{ADVICE}"):
        ours = run(trainer(name, tmp_path, MILD, **changes))
    assert_same_run(ours, stock)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_refused_training_can_be_started_again(name: str, tmp_path: Path) -> None:
    """Each model is refused at its first forward, which leaves it TRL's; then TRL trains alone."""
    ours = trainer(name, tmp_path, apply_patch)
    has_reference = getattr(ours, "ref_model", None) is not None
    for _ in range(1 + has_reference):
        with pytest.raises(UnsupportedModelError, match=ADVICE):
            run(ours)
    run(ours)
    assert any(entry.get("grad_norm", 0.0) > 0 for entry in ours.state.log_history)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_model_that_trl_holds_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    stock, ours = run(trainer(name, tmp_path)), trainer(name, tmp_path)
    before = type(ours.model), ours.model.__dict__["forward"]
    with pytest.raises(UnsupportedModelError, match=ADVICE):
        apply_patch(ours.model)
    assert (type(ours.model), ours.model.__dict__["forward"]) == before
    assert_same_run(run(ours), stock)


@pytest.mark.parametrize("name", TRAINERS)
def test_remove_patch_gives_back_what_trl_put_there(name: str, tmp_path: Path) -> None:
    stock = run(trainer(name, tmp_path))
    ours = trainer(name, tmp_path, apply_patch)
    assert not patch_report(ours.model).fused
    change_models(ours, remove_patch)
    forward = ours.model.__dict__["forward"]
    assert type(ours.model) is type(stock.model)
    assert forward.__func__.__code__ is stock.model.__dict__["forward"].__func__.__code__
    assert_same_run(run(ours), stock)
    with pytest.raises(UnsupportedModelError, match=ADVICE):
        apply_patch(ours.model)
    assert ours.model.__dict__["forward"] is forward
