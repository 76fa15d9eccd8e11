"""Parts of a model compiled by themselves: the patched model trains as the stock one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin, compile_regions
from causal_loss import in_float64
from oracle import assert_close_as_torch
from peft import LoraConfig, get_peft_model
from tiny_models import batch, build
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from trains_like import assert_gradients_close, loss_and_gradients

from hf_fused_head import (
    UnsupportedModelError,
    apply_patch,
    last_stats,
    patch_report,
    remove_patch,
)
from hf_fused_head.patches.class_swap import swapped_modules
from hf_fused_head.patches.lazy_logits import LazyLogits

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("fresh_compiler")]


def by_accelerate(model: nn.Module) -> nn.Module:
    plugin = TorchDynamoPlugin(backend="inductor", use_regional_compilation=True)
    on_cpu = next(model.parameters()).device.type == "cpu"
    AcceleratorState._reset_state(reset_partial_state=True)
    prepared = Accelerator(cpu=on_cpu, dynamo_plugin=plugin).prepare_model(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    return prepared


def head_in_place(model: Any) -> nn.Module:
    model.lm_head.compile()
    return model


def head_wrapped(model: Any) -> nn.Module:
    model.set_output_embeddings(torch.compile(model.get_output_embeddings()))
    return model


def body_wrapped(model: Any) -> nn.Module:
    model.model = torch.compile(model.model)
    return model


Compile = Callable[[nn.Module], nn.Module]
WAYS = [
    compile_regions,
    head_in_place,
    head_wrapped,
    pytest.param(body_wrapped, marks=pytest.mark.slow),
    pytest.param(by_accelerate, marks=pytest.mark.slow),
]
ORDERS = pytest.mark.parametrize("patch_first", [True, False], ids=["patch first", "patch last"])


def compiled_and_patched(compile_parts: Compile, model: nn.Module, patch_first: bool) -> nn.Module:
    if patch_first:
        return compile_parts(apply_patch(model, stats=("accuracy",)))
    return apply_patch(compile_parts(model), stats=("accuracy",))


def tiny(device: str) -> Any:
    return build("llama", num_hidden_layers=1, tie_word_embeddings=False).to(device)


def results(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients, under the names of the stock parameters."""
    loss, grads = loss_and_gradients(model, inputs)
    return loss, {name.replace("_orig_mod.", ""): grad for name, grad in grads.items()}


def assert_trains_as(model: nn.Module, stock: nn.Module, inputs: dict[str, Any]) -> None:
    losses, grads = zip(
        *(results(m, inputs) for m in (model, stock, in_float64(stock))), strict=True
    )
    assert_close_as_torch("loss", *losses)
    assert_gradients_close(*grads)


@ORDERS
@pytest.mark.parametrize("compile_parts", WAYS)
def test_a_model_with_compiled_parts_trains_as_stock(
    compile_parts: Compile, patch_first: bool, device: str
) -> None:
    stock = tiny(device)
    model = compiled_and_patched(compile_parts, copy.deepcopy(stock), patch_first)
    inputs, exact = batch(stock), in_float64(stock)
    assert_trains_as(model, stock, inputs)
    assert patch_report(model).fused and last_stats(model).loss.isfinite()
    logits = [each(**inputs).logits for each in (model, stock, exact)]
    assert isinstance(logits[0], LazyLogits)
    assert_close_as_torch("logits", *logits)
    assert remove_patch(model) is model
    original = model.__dict__.get("_orig_mod", model)
    assert not [*swapped_modules(model), *swapped_modules(original)]
    ids = inputs["input_ids"]
    unlabelled = [each(input_ids=ids).logits for each in (model, stock, exact)]
    assert_close_as_torch("logits without labels", *unlabelled)


@pytest.mark.slow
@ORDERS
@pytest.mark.parametrize("compile_parts", [compile_regions, head_wrapped])
def test_a_lora_head_in_a_compiled_part(compile_parts: Compile, patch_first: bool) -> None:
    stock = get_peft_model(tiny("cpu"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    nn.init.normal_(stock.base_model.model.lm_head.lora_B["default"].weight)
    model = compiled_and_patched(compile_parts, copy.deepcopy(stock), patch_first)
    assert_trains_as(model, stock, batch(stock))


@ORDERS
@pytest.mark.parametrize("compile_head", [head_in_place, head_wrapped])
def test_a_compiled_head_in_a_model_that_is_one_graph(
    compile_head: Compile, patch_first: bool, backend: str
) -> None:
    stock = tiny("cpu")
    model = compiled_and_patched(compile_head, copy.deepcopy(stock), patch_first)
    assert_trains_as(torch.compile(model, fullgraph=True, backend=backend), stock, batch(stock))


def test_a_head_that_shall_be_one_graph_by_itself_is_refused() -> None:
    model = apply_patch(tiny("cpu"))
    model.lm_head.compile(fullgraph=True)
    with pytest.raises(Unsupported, match=r"compile the head without fullgraph=True, or the whole"):
        model(**batch(model))


def test_a_stock_forward_that_was_compiled_by_itself_is_refused() -> None:
    model = tiny("cpu")
    model.forward = torch.compile(model.forward)
    with pytest.raises(
        UnsupportedModelError, match=r"compiled by itself: use \.compile\(\) of the"
    ):
        apply_patch(model)
