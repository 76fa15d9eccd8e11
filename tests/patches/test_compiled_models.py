"""Patched models under `torch.compile` and checkpointing: few graphs, and stock's gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_classes
import torch
from causal_loss import in_float64
from oracle import assert_close_as_torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, batch, build
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from trains_like import assert_gradients_like, assert_trains_like

from hf_fused_head import (
    LossStats,
    UnsupportedModelError,
    apply_patch,
    last_stats,
    patch_report,
    remove_patch,
)
from hf_fused_head.patches import registry
from hf_fused_head.patches.lazy_logits import UnavailableLogits

TEN_LENGTHS = (9, 12, 15, 8, 23, 31, 17, 40, 5, 64)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def tiny(device: str, family: str = "llama", **settings: Any) -> Any:
    return build(family, num_hidden_layers=1, **settings).to(device)


def whole(model: nn.Module, backend: Any = "inductor") -> Any:
    """The model as one graph, or an error."""
    return torch.compile(model, fullgraph=True, backend=backend)


def steps(lengths: tuple[int, ...], stock: Any, items: Callable[[int], Any] | None = None) -> Any:
    """Batches of these lengths; the number of ignored labels changes with them."""
    for length in lengths:
        inputs = batch(stock, length=length, seed=length)
        inputs["labels"][:, : length // 4] = -100
        yield inputs if items is None else inputs | {"num_items_in_batch": items(length)}


def assert_compiled_trains_like(
    model: Any,
    fused: Any,
    stock: Any,
    lengths: tuple[int, ...],
    items: Any = None,
    backend: str | None = None,
) -> None:
    """Every step in a graph, loss and gradients as near to float64 as stock's.

    With `backend` stock is compiled too: a compiled body rounds in other places than an eager one.
    """
    truth = in_float64(stock)
    run_stock = stock if backend is None else torch.compile(stock, backend=backend)
    for inputs in steps(lengths, stock, items):
        for each in (fused, stock, truth):
            each.zero_grad()
        output = model(**inputs)
        assert isinstance(output.logits, UnavailableLogits)
        losses = [output.loss, *(each(**inputs)[0] for each in (run_stock, truth))]
        for loss in losses:
            loss.backward()
        assert_close_as_torch("loss", *losses)
        assert_gradients_like(fused, stock, truth)


def assert_logits_like(model: nn.Module, stock: Any, input_ids: Tensor) -> None:
    """Without labels the stock model, up to what a compiler changes."""
    logits = [each(input_ids=input_ids).logits for each in (model, stock, in_float64(stock))]
    assert_close_as_torch("logits", *logits)


@pytest.mark.newest
@pytest.mark.parametrize(
    ("family", "backend", "items"),
    [
        ("llama", "inductor", lambda length: length + 3),
        # Stock stops the compiler here, at the warning that its loss type is unknown.
        ("gpt2", "eager", lambda length: torch.tensor(length + 3)),
        pytest.param("gemma2", "aot_eager", None, marks=pytest.mark.slow),
        pytest.param("gemma2", "inductor", None, marks=pytest.mark.slow),
    ],
    ids=["int", "tensor", "capped", "capped, inductor"],
)
def test_ten_lengths_take_two_compilations(
    family: str, backend: str, items: Any, device: str
) -> None:
    # Beyond a sliding window stock takes another graph: none is reached here.
    stock = tiny(device, family, **({"sliding_window": 512} if family == "gemma2" else {}))
    fused = apply_patch(copy.deepcopy(stock))
    counter = CompileCounterWithBackend(backend)
    model = whole(fused, counter)
    # What inductor adds shows in a few.
    lengths = TEN_LENGTHS[:4] if backend == "inductor" else TEN_LENGTHS
    assert_compiled_trains_like(model, fused, stock, lengths, items, backend)
    assert counter.frame_count == 2


def test_dynamic_shapes_from_the_start_take_one_graph(device: str) -> None:
    """The scale is then an open number in the graph."""
    stock = tiny(device)
    fused = apply_patch(copy.deepcopy(stock), stats=("accuracy",))
    model = torch.compile(fused, fullgraph=True, dynamic=True)
    assert_compiled_trains_like(model, fused, stock, (9, 12), backend="inductor")


@pytest.mark.newest
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_statistics_leave_the_loss_its_gradient(impl: str, backend: str, device: str) -> None:
    stock = tiny(device)
    fused = apply_patch(copy.deepcopy(stock), stats=("accuracy", "entropy"), impl=impl)
    assert_compiled_trains_like(whole(fused, backend), fused, stock, (11,))
    eager = apply_patch(copy.deepcopy(stock), stats=("accuracy", "entropy"))
    eager(**next(steps((11,), stock)))
    for name, ours, expected in zip(
        LossStats._fields, last_stats(fused), last_stats(eager), strict=True
    ):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, expected, msg=name)


@pytest.mark.slow
def test_statistics_beside_a_loss_that_the_forward_adds_to(device: str) -> None:
    """A mixture of experts adds its auxiliary loss in place; the statistics keep the plain loss."""
    stock = tiny(device, "qwen2_moe")
    fused, eager = (apply_patch(copy.deepcopy(stock), stats=("accuracy",)) for _ in range(2))
    fused.compile()
    inputs = batch(stock)
    assert_trains_like(fused, stock, inputs)
    loss = eager(**inputs).loss
    assert loss > last_stats(eager).loss
    torch.testing.assert_close(last_stats(fused).loss, last_stats(eager).loss)


def test_a_step_without_a_label_that_counts(device: str) -> None:
    stock = tiny(device)
    fused = apply_patch(copy.deepcopy(stock))
    model = whole(fused)
    inputs = batch(stock)
    nothing = inputs | {"labels": torch.full_like(inputs["labels"], -100)}
    for given in (inputs, nothing):
        output = model(**given, num_items_in_batch=torch.tensor(5))
        output.loss.backward()
    assert output.loss.item() == 0.0
    assert fused.lm_head.weight.grad is not None and fused.lm_head.weight.grad.isfinite().all()


def compiled_in_place(model: Any) -> Any:
    model.compile(fullgraph=True)
    return model


@pytest.mark.parametrize(
    "prepare", [compiled_in_place, pytest.param(whole, marks=pytest.mark.slow)]
)
def test_compiled_before_the_patch(prepare: Callable[[Any], Any], device: str) -> None:
    """Also when it has run in between, so that the stock forward is in the compiler's cache."""
    stock = tiny(device)
    fused = copy.deepcopy(stock)
    model = prepare(fused)
    inputs = batch(stock)
    assert isinstance(model(**inputs).logits, torch.Tensor)
    assert apply_patch(model) is model
    assert_compiled_trains_like(model, fused, stock, (9, 12))
    remove_patch(model)
    assert_logits_like(model, stock, inputs["input_ids"])


@pytest.mark.slow
def test_compiled_in_place_after_the_patch(device: str) -> None:
    stock = tiny(device)
    model = compiled_in_place(apply_patch(copy.deepcopy(stock)))
    assert_compiled_trains_like(model, model, stock, (9, 12))


@pytest.mark.parametrize(
    ("reentrant", "backend"),
    [
        (True, "inductor"),
        pytest.param(False, "inductor", marks=pytest.mark.slow),
        pytest.param(False, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_checkpointed_layers_compile(reentrant: bool, backend: str, device: str) -> None:
    # With a cache, transformers logs while it checkpoints, on which the compiler stops.
    stock = tiny(device, use_cache=False).train()
    stock.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused = apply_patch(copy.deepcopy(stock))
    counter = CompileCounterWithBackend(backend)
    assert_compiled_trains_like(whole(fused, counter), fused, stock, (9, 12, 15))
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_with_a_break_in_the_graph(reentrant: bool, device: str) -> None:
    stock = tiny(device).train()
    stock.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused = apply_patch(copy.deepcopy(stock))
    model = torch.compile(fused)
    losses = []
    for inputs in steps((9, 12), stock):
        for each in (model, stock):
            each.zero_grad()
            losses.append(each(**inputs).loss)
            losses[-1].backward()
        assert_gradients_like(fused, stock, gradients_in_float64(stock, inputs))
    assert patch_report(fused).fused
    torch.testing.assert_close(losses[::2], losses[1::2])


def gradients_in_float64(stock: Any, inputs: dict[str, Any]) -> nn.Module:
    truth = in_float64(stock)
    truth.zero_grad()
    truth(**inputs).loss.backward()
    return truth


# Mixtures of experts stop the compiler in their stock forwards already.
COMPILABLE = [name for name in FAMILIES if "moe" not in name and name != "mixtral"]


@pytest.mark.slow
@pytest.mark.parametrize("family", COMPILABLE)
def test_every_family_that_compiles_compiles_patched(family: str) -> None:
    stock = build(family)
    fused = apply_patch(copy.deepcopy(stock))
    assert_compiled_trains_like(whole(fused), fused, stock, (9, 12, 15), torch.tensor)


@pytest.mark.slow
def test_a_forward_that_calls_cross_entropy_itself() -> None:
    stock = tiny_classes.build("XLMWithLMHeadModel")
    fused = apply_patch(copy.deepcopy(stock))
    model = whole(fused)
    for length in (9, 12):
        inputs = tiny_classes.batch(stock, length=length)
        assert model(**inputs).loss.item() == pytest.approx(stock(**inputs).loss.item())


def test_a_forward_that_calls_the_module_itself_is_no_single_graph() -> None:
    stock = tiny_classes.build("XLNetLMHeadModel")
    fused = apply_patch(copy.deepcopy(stock))
    inputs = tiny_classes.batch(stock)
    with pytest.raises(Unsupported, match=r"calls `CrossEntropyLoss` itself.*without fullgraph"):
        whole(fused)(**inputs)


@pytest.mark.slow
def test_a_forward_that_calls_the_module_itself_is_fused_between_graphs() -> None:
    stock = tiny_classes.build("XLNetLMHeadModel")
    fused = apply_patch(copy.deepcopy(stock), stats=("accuracy",))
    fused.compile()
    assert_trains_like(fused, stock, tiny_classes.batch(stock))
    assert patch_report(fused).fused and last_stats(fused) is not None


def with_a_wrong_fact(monkeypatch: pytest.MonkeyPatch, device: str) -> Any:
    monkeypatch.setattr(registry, "FAMILIES", ())
    return tiny(device, "cohere")


REFUSED = "what is known of its class"


def test_a_refusal_in_one_graph_has_our_words(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    stock = with_a_wrong_fact(monkeypatch, device)
    fused = apply_patch(copy.deepcopy(stock))
    model = whole(fused)
    inputs = batch(stock)
    with pytest.raises(Unsupported, match=rf"UnsupportedModelError.*{REFUSED}.*\(remove_patch\)"):
        model(**inputs)
    # The way back that the words name; the compiler lets nothing be undone from inside.
    remove_patch(model)
    assert_logits_like(model, stock, inputs["input_ids"])


@pytest.mark.slow
def test_a_refusal_between_graphs_leaves_the_model_stock(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    stock = with_a_wrong_fact(monkeypatch, device)
    fused = apply_patch(copy.deepcopy(stock))
    model = torch.compile(fused)
    inputs = batch(stock)
    with pytest.raises(UnsupportedModelError, match=REFUSED):
        model(**inputs)
    assert type(fused) is type(stock) and REFUSED in patch_report(fused).reason
    apply_patch(fused, strict=False)
    with pytest.warns(UserWarning, match=REFUSED):
        loss = model(**inputs).loss
    assert_close_as_torch("loss", loss, *(m(**inputs)[0] for m in (stock, in_float64(stock))))


@pytest.mark.slow
def test_a_wrong_number_of_labels_is_stocks_error_and_keeps_the_patch(device: str) -> None:
    fused = apply_patch(tiny(device))
    model = torch.compile(fused)
    inputs = batch(fused)
    with pytest.raises(ValueError, match="to match target batch_size"):
        model(**inputs | {"labels": inputs["labels"][:, :-2]})
    assert patch_report(fused).fused
    assert isinstance(model(**inputs).loss, torch.Tensor) and patch_report(fused).fused


def test_a_lora_head_with_statistics(device: str) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    stock = get_peft_model(tiny(device, tie_word_embeddings=False), config)
    nn.init.normal_(stock.base_model.model.lm_head.lora_B["default"].weight)
    fused = apply_patch(copy.deepcopy(stock), stats=("accuracy", "entropy"))
    assert_compiled_trains_like(whole(fused), fused, stock, (11,))
    stats = last_stats(fused)
    assert stats is not None and stats.entropy is not None and stats.entropy.shape == (2, 11)


@pytest.mark.slow
def test_a_break_inside_the_head_does_not_lose_the_call(device: str) -> None:
    stock = tiny(device)
    fused = apply_patch(copy.deepcopy(stock))
    fused.lm_head.register_forward_hook(torch._dynamo.disable(lambda module, args, out: None))
    model = torch.compile(fused)
    inputs = batch(stock)
    assert model(**inputs).loss.item() == pytest.approx(stock(**inputs).loss.item())


def test_without_labels_it_is_the_stock_model(device: str) -> None:
    stock = tiny(device)
    model = whole(apply_patch(copy.deepcopy(stock)))
    assert_logits_like(model, stock, batch(stock)["input_ids"])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "default"])
def test_cuda_graphs_repeat_the_training_step(mode: str) -> None:
    stock = tiny("cuda")
    fused = apply_patch(copy.deepcopy(stock))
    model, plain = (torch.compile(each, fullgraph=True, mode=mode) for each in (fused, stock))
    truth = in_float64(stock)
    for seed in range(5):
        inputs = batch(stock, length=16, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        losses = []
        for each in (model, plain, truth):
            each.zero_grad()
            losses.append(each(**inputs).loss)
            losses[-1].backward()
        assert_close_as_torch("loss", *losses)
        assert_gradients_like(fused, stock, truth)
