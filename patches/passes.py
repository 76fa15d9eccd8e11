"""Forwards of a patched model that are running: where labels enter, and which pass they belong to.

A model is entered at up to three layers, from the outside in: a forward that somebody has put on
the instance, the forward of its class, and the one that transformers defines where the class is
somebody's subclass of it. Labels may be made or renamed between two layers.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .state import pass_key

if TYPE_CHECKING:
    from .state import PatchState


class LossArguments(NamedTuple):
    """What the stock loss function is given beside the logits."""

    labels: Tensor
    shift_labels: Tensor | None = None
    num_items_in_batch: int | Tensor | None = None
    ignore_index: int = -100

    def same_as(self, other: LossArguments) -> bool:
        """Whether the same tensors and numbers are given."""
        return all(same(one, two) for one, two in zip(self, other, strict=True))


_FIELDS = LossArguments._fields


def same(expected: Any, got: Any) -> bool:
    """The same tensor, or equal numbers."""
    if isinstance(expected, Tensor) or isinstance(got, Tensor):
        return expected is got
    return expected == got


class Layer(NamedTuple):
    """A forward through which a model is entered.

    Attributes:
        name: Tells it from the other layers of the model.
        positions: Where it takes the arguments of the loss, `self` not counted.
    """

    name: str
    positions: dict[str, int]

    def loss_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossArguments | None:
        """What the forward was given for its loss; None without labels."""
        found = {}
        for name in _FIELDS:
            value = kwargs.get(name)
            if self.positions[name] < len(args):
                value = args[self.positions[name]]
            if value is not None:
                found[name] = value
        return LossArguments(**found) if "labels" in found else None


def class_layer(name: str, forward: Callable[..., Any]) -> Layer:
    """The layer of a function that takes `self` first."""
    return Layer(name, {field: _position_after_self(forward, field) for field in _FIELDS})


def positions(forward: Callable[..., Any], skip: int = 0) -> dict[str, int]:
    """Where a forward takes the arguments of the loss, `skip` leading ones not counted."""
    try:
        names = list(inspect.signature(forward).parameters)[skip:]
    except (TypeError, ValueError):  # Some callables tell no signature.
        names = []
    return {name: names.index(name) if name in names else sys.maxsize for name in _FIELDS}


# The compiler cannot trace `inspect`: it evaluates this, and guards on the function.
@torch.compiler.assume_constant_result
def _position_after_self(forward: Callable[..., Any], name: str) -> int:
    return _cached_positions(forward)[name]


@functools.lru_cache
def _cached_positions(forward: Callable[..., Any]) -> dict[str, int]:
    return positions(forward, skip=1)


class Pass:
    """A forward of a model that is running; by itself one without labels, a stock one.

    Attributes:
        layer: Name of the layer that it was entered through.
        outer: The pass inside which it runs, if any.
        reentrant: The model was called again, by a hook inside its own forward.
        is_fused: The head returns the loss.
        delegated: A pass inside it, of a layer below, has taken the loss out of the head.
        accounted: A loss outside the head has been noticed.
    """

    is_fused = False

    def __init__(self, layer: str, outer: Pass | None) -> None:
        self.layer = layer
        self.outer = outer
        self.reentrant = outer is not None and outer.entered(layer)
        self.delegated = False
        self.accounted = False

    def entered(self, layer: str) -> bool:
        """Whether this call of the model has been entered through `layer` already."""
        running: Pass | None = self
        while running is not None:
            if running.layer == layer:
                return True
            running = None if running.reentrant else running.outer
        return False

    def enclose(
        self,
        state: PatchState,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs `forward` as this pass."""
        running, key = state.running, pass_key()
        before = running.get(key)
        running[key] = self
        try:
            return forward(*args, **kwargs)
        finally:
            if before is None:
                del running[key]
            else:
                running[key] = before
