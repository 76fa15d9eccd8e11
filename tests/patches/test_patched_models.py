"""A patched model equals the stock one: loss, every gradient, generation, and what it allocates."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from allocation_spy import AllocationSpy
from causal_loss import in_float64
from oracle import assert_close_as_torch
from tiny_models import FAMILIES, batch, build
from torch import nn
from trains_like import assert_gradients_close, assert_trains_like, loss_and_gradients

from hf_fused_head import apply_patch, patch_report

Inputs = dict[str, object]


def plain(model: nn.Module) -> Inputs:
    return batch(model)


def num_items_as_int(model: nn.Module) -> Inputs:
    return batch(model) | {"num_items_in_batch": 37}


def num_items_of_numpy(model: nn.Module) -> Inputs:
    return batch(model) | {"num_items_in_batch": np.int64(37)}


def num_items_as_tensor(model: nn.Module) -> Inputs:
    return batch(model) | {"num_items_in_batch": torch.tensor(37)}


def shifted_labels(model: nn.Module) -> Inputs:
    inputs = batch(model)
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[..., 1:]
    # Other values than the labels' own shift, so that ignoring them is seen.
    shifted = torch.where(shifted >= 0, (shifted + 1) % 7, shifted)
    return inputs | {"shift_labels": shifted.contiguous()}


def other_ignore_index(model: nn.Module) -> Inputs:
    inputs = batch(model)
    # Stock knows one ignored label at a time, and -100 is no class.
    labels = inputs["labels"].masked_fill(inputs["labels"] == -100, 3)
    return inputs | {"labels": labels, "ignore_index": 3}


def fully_masked_with_count(model: nn.Module) -> Inputs:
    inputs = batch(model)
    return inputs | {"labels": torch.full_like(inputs["labels"], -100), "num_items_in_batch": 11}


def fully_masked(model: nn.Module) -> Inputs:
    inputs = batch(model)
    return inputs | {"labels": torch.full_like(inputs["labels"], -100)}


def as_tuple(model: nn.Module) -> Inputs:
    return batch(model) | {"return_dict": False}


SCENARIOS = [
    plain,
    num_items_as_int,
    num_items_of_numpy,
    num_items_as_tensor,
    shifted_labels,
    other_ignore_index,
    fully_masked_with_count,
    fully_masked,
    as_tuple,
]


def assert_trains_like_stock(fused: nn.Module, stock: nn.Module, inputs: Inputs) -> None:
    assert_trains_like(fused, stock, inputs)
    assert patch_report(fused).fused, patch_report(fused).reason


@pytest.mark.newest
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_stock(family: str, scenario: Callable) -> None:
    stock = build(family)
    fused = apply_patch(copy.deepcopy(stock))
    assert_trains_like_stock(fused, stock, scenario(stock))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float64_model_has_stocks_dtype_and_exact_gradients(family: str) -> None:
    stock = build(family).double()
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    loss, grads = loss_and_gradients(fused, inputs)
    stock_loss, _ = loss_and_gradients(stock, inputs)
    true_loss, true_grads = loss_and_gradients(in_float64(stock), inputs)
    assert loss.dtype == stock_loss.dtype
    torch.testing.assert_close(loss, true_loss.to(loss.dtype))
    for name, expected in true_grads.items():
        torch.testing.assert_close(grads[name], expected, msg=name)


@pytest.mark.newest
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_and_untied_heads(family: str, tie: bool) -> None:
    stock = build(family, tie_word_embeddings=tie)
    head = stock.get_output_embeddings().weight
    assert (head is stock.get_input_embeddings().weight) == tie
    fused = apply_patch(copy.deepcopy(stock))
    assert patch_report(fused).tied == tie
    assert_trains_like_stock(fused, stock, plain(stock))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    stock = build(family).train()
    stock.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused = apply_patch(copy.deepcopy(stock))
    assert_trains_like_stock(fused, stock, plain(stock))


@pytest.mark.newest
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_identical(family: str) -> None:
    stock = build(family).eval()
    # Stock mixtures of experts cannot generate while they collect router logits (5.17).
    stock.config.output_router_logits = False
    fused = apply_patch(copy.deepcopy(stock))
    prompt = batch(stock)["input_ids"][:, :4]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0}
    ours, theirs = fused.generate(prompt, **options), stock.generate(prompt, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for our_step, their_step in zip(ours.logits, theirs.logits, strict=True):
        assert type(our_step) is torch.Tensor
        assert torch.equal(our_step, their_step)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_label_smoothing_is_that_of_cross_entropy(family: str, smoothing: float) -> None:
    stock = build(family)
    fused = apply_patch(copy.deepcopy(stock), label_smoothing=smoothing)
    inputs = batch(stock)
    loss, grads = loss_and_gradients(fused, inputs)

    def smoothed(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        model.zero_grad(set_to_none=True)
        # Auxiliary losses are stock's own: what the smoothing changes is the cross-entropy alone.
        output = model(**inputs)
        labels = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[..., 1:]
        logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        flat = logits.flatten(0, 1), labels.flatten()
        plain_loss = torch.nn.functional.cross_entropy(*flat)
        smooth_loss = torch.nn.functional.cross_entropy(*flat, label_smoothing=smoothing)
        total = output.loss - plain_loss + smooth_loss
        total.backward()
        return total.detach(), {name: p.grad for name, p in model.named_parameters()}

    stock_loss, stock_grads = smoothed(stock)
    true_loss, true_grads = smoothed(in_float64(stock))
    assert_close_as_torch("loss", loss, stock_loss, true_loss)
    assert_gradients_close(grads, stock_grads, true_grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_gradients_of_unequal_batches(family: str) -> None:
    stock = build(family)
    fused = apply_patch(copy.deepcopy(stock))
    truth = in_float64(stock)
    parts = [batch(stock, length=length, seed=length) for length in (5, 11, 8)]
    count = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
    gradients = []
    for model in (fused, stock, truth):
        model.zero_grad(set_to_none=True)
        for part in parts:
            model(**part, num_items_in_batch=count).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_gradients_close(*gradients)


WIDE_VOCABULARY = 4001
BUDGET_MIB = 1


def wide(family: str) -> nn.Module:
    return build(family, vocab_size=WIDE_VOCABULARY)


def vocabulary_sized_parameters(model: nn.Module) -> set[tuple[int, ...]]:
    return {tuple(p.shape) for p in model.parameters() if WIDE_VOCABULARY in p.shape}


@pytest.mark.parametrize("mode", ["training", "loss-only evaluation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_logits_are_ever_allocated(family: str, mode: str) -> None:
    """No tensor of T*V/4 elements, and beyond the budget nothing with a vocabulary dimension."""
    model = apply_patch(wide(family), memory_budget_mib=BUDGET_MIB)
    inputs = batch(model, rows=4, length=301)
    num_tokens = inputs["labels"].numel()
    parameters = vocabulary_sized_parameters(model)
    transposed = {shape[::-1] for shape in parameters}
    with AllocationSpy() as spy:
        if mode == "training":
            model.train()
            model(**inputs).loss.backward()
        else:
            model.eval()
            with torch.no_grad():
                output = model(**inputs)
                # What a loss-only evaluation loop does with it.
                _ = [value for key, value in output.items() if key != "loss"]
    assert spy.seen
    limit = num_tokens * WIDE_VOCABULARY // 4
    for operator, shape, num_bytes in spy.seen:
        if shape in parameters or shape in transposed:
            continue
        assert num_bytes // 4 < limit, f"{operator} made {shape}"
        if WIDE_VOCABULARY in shape:
            assert num_bytes <= BUDGET_MIB * 2**20, f"{operator} made {shape}"


def test_the_spy_sees_the_logits_of_a_stock_model() -> None:
    model = wide("llama")
    inputs = batch(model, rows=4, length=301)
    with AllocationSpy() as spy:
        model(**inputs).loss.backward()
    limit = inputs["labels"].numel() * WIDE_VOCABULARY
    assert any(num_bytes >= 4 * limit for _, _, num_bytes in spy.seen)
