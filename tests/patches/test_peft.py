"""Every tuner of PEFT, on body and head: fused as stock trains it, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from allocation_spy import AllocationSpy
from causal_loss import in_float64
from oracle import assert_close_as_torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_cases import (
    CASES,
    HEAD,
    TAKEN_APART,
    body_of,
    lora,
    truth_of,
    tuner,
    two_adapters,
    wrapped,
)
from tiny_models import VOCAB_SIZE, batch, build
from torch import nn
from trains_like import assert_trains_like, loss_and_gradients, same_modules

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report, remove_patch

pytestmark = [pytest.mark.newest, pytest.mark.filterwarnings("ignore:Already unmerged")]


@pytest.mark.parametrize("patch_first", [True, False], ids=["patch, wrap", "wrap, patch"])
@pytest.mark.parametrize("name", CASES)
def test_every_tuner_trains_like_stock(name: str, patch_first: bool) -> None:
    case = CASES[name]
    if patch_first and not case.patch_first:
        pytest.skip("PEFT itself refuses to wrap a subclass of torch's Linear with this tuner")
    body = body_of(case)
    stock, truth = wrapped(case.wrap, copy.deepcopy(body)), truth_of(case.wrap, body)
    fused = wrapped(case.wrap, apply_patch(body) if patch_first else body)
    if not patch_first:
        apply_patch(fused)
    inputs = batch(stock, seed=1)
    # The token that calls activated LoRA, and one of those that are trained by themselves.
    inputs["input_ids"][:, 2] = inputs["labels"][:, 2] = 5
    assert_trains_like(fused, stock, inputs, truth)
    report = patch_report(fused)
    assert report.fused and report.wrapper == case.wrapper
    assert report.kernel.startswith(case.kernel)
    with torch.no_grad():
        assert torch.equal(fused(**inputs).logits, stock(**inputs).logits)
        loss = fused(**inputs).loss
        if case.switchable:
            with fused.disable_adapter(), stock.disable_adapter():
                without, expected = fused(**inputs).loss, stock(**inputs).loss
            assert without.item() == pytest.approx(expected.item())
            assert loss.item() != pytest.approx(without.item())
    assert same_modules(remove_patch(fused), stock)


# What the head of a tuner gets or does, and the word that its refusal names.
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "lily": (tuner("Lily", target_modules=HEAD, r=4), {}, "PEFT's Lily, whose router averages"),
    "activated lora": (
        lora(alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
        {},
        r"keywords \['alora_offsets'\]",
    ),
    "poly": (
        tuner("Poly", target_modules=HEAD, task_type="CAUSAL_LM", r=4, n_tasks=2),
        {"task_ids": torch.tensor([0, 1])},
        r"keywords \['task_ids'\]",
    ),
    "an adapter for each row": (lora(), {"adapter_names": ["default"] * 2}, "'adapter_names'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_need_more_than_one_token_are_refused(name: str) -> None:
    wrap, extra, reason = REFUSED[name]
    stock = wrapped(wrap, build("llama", tie_word_embeddings=False)).eval()
    fused = apply_patch(wrapped(wrap, build("llama", tie_word_embeddings=False)).eval())
    inputs = batch(stock) | extra
    with pytest.raises(UnsupportedModelError, match=reason):
        fused(**inputs)
    assert not patch_report(fused).fused
    assert torch.equal(fused(**inputs).loss, stock(**inputs).loss)


def test_prompts_of_several_tasks_train_like_stock() -> None:
    wrap = tuner("MultitaskPromptTuning", task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2)
    stock = wrapped(wrap, build("llama"))
    fused = wrapped(wrap, apply_patch(build("llama")))
    truth = truth_of(wrap, build("llama"))
    inputs = batch(stock) | {"task_ids": torch.tensor([0, 1])}
    assert_trains_like(fused, stock, inputs, truth)


def test_a_mixture_of_adapters_on_the_body_trains_like_stock(tmp_path: Path) -> None:
    for index in range(2):
        torch.manual_seed(index)
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(build("llama"), config).save_pretrained(tmp_path / str(index))
    adapters = {str(index): str(tmp_path / str(index)) for index in range(2)}
    wrap = tuner("XLora", task_type="CAUSAL_LM", hidden_size=16, xlora_depth=1, adapters=adapters)
    body = build("llama")
    body.config.use_cache = False
    fused = wrapped(wrap, apply_patch(copy.deepcopy(body)))
    stock, truth = wrapped(wrap, copy.deepcopy(body)), truth_of(wrap, body)
    assert_trains_like(fused, stock, batch(body), truth)
    assert patch_report(fused).fused


def test_a_tuner_that_takes_nothing_but_the_plain_class_names_it() -> None:
    wrap = tuner("Glora", target_modules=HEAD)
    wrapped(wrap, build("llama", tie_word_embeddings=False))
    model = apply_patch(build("llama", tie_word_embeddings=False))
    with pytest.raises(ValueError, match=r"not a plain torch\.nn\.Linear"):
        wrapped(wrap, model)
    assert patch_report(apply_patch(wrapped(wrap, remove_patch(model)))).fused


def test_the_bias_of_a_lora_layer_counts() -> None:
    stock = wrapped(lora(lora_bias=True), build("phi", tie_word_embeddings=False))
    nn.init.normal_(stock.base_model.model.lm_head.lora_B["default"].bias)
    assert_trains_like(apply_patch(copy.deepcopy(stock)), stock, batch(stock))


def seed_each_forward(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(lambda module, args: torch.manual_seed(1) and None)
    return model


def test_lora_dropout_draws_the_stock_mask() -> None:
    stock = wrapped(lora(lora_dropout=0.5), build("llama", tie_word_embeddings=False)).train()
    seed_each_forward(stock)
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    assert_trains_like(fused, stock, inputs)
    assert fused(**inputs).loss.item() != fused.eval()(**inputs).loss.item()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_float32_adapters_beside_a_half_precision_head(use_dora: bool) -> None:
    base = build("llama", tie_word_embeddings=False).bfloat16()
    stock = wrapped(lora(use_dora=use_dora), base)
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    (loss, grads), (stock_loss, stock_grads), (true_loss, true_grads) = (
        loss_and_gradients(model, inputs) for model in (fused, stock, in_float64(stock))
    )
    bf16 = torch.bfloat16
    assert_close_as_torch("loss", loss, stock_loss, true_loss, arithmetic=bf16)
    for name, grad in grads.items():
        if grad is not None:
            assert grad.dtype == stock_grads[name].dtype
            assert_close_as_torch(name, grad, stock_grads[name], true_grads[name], arithmetic=bf16)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_autocast(use_dora: bool) -> None:
    stock = wrapped(lora(use_dora=use_dora), build("llama", tie_word_embeddings=False))
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    true_loss, true_grads = loss_and_gradients(in_float64(stock), inputs)
    bf16 = torch.bfloat16
    with torch.autocast("cpu", dtype=bf16):
        loss, grads = loss_and_gradients(fused, inputs)
        stock_loss, stock_grads = loss_and_gradients(stock, inputs)
    assert_close_as_torch("loss", loss, stock_loss, true_loss, arithmetic=bf16)
    for name, grad in grads.items():
        if grad is not None:
            assert_close_as_torch(name, grad, stock_grads[name], true_grads[name], arithmetic=bf16)


def test_a_low_rank_head_copies_no_weight_and_makes_no_logits() -> None:
    model = wrapped(lora(target_modules=HEAD), build("llama", tie_word_embeddings=False))
    apply_patch(model, memory_budget_mib=0.004)
    inputs = batch(model, rows=2, length=40)
    with AllocationSpy() as spy:
        model(**inputs).loss.backward()
    weight_bytes = model.get_output_embeddings().base_layer.weight.nbytes
    largest = max(size for _, _, size in spy.with_dimension(VOCAB_SIZE))
    assert largest < weight_bytes < inputs["labels"].numel() * VOCAB_SIZE * 4
    assert patch_report(model).kernel.startswith(TAKEN_APART)


def test_adapters_switched_after_patching_are_followed() -> None:
    stock = wrapped(two_adapters, build("llama", tie_word_embeddings=False))
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    losses = set()
    for switch in (["first"], ["second"], ["first", "second"]):
        for model in (stock, fused):
            model.base_model.set_adapter(switch)
        assert_trains_like(fused, stock, inputs)
        losses.add(fused(**inputs).loss.item())
    with stock.disable_adapter(), fused.disable_adapter():
        assert_trains_like(fused, stock, inputs)
        output = fused(**inputs)
        losses.add(output.loss.item())
    assert len(losses) == 4
    with pytest.raises(RuntimeError, match="switched since"):
        output.logits.sum()


def test_adapters_that_come_and_go_after_patching_are_followed() -> None:
    stock = wrapped(lora(), build("llama", tie_word_embeddings=False))
    fused, losses = apply_patch(copy.deepcopy(stock)), set()
    inputs = batch(stock)

    def check(step: Callable[[Any], Any]) -> None:
        for model in (stock, fused):
            torch.manual_seed(2)
            step(model)
        assert_trains_like(fused, stock, inputs)
        assert patch_report(fused).fused
        losses.add(fused(**inputs).loss.item())

    second = LoraConfig(r=3, target_modules=HEAD, init_lora_weights=False)
    names = ["default", "second"]
    check(lambda model: model.add_adapter("second", second))
    check(lambda model: model.set_adapter("second"))
    check(lambda model: model.add_weighted_adapter(names, [0.3, 0.7], "both", "cat"))
    check(lambda model: model.set_adapter("both"))
    check(lambda model: model.delete_adapter("second"))
    check(lambda model: model.set_adapter("default"))
    check(lambda model: model.get_base_model().lm_head.set_scale("default", 3.0))
    assert len(losses) == 4
    with torch.no_grad():
        assert torch.equal(fused(**inputs).logits, stock(**inputs).logits)


def test_the_copy_that_modules_to_save_has_chosen_is_trained() -> None:
    wrap = lora(target_modules=["q_proj"], modules_to_save=HEAD)
    model = apply_patch(wrapped(wrap, build("llama", tie_word_embeddings=False)))
    head, inputs = model.base_model.model.lm_head, batch(model)
    loss = model(**inputs).loss
    loss.backward()
    assert head.modules_to_save["default"].weight.grad is not None
    assert head.original_module.weight.grad is None
    with model.disable_adapter():
        assert model(**inputs).loss.item() != loss.item()


def trained(model: Any, steps: int = 2) -> Any:
    """The model after some steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(model, seed=step)).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch, wrap", "wrap, patch"])
def test_unloading_the_adapter_leaves_a_fused_model(patch_first: bool, method: str) -> None:
    base = build("llama", tie_word_embeddings=False)
    stock = trained(wrapped(lora(), copy.deepcopy(base)))
    model = (
        wrapped(lora(), apply_patch(base)) if patch_first else apply_patch(wrapped(lora(), base))
    )
    model, expected = getattr(trained(model), method)(), getattr(stock, method)()
    inputs = batch(expected)
    fused_loss = model(**inputs).loss
    assert patch_report(model).fused and patch_report(model).wrapper == "none"
    assert same_modules(remove_patch(model), expected)
    assert fused_loss.item() == pytest.approx(model(**inputs).loss.item())


@pytest.mark.parametrize("saved", [lora(), lora(modules_to_save=HEAD, target_modules=["q_proj"])])
def test_saved_adapters_are_stock_and_load_into_both(saved: Any, tmp_path: Path) -> None:
    base = build("llama", tie_word_embeddings=False)
    fused = trained(apply_patch(wrapped(saved, copy.deepcopy(base))))
    fused.save_pretrained(tmp_path / "fused")
    wrapped(saved, copy.deepcopy(base)).save_pretrained(tmp_path / "stock")
    files = [sorted(f.name for f in (tmp_path / name).iterdir()) for name in ("fused", "stock")]
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("fused", "stock")]
    assert files[0] == files[1] and configs[0] == configs[1]
    inputs = batch(base)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "fused", is_trainable=True)
    loaded = PeftModel.from_pretrained(apply_patch(base), tmp_path / "fused", is_trainable=True)
    assert torch.equal(loaded(**inputs).loss, fused(**inputs).loss)
    assert_trains_like(loaded, stock, inputs)
    assert patch_report(loaded).fused
