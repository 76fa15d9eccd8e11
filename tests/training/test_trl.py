"""A patched model under TRL's trainers: as TRL's own head to rounding, and without it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("trl", reason="needs trl (pip install trl)")

import datasets
import torch
import transformers
from peft import LoraConfig
from torch import nn
from trains_like import assert_gradients_close
from trl_cases import policy, trainer
from trl_runs import (
    HeadCalls,
    assert_trains_as_trl,
    assert_was_fused,
    change_models,
    run,
    weights_of,
)

from hf_fused_head import apply_patch, patch_report, patch_trainer, remove_patch


class Case(NamedTuple):
    """A trainer, its settings, and those of its models."""

    trainer: str
    settings: dict[str, Any]
    model: dict[str, Any]


def case(name: str, model: dict[str, Any] | None = None, **settings: Any) -> Case:
    return Case(name, settings, model or {})


def adapters(*targets: str, **options: Any) -> LoraConfig:
    settings = {"r": 4, "target_modules": ["q_proj", *targets], "init_lora_weights": "gaussian"}
    return LoraConfig(**settings, **options)


UNTIED = {"tie_word_embeddings": False}
DPO_LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]
GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
SEVERAL = {"num_iterations": 2, "max_steps": 4, "steps_per_generation": 1}
CASES = {
    "sft": case("sft"),
    "sft-dft": case("sft", loss_type="dft"),
    "sft-padding-free": case("sft", padding_free=True, max_length=None),
    "sft-packing": case("sft", packing=True, max_length=16),
    "sft-wrapped": case("sft", packing=True, max_length=16, packing_strategy="wrapped"),
    "sft-accumulation": case("sft", gradient_accumulation_steps=2, per_device_train_batch_size=2),
    "sft-adapters": case("sft", peft_config=adapters()),
    "sft-saved-head": case("sft", UNTIED, peft_config=adapters(modules_to_save=["lm_head"])),
    "sft-checkpointing": case("sft", gradient_checkpointing=True),
    "sft-evaluation": case("sft", eval_strategy="steps", eval_steps=1),
    "sft-bf16": case("sft", bf16=True),
    "sft-experts": case("sft", {"family": "mixtral"}, router_aux_loss_coef=0.3),
    "sft-softcap": case("sft", {"family": "gemma2"}),
    "dpo": case("dpo"),
    # TRL adds them up; exo_pair asks for some smoothing.
    "dpo-every-loss": case("dpo", loss_type=DPO_LOSSES, label_smoothing=0.01),
    "dpo-precomputed": case("dpo", precompute_ref_log_probs=True),
    "dpo-evaluation": case("dpo", eval_strategy="steps", eval_steps=1),
    "dpo-wpo": case("dpo", use_weighting=True),
    "dpo-ld": case("dpo", ld_alpha=0.5),
    "dpo-js": case("dpo", f_divergence_type="js_divergence"),
    "dpo-adapters": case("dpo", peft_config=adapters()),
    "dpo-checkpointing": case("dpo", gradient_checkpointing=True),
    "dpo-bf16": case("dpo", bf16=True),
    "dpo-experts": case("dpo", {"family": "qwen3_moe"}),
    "kto": case("kto"),
    "kto-apo": case("kto", loss_type="apo_zero_unpaired"),
    "kto-adapters": case("kto", peft_config=adapters()),
    "kto-scale": case("kto", {"family": "granite"}),
    "rloo": case("rloo"),
    "rloo-adapters": case("rloo", peft_config=adapters(), beta=0.5),
    "rloo-temperature": case("rloo", temperature=0.6),
    **{f"grpo-{loss}": case("grpo", loss_type=loss, **SEVERAL) for loss in GRPO_LOSSES},
    "grpo-sequence": case(
        "grpo", importance_sampling_level="sequence", loss_type="grpo", **SEVERAL
    ),
    "grpo-entropy-mask": case("grpo", top_entropy_quantile=0.5, **SEVERAL),
    "grpo-entropy-bonus": case("grpo", entropy_coef=0.3),
    "grpo-temperature": case("grpo", temperature=0.6, entropy_coef=0.3),
    "grpo-adapters": case("grpo", peft_config=adapters(), beta=0.5),
    "grpo-float32-head": case("grpo", UNTIED, cast_lm_head_to_fp32=True),
    "grpo-float32-head-bf16": case("grpo", UNTIED, cast_lm_head_to_fp32=True, bf16=True),
}


def double(model: nn.Module) -> nn.Module:
    return model.double()


@pytest.fixture(autouse=True)
def _no_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-probabilities of a reference model are computed by every run."""
    numbers = itertools.count()

    def fresh_path(dataset: Any, fingerprint: str) -> str:
        return str(tmp_path / f"{next(numbers)}.arrow")

    monkeypatch.setattr(datasets.Dataset, "_get_cache_file_path", fresh_path)


@pytest.mark.parametrize("name", CASES)
def test_losses_logs_and_weights_are_those_of_trls_own_head(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patched before the trainer is made, and after; every forward of TRL's counts."""
    kind, settings, model = CASES[name]
    calls = HeadCalls(monkeypatch)
    build = functools.partial(policy, **model)
    made = functools.partial(trainer, kind, tmp_path, build=build)
    exact = run(made(double, **{**settings, "bf16": False}))
    calls.take()
    stock = run(made(**settings))
    of_trl = calls.take()
    assert any(entry.get("grad_norm", 0.0) > 0 for entry in stock.state.log_history)
    before = run(made(apply_patch, **settings))
    assert_was_fused(before, calls.take(), of_trl)
    assert_trains_as_trl(before, stock, exact)
    after = made(**settings)
    already, _ = calls.take()  # What the constructor computes ahead.
    run(change_models(after, apply_patch))
    assert_was_fused(after, calls.take(), (of_trl[0] - already, 0))
    assert_trains_as_trl(after, stock, exact)


def with_adapters_on_the_head(model: Any) -> Any:
    """As transformers itself puts them on; TRL refuses PEFT's own wrapper with such a head."""
    torch.manual_seed(1)
    model.add_adapter(adapters("lm_head"))
    return model


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_on_the_head_are_trained(when: str, tmp_path: Path) -> None:
    """TRL's own head leaves them out; the loss of transformers is what it should be."""

    def made(prepare: Callable[[Any], Any]) -> Any:
        build = functools.partial(policy, **UNTIED)
        return trainer("sft", tmp_path, prepare, build=build)

    def of_transformers(prepare: Callable[[Any], Any]) -> Any:
        source = made(lambda model: prepare(with_adapters_on_the_head(model)))
        model = remove_trls_head(source.model)
        parts = {"train_dataset": source.train_dataset, "data_collator": source.data_collator}
        return run(transformers.Trainer(model, source.args, **parts))

    if when == "before":
        ours = made(lambda model: apply_patch(with_adapters_on_the_head(model)))
    else:
        ours = patch_trainer(made(with_adapters_on_the_head))
    start = {name: weight.detach().clone() for name, weight in ours.model.named_parameters()}
    run(ours)
    moved = [n for n, w in ours.model.named_parameters() if not torch.equal(w, start[n])]
    assert any("lm_head.lora_A" in name for name in moved)
    assert all("lora" in name for name in moved)
    stock, exact = of_transformers(lambda model: model), of_transformers(double)
    assert_gradients_close(*map(weights_of, (ours, stock, exact)))


def remove_trls_head(model: Any) -> Any:
    del model.forward
    return model


def test_remove_patch_gives_back_the_head_that_trl_runs_in_float32(tmp_path: Path) -> None:
    build = functools.partial(policy, **UNTIED)
    made = trainer("grpo", tmp_path, apply_patch, build=build, cast_lm_head_to_fp32=True)
    run(made)
    remove_patch(made.model)
    head = made.model.lm_head
    assert type(head) is nn.Linear and head.forward.__name__ == "cast_forward_to_fp32"
    assert patch_report(apply_patch(made.model)).fused


def test_a_model_in_accelerates_wrappers_is_patched_again(tmp_path: Path) -> None:
    made = run(trainer("sft", tmp_path, apply_patch, bf16=True))
    apply_patch(made.model, memory_budget_mib=32)
    assert patch_report(made.model).fused


def test_another_temperature_is_seen(tmp_path: Path) -> None:
    """What the comparisons above would say of a wrong fact."""
    made = functools.partial(trainer, "grpo", tmp_path, entropy_coef=0.3)
    stock, exact = run(made()), run(made(double))
    ours = run(made(apply_patch, temperature=0.9999))
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_trains_as_trl(ours, stock, exact)
