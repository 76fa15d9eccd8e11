"""Every kind of head: taken apart or run in chunks, but never without its adapter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from oracle import assert_close_as_torch
from peft import LoraConfig, get_peft_model
from tiny_models import batch, build
from torch import Tensor, nn
from trains_like import assert_trains_like, loss_and_gradients, same_modules, seeded
from transformers.pytorch_utils import Conv1D

from hf_fused_head import (
    UnsupportedModelError,
    apply_patch,
    last_stats,
    patch_report,
    remove_patch,
)
from hf_fused_head.patches.heads import kind_of

Wrap = Callable[[Any], Any]


def lora(**options: Any) -> Wrap:
    return lambda model: get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))


def two_adapters(model: Any) -> Any:
    first = LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
    second = LoraConfig(r=3, use_rslora=True, target_modules=["lm_head"])
    model = get_peft_model(model, first, adapter_name="first")
    model.add_adapter("second", second)
    model.base_model.set_adapter(["first", "second"])
    return model


def one_of_two(model: Any) -> Any:
    model = two_adapters(model)
    model.set_adapter("second")
    return model


def disabled(model: Any) -> Any:
    model = lora(target_modules=["lm_head", "q_proj"])(model)
    model.disable_adapter_layers()
    return model


def merged(model: Any) -> Any:
    model = lora(target_modules=["lm_head", "q_proj"])(model)
    fill_adapters(model)
    model.merge_adapter()
    return model


def merged_then_disabled(model: Any) -> Any:
    model = merged(model)
    model.disable_adapter_layers()
    return model


def half_precision_base(model: Any) -> Any:
    return lora(target_modules=["lm_head", "q_proj"])(model.bfloat16())


LORA, SAVED, TOKENS = "LoRA", "ModulesToSaveWrapper", "TrainableTokensWrapper"
FUSED, CHUNKED = "torch", "the forward of"
# Name: how the model is wrapped, whether its head is tied, what the report says of it.
CASES: dict[str, tuple[Wrap, bool, str, str]] = {
    "body": (lora(target_modules=["q_proj"]), False, "none", FUSED),
    "lora": (lora(target_modules=["lm_head", "q_proj"]), False, LORA, FUSED),
    "lora, tied": (lora(target_modules=["lm_head", "q_proj"]), True, LORA, FUSED),
    "lora, tied adapters": (
        lora(target_modules=["lm_head", "embed_tokens"], ensure_weight_tying=True),
        True,
        LORA,
        FUSED,
    ),
    "rslora": (lora(target_modules=["lm_head"], use_rslora=True), False, LORA, FUSED),
    "two adapters": (two_adapters, False, LORA, FUSED),
    "one of two adapters": (one_of_two, False, LORA, FUSED),
    "disabled": (disabled, False, LORA, FUSED),
    "merged": (merged, False, LORA, FUSED),
    "merged, disabled": (merged_then_disabled, False, LORA, FUSED),
    "saved": (lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), False, SAVED, FUSED),
    "saved, tied": (
        lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        True,
        SAVED,
        FUSED,
    ),
    "dora": (lora(target_modules=["lm_head"], use_dora=True), False, LORA, CHUNKED),
    "tokens": (lora(trainable_token_indices={"lm_head": [3, 5]}), False, TOKENS, CHUNKED),
    "tokens, tied": (lora(trainable_token_indices=[3, 5]), True, TOKENS, CHUNKED),
    "ia3": (
        lambda model: get_peft_model(
            model, peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
        ),
        False,
        "ia3.Linear",
        CHUNKED,
    ),
    "loha": (
        lambda model: get_peft_model(model, peft.LoHaConfig(target_modules=["lm_head"])),
        False,
        "loha.Linear",
        CHUNKED,
    ),
    "prompt": (
        lambda model: get_peft_model(
            model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        ),
        False,
        "none",
        FUSED,
    ),
}


def fill_adapters(model: nn.Module) -> None:
    """Moves every adapter off the zero where it does nothing."""
    generator = seeded()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name or "hada" in name:
            parameter.data.normal_(std=0.3, generator=generator)


def wrapped(wrap: Wrap, model: nn.Module) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on ties, biases and target modules.
        model = wrap(model)
    fill_adapters(model)
    return model


@pytest.mark.parametrize("patch_first", [True, False], ids=["patch, wrap", "wrap, patch"])
@pytest.mark.parametrize("case", CASES)
def test_heads_under_peft_train_like_stock(case: str, patch_first: bool) -> None:
    wrap, tie, wrapper, kernel = CASES[case]
    stock = wrapped(wrap, build("gemma2", tie_word_embeddings=tie))
    fused = build("gemma2", tie_word_embeddings=tie)
    fused = wrapped(wrap, apply_patch(fused) if patch_first else fused)
    if not patch_first:
        apply_patch(fused)
    # Tied adapters cannot be copied.
    truth = wrapped(wrap, build("gemma2", tie_word_embeddings=tie)).double()
    inputs = batch(stock, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that there is nothing to unmerge.
        assert_trains_like(fused, stock, inputs, truth)
    report = patch_report(fused)
    assert report.fused and report.wrapper == wrapper and report.kernel.startswith(kernel)
    with torch.no_grad():
        assert torch.equal(fused(**inputs).logits, stock(**inputs).logits)
    assert same_modules(remove_patch(fused), stock)


def test_the_bias_of_a_lora_layer_counts() -> None:
    wrap = lora(target_modules=["lm_head"], lora_bias=True)
    stock = wrapped(wrap, build("phi", tie_word_embeddings=False))
    nn.init.normal_(stock.base_model.model.lm_head.lora_B["default"].bias)
    assert_trains_like(apply_patch(copy.deepcopy(stock)), stock, batch(stock))


def test_lora_dropout_draws_the_stock_mask() -> None:
    stock = wrapped(lora(target_modules=["lm_head"], lora_dropout=0.5), build("llama")).train()
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    losses = []
    for model in (stock, fused):
        torch.manual_seed(1)
        losses.append(model(**inputs).loss)
    truth = copy.deepcopy(stock).double()
    torch.manual_seed(1)
    assert_close_as_torch("loss", losses[1], losses[0], truth(**inputs).loss)
    assert losses[0].item() != fused(**inputs).loss.item()


def test_float32_adapters_beside_a_half_precision_head() -> None:
    stock = wrapped(half_precision_base, build("llama", tie_word_embeddings=False))
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    truth = copy.deepcopy(stock).double()
    (loss, grads), (stock_loss, stock_grads), (true_loss, true_grads) = (
        loss_and_gradients(model, inputs) for model in (fused, stock, truth)
    )
    assert_close_as_torch("loss", loss.bfloat16(), stock_loss.bfloat16(), true_loss)
    for name, grad in grads.items():
        if grad is not None:
            assert grad.dtype == stock_grads[name].dtype
            pair = grad.bfloat16(), stock_grads[name].bfloat16()
            assert_close_as_torch(name, *pair, true_grads[name])


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


def test_the_copy_that_modules_to_save_has_chosen_is_trained() -> None:
    wrap = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = apply_patch(wrapped(wrap, build("llama", tie_word_embeddings=False)))
    head = model.base_model.model.lm_head
    nn.init.normal_(head.modules_to_save["default"].weight)
    inputs = batch(model)
    loss = model(**inputs).loss
    loss.backward()
    assert head.modules_to_save["default"].weight.grad is not None
    assert head.original_module.weight.grad is None
    with model.disable_adapter():
        assert model(**inputs).loss.item() != loss.item()


def test_unloading_the_adapter_leaves_a_fused_model() -> None:
    wrap = lora(target_modules=["lm_head", "q_proj"])
    model = wrapped(wrap, apply_patch(build("llama", tie_word_embeddings=False)))
    inputs = batch(model)
    before = model(**inputs).loss
    plain = model.merge_and_unload()
    after = plain(**inputs).loss
    assert patch_report(plain).fused and patch_report(plain).wrapper == "none"
    assert after.item() == pytest.approx(before.item())


def test_a_hook_inside_a_lora_head_fires() -> None:
    model = wrapped(lora(target_modules=["lm_head"]), build("llama", tie_word_embeddings=False))
    stock, fired = copy.deepcopy(model), []
    model.base_model.model.lm_head.base_layer.register_forward_hook(
        lambda module, args, output: fired.append(output.shape[-1])
    )
    apply_patch(model)
    assert_trains_like(model, stock, batch(model))
    assert fired and set(fired) == {101}


class OwnLinear(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


class Rotated(nn.Module):
    """A head that is no linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.rotation = nn.Parameter(torch.linalg.qr(torch.randn(16, 16))[0])

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear((hidden @ self.rotation).tanh())


class Averaging(Rotated):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden - hidden.mean(dim=-2, keepdim=True))


class Flat(Rotated):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden).flatten()


class Marked(Tensor):
    """A weight that only its layer understands, as quantised ones are."""


def conv1d(linear: nn.Linear) -> nn.Module:
    layer = Conv1D(101, 16)
    layer.weight.data = linear.weight.data.t().clone()
    nn.init.normal_(layer.bias)
    return layer


def own_linear(linear: nn.Linear) -> nn.Module:
    layer = OwnLinear(16, 101, bias=False)
    layer.weight = linear.weight
    return layer


def marked(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Marked))
    return linear


def with_head(make: Callable[[nn.Linear], nn.Module]) -> Any:
    torch.manual_seed(0)
    model = build("gemma2", tie_word_embeddings=False)
    model.lm_head = make(model.lm_head)
    return model


@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        (lambda linear: linear, FUSED),
        (conv1d, FUSED),
        (torch.nn.utils.parametrizations.weight_norm, FUSED),
        (own_linear, CHUNKED),
        (Rotated, CHUNKED),
        (nn.Sequential, CHUNKED),
        (marked, CHUNKED),
    ],
    ids=["linear", "conv1d", "weight norm", "own forward", "module", "sequential", "subclass"],
)
def test_other_heads_train_like_stock(make: Callable, kernel: str) -> None:
    stock, fused, truth = with_head(make), apply_patch(with_head(make)), with_head(make).double()
    assert_trains_like(fused, stock, batch(stock), truth)
    assert patch_report(fused).kernel.startswith(kernel)


@pytest.mark.parametrize(
    ("make", "reason"), [(Averaging, "other tokens"), (Flat, r"map \(tokens, hidden\)")]
)
def test_a_head_that_is_no_map_of_tokens_is_refused(make: Callable, reason: str) -> None:
    model = apply_patch(with_head(make))
    with pytest.raises(UnsupportedModelError, match=reason):
        model(**batch(model))
    assert not patch_report(model).fused


OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.4, "z_loss": 0.01},
    {"z_loss": 0.1},
]
# Room for all tokens at once, and for a single one.
BUDGETS_MIB = [None, 0.001]


def linear_as_module(linear: nn.Linear) -> nn.Module:
    return nn.Sequential(linear)


@pytest.mark.parametrize("memory_budget_mib", BUDGETS_MIB)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": 5}], ids=str)
def test_chunks_follow_every_option(
    options: dict[str, Any], extra: dict[str, Any], memory_budget_mib: float | None
) -> None:
    """Against the same weights in a head that is taken apart, and that one in float64."""
    names = ("accuracy", "entropy")
    chunked, plain = with_head(linear_as_module), with_head(lambda linear: linear)
    truth = copy.deepcopy(plain).double()
    apply_patch(chunked, memory_budget_mib=memory_budget_mib, stats=names, **options)
    for model in (plain, truth):
        apply_patch(model, impl="reference", stats=names, **options)
    inputs = batch(plain) | extra
    (loss, grads), (ref_loss, ref_grads), (true_loss, true_grads) = (
        loss_and_gradients(model, inputs) for model in (chunked, plain, truth)
    )
    assert_close_as_torch("loss", loss, ref_loss, true_loss)
    for name, grad in grads.items():
        name = name.replace("lm_head.0", "lm_head")
        assert_close_as_torch(name, grad, ref_grads[name], true_grads[name])
    ours, theirs, true = (last_stats(model) for model in (chunked, plain, truth))
    assert torch.equal(ours.correct, theirs.correct) and ours.num_valid == theirs.num_valid
    for name in ("nll", "lse", "entropy"):
        assert_close_as_torch(name, getattr(ours, name), getattr(theirs, name), getattr(true, name))


@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": 5}], ids=str)
def test_chunks_without_any_label(extra: dict[str, Any]) -> None:
    model = apply_patch(with_head(Rotated))
    inputs = batch(model) | extra
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, grads = loss_and_gradients(model, inputs)
    assert loss.item() == 0 if extra else loss.isnan()
    assert all(grad is not None for grad in grads.values())
    if extra:
        assert all(not grad.any() for grad in grads.values())


def test_chunks_name_a_label_out_of_range() -> None:
    model = apply_patch(with_head(Rotated))
    inputs = batch(model)
    inputs["labels"][1, 3] = 101
    with pytest.raises(ValueError, match="got 101"):
        model(**inputs)


def test_kinds_are_told_by_the_forward_not_by_the_name() -> None:
    assert kind_of(nn.Linear) == "linear"
    assert kind_of(type("Linear", (nn.Linear,), {})) == "linear"
    assert kind_of(OwnLinear) == "module"
    assert kind_of(Conv1D) == "conv1d"
    assert kind_of(peft.tuners.lora.layer.Linear) == "lora"
    assert kind_of(peft.tuners.ia3.layer.Linear) == "module"
