"""Heads that a forward changes are refused as they were found; stock then runs them once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from causal_loss import in_float64
from tiny_models import batch, build
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver, MovingAverageMinMaxObserver
from trains_like import assert_trains_like

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report

HIDDEN_SIZE = 16


class Averaged(nn.Module):
    """Scales by a moving average in an attribute, a tensor or a number."""

    def __init__(self, average: Any) -> None:
        super().__init__()
        self.average = average

    def forward(self, hidden: Tensor) -> Tensor:
        size = hidden.detach().abs().mean()
        self.average = 0.9 * self.average + 0.1 * (
            size if torch.is_tensor(self.average) else size.item()
        )
        return hidden / self.average


class Begun(nn.Module):
    """Keeps its average in an attribute that is empty, or missing, before its first forward."""

    def __init__(self, *empty: None) -> None:
        super().__init__()
        if empty:
            self.average = None

    def forward(self, hidden: Tensor) -> Tensor:
        size = hidden.detach().abs().mean().item()
        average = getattr(self, "average", None)
        self.average = size if average is None else 0.9 * average + 0.1 * size
        return hidden / self.average


class Lazy(nn.Module):
    """Keeps an average from its first forward on."""

    def forward(self, hidden: Tensor) -> Tensor:
        if not hasattr(self, "average"):
            self.register_buffer("average", hidden.detach().abs().mean())
        self.average.lerp_(hidden.detach().abs().mean(), 0.1)
        return hidden


class Counting(nn.Module):
    """Adds what depends on how often it has run, kept where nobody finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.state = {"calls": 0}

    def forward(self, hidden: Tensor) -> Tensor:
        self.state["calls"] += 1
        return hidden * self.state["calls"]


class Normed(nn.Module):
    """Batch norm over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN_SIZE)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.flatten(0, -2)).reshape(hidden.shape)


class Noisy(nn.Module):
    """Adds noise by a generator of its own, which no checkpointing replays."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.randn(hidden.shape, generator=self.generator)


def fake_quantised(observer: Any) -> nn.Module:
    return FakeQuantize(observer=observer, quant_min=0, quant_max=255)


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE))


# What stands before the head, and what its refusal names.
STATEFUL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fake quantisation, average": (
        lambda: fake_quantised(MovingAverageMinMaxObserver),
        r"`0\.\S+` of its FakeQuantize",
    ),
    "fake quantisation, extremes": (
        lambda: fake_quantised(MinMaxObserver),
        r"`0\.\S+` of its FakeQuantize",
    ),
    "batch norm": (Normed, "BatchNorm1d"),
    "spectral norm": (spectral, r"0\.parametrizations\S+` of its _SpectralNorm"),
    "tensor": (lambda: Averaged(torch.ones(())), r"0\.average` of its Averaged"),
    "number": (lambda: Averaged(1.0), r"0\.average` of its Averaged"),
    "empty number": (lambda: Begun(None), r"0\.average` of its Begun"),
    "missing number": (Begun, r"0\.average` of its Begun"),
    "lazy": (Lazy, r"0\.average` of its Lazy"),
    "counter": (Counting, "other logits of the same token"),
    "generator": (Noisy, "other logits of the same token"),
}


def tiny(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model = build("llama", tie_word_embeddings=False, num_hidden_layers=1)
    model.lm_head = nn.Sequential(make(), model.lm_head)
    return model.train()


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a module holds in buffers, numbers and tensors."""
    found: dict[str, Any] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if isinstance(value, (float, Tensor)):
                found[f"{path}.{name}"] = torch.as_tensor(value).clone()
            if isinstance(value, torch.Generator):
                found[f"{path}.{name}"] = value.get_state()
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_head_that_its_forward_changes_is_refused_as_it_was(name: str) -> None:
    make, reason = STATEFUL[name]
    model = apply_patch(tiny(make))
    inputs, before, random = batch(model), state_of(model), torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match=reason):
        model(**inputs)
    assert not patch_report(model).fused
    assert same(state_of(model), before)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.filterwarnings("ignore:LlamaForCausalLM stays stock")
@pytest.mark.parametrize(
    "name", [name for name in STATEFUL if name not in ("counter", "batch norm")]
)
def test_such_a_head_then_runs_as_often_as_in_stock(name: str) -> None:
    make, _ = STATEFUL[name]
    stock, fused = tiny(make), apply_patch(tiny(make), strict=False)
    inputs = batch(stock)
    for _ in range(2):
        assert torch.equal(fused(**inputs).loss, stock(**inputs).loss)
    assert same(state_of(fused), state_of(stock))


def calibrated() -> nn.Module:
    module = fake_quantised(MovingAverageMinMaxObserver)
    module(torch.linspace(-3, 3, 7))
    return module.disable_observer() or module


@pytest.mark.parametrize(
    "make",
    [calibrated, lambda: Normed().eval(), lambda: spectral().eval()],
    ids=["observer", "batch norm", "spectral norm"],
)
def test_a_head_whose_state_is_switched_off_is_fused(make: Callable[[], nn.Module]) -> None:
    model = tiny(make)
    model.lm_head[0].train(make is calibrated)
    stock, before = copy.deepcopy(model), state_of(model)
    apply_patch(model)
    assert_trains_like(model, stock, batch(model))
    assert patch_report(model).fused and same(state_of(model), before)


@pytest.mark.parametrize(
    ("make", "switch"),
    [
        (calibrated, lambda module: module.enable_observer()),
        (Normed, nn.Module.train),
        (spectral, nn.Module.train),
    ],
    ids=["observer", "batch norm", "spectral norm"],
)
def test_state_that_is_switched_on_later_is_seen(
    make: Callable[[], nn.Module], switch: Callable[[Any], object]
) -> None:
    model = apply_patch(tiny(make).eval())
    inputs = batch(model)
    model(**inputs)
    switch(model.lm_head[0])
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match="head"):
        model(**inputs)
    assert same(state_of(model), before)


class Peak(nn.Module):
    """Remembers the largest activation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("peak", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        largest = hidden.detach().abs().max()
        if largest > self.peak:
            self.peak.copy_(largest)
        return hidden


def test_state_that_only_later_tokens_change_is_seen() -> None:
    model = tiny(Peak)
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    inputs = batch(model, rows=1)
    model(input_ids=inputs["input_ids"])
    rows = seen[0][0].abs().amax(-1)
    assert rows[2:].max() > rows[:2].max()
    model.lm_head[0].peak = rows[:2].max()
    with pytest.raises(UnsupportedModelError, match=r"another `0\.peak` of its Peak"):
        apply_patch(model)(**inputs)


class Rewriting(nn.Linear):
    """Writes into its buffer what stands there already."""

    def __init__(self) -> None:
        super().__init__(HIDDEN_SIZE, HIDDEN_SIZE)
        self.register_buffer("ones", torch.ones(HIDDEN_SIZE))

    def forward(self, hidden: Tensor) -> Tensor:
        self.ones.fill_(1.0)
        return super().forward(hidden * self.ones)


def test_a_buffer_that_is_written_but_not_changed_does_no_harm() -> None:
    model = tiny(Rewriting)
    stock, inputs = copy.deepcopy(model), batch(model)
    apply_patch(model)
    for _ in range(2):
        assert_trains_like(model, stock, inputs)
    assert patch_report(model).fused


def test_the_first_step_under_autocast_loses_no_gradient() -> None:
    """A cast that the trial makes without gradients must not be used by the loss."""
    model = apply_patch(tiny(nn.Identity))
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch(model)).loss.backward()
    assert model.lm_head[1].weight.grad is not None


def test_a_plain_head_with_a_spectral_norm_runs_as_often_as_in_stock() -> None:
    """Reading its weight in training moves it, so the report must not."""
    stock = build("llama", tie_word_embeddings=False, num_hidden_layers=1).train()
    nn.utils.parametrizations.spectral_norm(stock.lm_head)
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    for _ in range(2):
        assert_trains_like(fused, stock, inputs, in_float64(stock))
        assert patch_report(fused).fused
    assert same(state_of(fused), state_of(stock))
