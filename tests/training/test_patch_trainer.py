"""`patch_trainer`: both models of a trainer of TRL, or why its loss would not be fused."""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs trl (pip install trl)")

from torch import nn
from trl_cases import UNFUSED, policy, trainer
from trl_runs import HeadCalls, assert_same_run, assert_trains_as_trl, assert_was_fused, run

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report, patch_trainer
from hf_fused_head.patches.adapter import options_of


def saved_policy(folder: Path, **settings: Any) -> Any:
    """A policy whose name is a folder, from which TRL loads its reference model."""
    model = policy(**settings)
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


@pytest.mark.parametrize("name", ["dpo", "kto", "rloo", "grpo"])
def test_policy_and_reference_are_fused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of GRPO and RLOO is one that TRL loads by itself."""
    calls, settings = HeadCalls(monkeypatch), {}
    if name in ("rloo", "grpo"):
        settings = {
            "beta": 0.5,
            "build": functools.partial(saved_policy, tmp_path / "policy"),
            "model_init_kwargs": None,
        }
    exact = trainer(name, tmp_path, **settings)
    for model in (exact.model, exact.ref_model):
        model.double()
    run(exact)
    calls.take()
    stock = run(trainer(name, tmp_path, **settings))
    of_trl = calls.take()
    ours = trainer(name, tmp_path, **settings)
    assert patch_trainer(ours, memory_budget_mib=64) is ours
    for model in (ours.model, ours.ref_model):
        assert patch_report(model).fused and options_of(model).memory_budget_mib == 64
    assert_was_fused(run(ours), calls.take(), of_trl)
    assert_trains_as_trl(ours, stock, exact)


def test_options_of_a_patched_model_are_kept(tmp_path: Path) -> None:
    patch = functools.partial(apply_patch, memory_budget_mib=32, impl="reference")
    made = patch_trainer(trainer("sft", tmp_path, patch), impl="torch")
    options = options_of(made.model)
    assert (options.memory_budget_mib, options.impl) == (32, "torch")


@pytest.mark.parametrize("name", UNFUSED)
def test_trainers_that_make_their_own_logits_are_named_and_train_on(
    name: str, tmp_path: Path
) -> None:
    stock, ours = run(trainer(name, tmp_path)), trainer(name, tmp_path, apply_patch)
    assert any(entry.get("grad_norm", 0.0) > 0 for entry in stock.state.log_history)
    with pytest.raises(UnsupportedModelError, match=f"{type(ours).__name__} makes its loss from"):
        patch_trainer(ours)
    with pytest.warns(UserWarning, match="called in training without labels|a trainer of TRL runs"):
        run(ours)
    assert patch_report(ours.model).last_loss.startswith("not fused")
    assert_same_run(ours, stock)


def test_what_makes_sft_read_logits_is_named(tmp_path: Path) -> None:
    smoothed = {"label_smoothing_factor": 0.1}
    with pytest.warns(FutureWarning, match="label_smoothing_factor"):
        made = trainer("sft", tmp_path, **smoothed)
    with pytest.raises(UnsupportedModelError, match=r"SFTTrainer.*`label_smoothing_factor`"):
        patch_trainer(made)
    assert not patch_report(made.model).fused
    assert patch_report(patch_trainer(trainer("sft", tmp_path)).model).fused
    made = trainer("sft", tmp_path)
    made.compute_loss_func = lambda *_, **__: None
    with pytest.raises(UnsupportedModelError, match=r"SFTTrainer.*`compute_loss_func`"):
        patch_trainer(made)


def test_dft_ignores_label_smoothing(tmp_path: Path) -> None:
    made = trainer("sft", tmp_path, loss_type="dft", label_smoothing_factor=0.1)
    assert patch_report(patch_trainer(made).model).fused


@pytest.mark.parametrize("patched", [True, False])
def test_a_refused_reference_leaves_the_policy_as_it_was(tmp_path: Path, patched: bool) -> None:
    patch = functools.partial(apply_patch, memory_budget_mib=32)
    made = trainer("dpo", tmp_path, patch if patched else nn.Module.train)
    made.ref_model.lm_head.forward = types.MethodType(nn.Linear.forward, nn.Linear(1, 1))
    before = type(made.model), made.model.__dict__["forward"], options_of(made.model)
    with pytest.raises(UnsupportedModelError, match="there is a forward on the head"):
        patch_trainer(made, memory_budget_mib=64)
    assert (type(made.model), made.model.__dict__["forward"], options_of(made.model)) == before


def test_a_model_that_would_stay_stock_is_refused_too(tmp_path: Path) -> None:
    made = trainer("sft", tmp_path)
    made.model.loss_function = print
    with (
        pytest.warns(UserWarning, match="stays stock"),
        pytest.raises(UnsupportedModelError, match="its loss function is print"),
    ):
        patch_trainer(made, strict=False)


def test_a_trl_without_the_protocol_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer("sft", tmp_path)
    del made.model.forward
    monkeypatch.setattr(sys.modules["trl"], "__version__", "9.9")
    with pytest.raises(UnsupportedModelError, match=r"no fused head of TRL .*1\.16, got TRL 9\.9"):
        patch_trainer(made)


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
def test_losses_that_trl_does_not_make_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be 0 for a trainer of TRL"):
        patch_trainer(trainer("sft", tmp_path), **{name: 0.1})


def test_what_is_no_trainer_or_no_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must hold keywords of apply_patch, got 'budget'"):
        patch_trainer(trainer("sft", tmp_path), budget=3)
    with pytest.raises(TypeError, match="must be a trainer of TRL, got Linear"):
        patch_trainer(nn.Linear(2, 2))
