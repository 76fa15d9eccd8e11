"""The options of a patched model under `FusedHeadTrainer`: kept, unless another is named."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_loss import in_float64
from oracle import assert_close_as_torch
from tiny_trainer import arguments, build, history, odd_model, rows, trained
from torch import Tensor, nn
from transformers import Trainer

from hf_fused_head import FusedHeadTrainer, apply_patch, last_stats, patch_report, remove_patch
from hf_fused_head.patches import patched

pytestmark = pytest.mark.newest

OPTIONS: dict[str, Any] = {
    "label_smoothing": 0.1,
    "z_loss": 1e-2,
    "memory_budget_mib": 64,
    "impl": "reference",
}


def first_loss(model: nn.Module, folder: Path, smoothing: float = 0.0, **keywords: Any) -> float:
    """The loss of one step of size zero."""
    args = arguments(folder, max_steps=1, learning_rate=0.0, label_smoothing_factor=smoothing)
    trainer = FusedHeadTrainer(model, args, train_dataset=rows(), **keywords)
    trainer.train()
    return history(trainer, "loss").item()


def plain_loss(model: nn.Module, folder: Path, smoothing: float, z_loss: float) -> Tensor:
    """The same loss by plain torch operations on the logits, in the dtype of the model."""
    args = arguments(folder, max_steps=1)
    trainer = Trainer(model, args, train_dataset=rows())
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch.pop("labels")[:, 1:].flatten()
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    return loss + z_loss * logits.logsumexp(-1)[labels != -100].square().mean()


def assert_first_loss(found: float, folder: Path, smoothing: float, z_loss: float) -> None:
    expected, truth = (
        plain_loss(model, folder, smoothing, z_loss) for model in (build(), in_float64(build()))
    )
    assert_close_as_torch("loss", torch.tensor(found), expected, truth)


@pytest.mark.parametrize("by_model_init", [False, True])
def test_a_patched_model_keeps_its_options(by_model_init: bool, tmp_path: Path) -> None:
    model = apply_patch(build(), **OPTIONS)
    if by_model_init:
        found = first_loss(None, tmp_path, model_init=lambda: model)
    else:
        found = first_loss(model, tmp_path)
    assert_first_loss(found, tmp_path, OPTIONS["label_smoothing"], OPTIONS["z_loss"])
    assert patch_report(model).kernel.startswith("reference")


def test_what_is_named_replaces_one_option_alone(tmp_path: Path) -> None:
    model = apply_patch(build(), **OPTIONS)
    found = first_loss(model, tmp_path, head_options={"z_loss": 0.0})
    assert_first_loss(found, tmp_path, OPTIONS["label_smoothing"], 0.0)
    assert patch_report(model).kernel.startswith("reference")


def test_the_smoothing_of_args_is_that_of_one_trainer(tmp_path: Path) -> None:
    """The next trainer smooths as its own args say, or as the model does without them."""
    model = apply_patch(build(), label_smoothing=0.1)
    assert_first_loss(first_loss(model, tmp_path, 0.2), tmp_path, 0.2, 0.0)
    assert_first_loss(first_loss(copy.deepcopy(model), tmp_path), tmp_path, 0.1, 0.0)
    never_patched = build()
    assert_first_loss(first_loss(never_patched, tmp_path, 0.2), tmp_path, 0.2, 0.0)
    assert_first_loss(first_loss(never_patched, tmp_path), tmp_path, 0.0, 0.0)


@pytest.mark.parametrize(
    ("own", "named", "logged"),
    [
        ((), {}, ["entropy", "mean_token_accuracy"]),
        (("accuracy",), {}, ["mean_token_accuracy"]),
        (("accuracy",), {"stats": ("entropy",)}, ["entropy"]),
        ((), {"stats": ()}, []),
    ],
)
def test_statistics_that_the_model_was_patched_with(
    own: tuple[str, ...], named: dict[str, Any], logged: list[str], tmp_path: Path
) -> None:
    model = apply_patch(build(), stats=own)
    args = arguments(tmp_path, max_steps=1)
    trainer = FusedHeadTrainer(model, args, train_dataset=rows(), head_options=named)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert sorted(entry.keys() & {"entropy", "mean_token_accuracy"}) == logged


@pytest.mark.parametrize("refused_at", ["apply_patch", "the first forward"])
def test_a_model_that_may_stay_stock_trains_as_stock(refused_at: str, tmp_path: Path) -> None:
    model = odd_model()
    if refused_at == "apply_patch":
        stock_loss = model.loss_function
        model.loss_function = lambda *args, **kwargs: stock_loss(*args, **kwargs)
    stock = copy.deepcopy(model)
    settings = {"args": arguments(tmp_path, max_steps=2)}
    with pytest.warns(UserWarning, match="stays stock"):
        apply_patch(model, strict=False)
        ours = trained(FusedHeadTrainer, model, rows(), **settings)
    expected = trained(Trainer, stock, rows(), **settings)
    assert torch.equal(history(ours, "loss"), history(expected, "loss"))
    for found, wanted in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_apply_patch_called_again_takes_the_defaults(tmp_path: Path) -> None:
    model = apply_patch(build(), **OPTIONS, stats=("accuracy",))
    assert_first_loss(first_loss(apply_patch(model), tmp_path), tmp_path, 0.0, 0.0)
    assert last_stats(model).entropy is not None
    assert_first_loss(first_loss(apply_patch(remove_patch(model)), tmp_path), tmp_path, 0.0, 0.0)


def test_a_patch_for_a_while_gives_the_options_back(tmp_path: Path) -> None:
    model = apply_patch(build(), **OPTIONS)
    with patched(model, z_loss=0.5):
        assert_first_loss(first_loss(model, tmp_path), tmp_path, 0.0, 0.5)
    found = first_loss(model, tmp_path)
    assert_first_loss(found, tmp_path, OPTIONS["label_smoothing"], OPTIONS["z_loss"])
