"""Forwards of a patched model that are running: where labels enter, and where they belong.

A model is entered at up to three layers, from the outside in: a forward that was put on
the instance, the forward of its class, and the one that transformers defines where the class is
a subclass of it from elsewhere. Labels may be made or renamed between two layers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .trl import FusedLMHead

_COMPILED = 0
"""The key of forwards under torch.compile, which cannot ask for the thread; no thread has it."""


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
        name: Distinguishes it from the other layers of the model.
        positions: Where it takes the arguments of the loss, `self` not counted.
        trl_head: TRL's fused head under it, if there is one.
        redirected: Whether a method of a trainer of TRL runs in the place of the model's forward.
    """

    name: str
    positions: dict[str, int]
    trl_head: FusedLMHead | None = None
    redirected: bool = False

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


class RunningForward:
    """A forward of a patched model while it runs; by itself one without labels, a stock one.

    Attributes:
        layer: Name of the layer that it was entered through.
        outer: The running forward inside which it was called, if any.
        reentrant: The model was called again, by a hook inside its own forward.
        delegated: A forward inside it, of a layer below, has taken the loss out of the head.
        accounted: A loss outside the head has been noticed.
    """

    def __init__(self, layer: str, outer: RunningForward | None) -> None:
        self.layer = layer
        self.outer = outer
        self.reentrant = outer is not None and outer.entered(layer)
        self.delegated = False
        self.accounted = False

    def entered(self, layer: str) -> bool:
        """Whether this call of the model has been entered through `layer` already."""
        running: RunningForward | None = self
        while running is not None:
            if running.layer == layer:
                return True
            running = None if running.reentrant else running.outer
        return False

    def run(
        self,
        running: dict[int, RunningForward],
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs `forward` as this one; `running` has the innermost of each thread."""
        key = forward_key()
        before = running.get(key)
        running[key] = self
        try:
            output = forward(*args, **kwargs)
        finally:
            if before is None:
                del running[key]
            else:
                running[key] = before
        return self.finish(output)

    def finish(self, output: Any) -> Any:
        """What the caller gets for the output of the forward, which runs no more."""
        return output


class LossForward(RunningForward):
    """A running forward whose loss is computed in the head; see `fused_forward.FusedForward`."""

    head: nn.Module
    given: LossArguments

    def compute_loss(
        self, kind: str, stock_forward: Any, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """What the head returns in the place of logits."""
        raise NotImplementedError

    def return_loss(self, logits: Any, *args: Any, **kwargs: Any) -> Tensor:
        """What the loss function returns."""
        raise NotImplementedError


def forward_key() -> int:
    """What a running forward is kept under: the thread, or that it is compiled."""
    return _COMPILED if torch.compiler.is_compiling() else threading.get_ident()


def innermost_of(running: dict[int, RunningForward]) -> RunningForward | None:
    """The innermost forward of this thread, or of the compiled region that it runs."""
    key = forward_key()
    return running[key] if key in running else running.get(_COMPILED)


def opened_outside(running: dict[int, RunningForward]) -> bool:
    """Whether this is compiled code inside a forward that is not, and that is to be fused."""
    if not torch.compiler.is_compiling() or _COMPILED in running:
        return False
    return any(isinstance(forward, LossForward) for forward in running.values())


@contextlib.contextmanager
def suspended(running: dict[int, RunningForward]) -> Iterator[None]:
    """Runs code, such as the stock forward of a head, in a forward of its own without labels."""
    keys = (forward_key(), _COMPILED)
    saved = {key: running.pop(key) for key in keys if key in running}
    running[keys[0]] = RunningForward("head", None)
    try:
        yield
    finally:
        del running[keys[0]]
        running.update(saved)
