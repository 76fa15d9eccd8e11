"""Whether a patched model trains as its stock self: loss, presence and value of every gradient."""

from __future__ import annotations

from typing import Any

import torch
from causal_loss import in_float64
from oracle import assert_close_as_torch
from torch import Tensor, nn


def loss_and_gradients(
    model: nn.Module, inputs: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss of one forward and the gradients of its backward, by parameter name."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs)[0]
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_trains_like(
    fused: nn.Module, stock: nn.Module, inputs: dict[str, Any], truth: nn.Module | None = None
) -> None:
    """Fails unless `fused` is as near to a float64 copy of `stock` as `stock` itself is.

    Args:
        fused: The patched model.
        stock: An untouched model with the same weights.
        inputs: What both are called with.
        truth: The float64 copy, where `stock` cannot be copied.
    """
    truth = in_float64(stock) if truth is None else truth
    (loss, grads), (stock_loss, stock_grads), (true_loss, true_grads) = (
        loss_and_gradients(model, inputs) for model in (fused, stock, truth)
    )
    assert loss.shape == stock_loss.shape and loss.dtype == stock_loss.dtype
    assert_close_as_torch("loss", loss, stock_loss, true_loss)
    assert_gradients_close(grads, stock_grads, true_grads)


def assert_gradients_like(fused: nn.Module, stock: nn.Module, truth: nn.Module) -> None:
    """Fails unless the gradients that `fused` holds are as near to those of `truth` as stock's."""
    found = [{name: p.grad for name, p in m.named_parameters()} for m in (fused, stock, truth)]
    gathered = {k: None if g is None else _whole(g) for k, g in found[0].items()}
    assert_gradients_close(gathered, found[1], found[2])


def _whole(grad: Tensor) -> Tensor:
    """The gradient of all processes, where it is sharded."""
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def assert_gradients_close(
    ours: dict[str, Tensor | None],
    stock: dict[str, Tensor | None],
    truth: dict[str, Tensor | None],
) -> None:
    """Every tensor, relative to its largest element, within what stock reaches in its worst one.

    Tensor by tensor the largest of a few dozen rounding errors is a lottery that ours would lose
    once in a while by more than a factor of two, now here and now there.
    """
    assert ours.keys() == stock.keys() == truth.keys()
    present = [key for key, grad in stock.items() if grad is not None]
    assert [key for key, grad in ours.items() if grad is not None] == present
    scales = {key: truth[key].abs().max().nan_to_num() or 1.0 for key in present}
    scaled = [
        {key: (group[key].double() / scales[key]).to(ours[key].dtype) for key in present}
        for group in (ours, stock)
    ]
    exact = {key: truth[key].double() / scales[key] for key in present}
    worst = max(
        ((scaled[1][key].double() - exact[key]).abs().max().nan_to_num() for key in present),
        default=torch.zeros(()),
    )
    for key in present:
        assert_close_as_torch(f"gradient of {key}", scaled[0][key], exact[key] + worst, exact[key])


def same_modules(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same classes and attributes throughout."""

    def looks(model: nn.Module) -> list[tuple[str, type, list[str]]]:
        return [(name, type(m), sorted(m.__dict__)) for name, m in model.named_modules()]

    return looks(one) == looks(other)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own, so that tests do not depend on their order."""
    return torch.Generator().manual_seed(seed)
