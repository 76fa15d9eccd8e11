"""Every kind of head: taken apart or run in chunks, but never without its adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from oracle import assert_close_as_torch
from peft import LoraConfig, get_peft_model
from tiny_models import batch, build
from torch import Tensor, nn
from trains_like import assert_trains_like, loss_and_gradients
from transformers.pytorch_utils import Conv1D

from hf_fused_head import (
    UnsupportedModelError,
    apply_patch,
    last_stats,
    patch_report,
)
from hf_fused_head.patches.heads import kind_of

FUSED, CHUNKED = "torch", "the forward of"


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


class Leaking(Rotated):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden + 0.02 * hidden.mean(dim=-2, keepdim=True))


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
    ("make", "reason"),
    [(Averaging, "other tokens"), (Leaking, "other tokens"), (Flat, r"map \(tokens, hidden\)")],
)
def test_a_head_that_is_no_map_of_tokens_is_refused(make: Callable, reason: str) -> None:
    model = apply_patch(with_head(make))
    with pytest.raises(UnsupportedModelError, match=reason):
        model(**batch(model))
    assert not patch_report(model).fused


def test_a_head_that_mixes_tokens_later_is_refused() -> None:
    model = apply_patch(with_head(nn.Sequential))
    model(**batch(model))
    model.lm_head = nn.Sequential(Averaging(model.lm_head[0]))
    with pytest.raises(UnsupportedModelError, match="other tokens"):
        model(**batch(model))


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


class Dropped(Rotated):
    """A head with dropout that keeps its masks."""

    masks: tuple[Tensor, ...] = ()

    def forward(self, hidden: Tensor) -> Tensor:
        mask = nn.functional.dropout(torch.ones_like(hidden), 0.5, self.training)
        self.masks = (*self.masks, mask.detach())
        return self.linear(hidden * mask)


def test_chunks_drop_the_same_in_both_passes() -> None:
    """The masks are others than stock's, which draws one for all tokens."""
    model = apply_patch(with_head(Dropped).train(), memory_budget_mib=0.01)
    model(**batch(model)).loss.backward()
    # The first three are of the trial whether the head mixes tokens.
    masks = model.lm_head.masks[3:]
    half = len(masks) // 2
    assert half > 1 and len({str(mask) for mask in masks[:half]}) == half
    for first, again in zip(masks[:half], reversed(masks[half:]), strict=True):
        assert torch.equal(first, again)


def test_a_hook_inside_a_lora_head_fires() -> None:
    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(build("llama", tie_word_embeddings=False), config)
    stock, fired = copy.deepcopy(model), []
    model.base_model.model.lm_head.base_layer.register_forward_hook(
        lambda module, args, output: fired.append(output.shape[-1])
    )
    apply_patch(model)
    assert_trains_like(model, stock, batch(model))
    assert fired and set(fired) == {101}


def test_kinds_are_told_by_the_forward_not_by_the_name() -> None:
    assert kind_of(nn.Linear) == "linear"
    assert kind_of(type("Linear", (nn.Linear,), {})) == "linear"
    assert kind_of(OwnLinear) == "module"
    assert kind_of(Conv1D) == "conv1d"
    assert kind_of(peft.tuners.lora.layer.Linear) == "lora"
    assert kind_of(peft.tuners.ia3.layer.Linear) == "module"
