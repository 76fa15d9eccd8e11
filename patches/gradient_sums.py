"""Float32 sums of the gradients that many chunks contribute to the same tensor.

Autograd adds the contributions to a tensor's gradient in the dtype of the tensor. In bfloat16 such
a running sum stops growing once a term is smaller than half its last place, so its error grows with
the number of chunks. Here each contribution is added to a float32 sum. Autograd gets the sum from
the last contribution, rounded once, and nothing from the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

_LOW_PRECISION = (torch.float16, torch.bfloat16)

Gradients = tuple[Tensor | None, ...]


class Term(NamedTuple):
    """One term of a sum, and the number that autograd gave to the first operation behind it."""

    value: Tensor
    first_operation: int


class _Use(NamedTuple):
    """An operation of one chunk, one of its inputs, and where that input comes from."""

    operation: Node
    slot: int
    source: tuple[Node, int]


class _Sum:
    """The gradient of one tensor in one backward; contributions arrive in any order."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.reset()

    def reset(self) -> None:
        """Starts a backward; an earlier one may have ended in an exception."""
        self.arrived = 0
        self.total: Tensor | None = None

    def add(self, grad: Tensor | None) -> Tensor | None:
        """The sum, rounded to the dtype of `grad`, for the last contribution; None before it."""
        self.arrived += 1
        if grad is not None:
            self.total = grad.float() if self.total is None else self.total.add_(grad)
        if self.arrived < self.expected or self.total is None:
            return None
        if grad is None:
            raise RuntimeError(
                "an operation of the head must return the gradient of its input in every chunk of "
                "tokens, got None in one and a gradient in another: leave this model stock "
                "(remove_patch)"
            )
        total = self.total
        self.reset()
        return total.to(grad.dtype)


def next_operation() -> int:
    """The number that autograd will give to the next operation of this thread."""
    return torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]


def sum_in_float32(total: Tensor, terms: Sequence[Term]) -> None:
    """Makes the backward of `total` sum gradients of low precision in float32.

    The tensors that several terms use are found in the autograd graph: no list of parameters could
    name what a head's forward takes from elsewhere. The graph itself stays as it is, so hooks on
    modules, parameters and operations run as they would without the sums.

    Args:
        total: The sum of the terms, 0-d.
        terms: Nothing but `total` depends on an operation behind them.
    """
    if total.grad_fn is None:
        return
    uses = list(_uses_of_shared(terms))
    counts = Counter(use.source for use in uses)
    sums = {source: _Sum(count) for source, count in counts.items() if count > 1}
    slots: dict[Node, dict[int, _Sum]] = {}
    for use in uses:
        if use.source in sums:
            slots.setdefault(use.operation, {})[use.slot] = sums[use.source]
    for operation, found in slots.items():
        operation.register_hook(_adding(found))
    total.grad_fn.register_prehook(_resetting(list(sums.values())))


def _uses_of_shared(terms: Sequence[Term]) -> Iterator[_Use]:
    """Where the operations of one term take what older operations or several terms share."""
    owner: dict[Node, int] = {}
    shared: set[Node] = set()
    for index, term in enumerate(terms):
        pending = [term.value.grad_fn]
        while pending:
            node = pending.pop()
            if node is None:
                continue
            if node._sequence_nr() < term.first_operation or owner.get(node, index) != index:
                shared.add(node)
            elif node not in owner:
                owner[node] = index
                pending.extend(before for before, _ in node.next_functions)
    for node in owner:
        if node not in shared:
            for slot, (before, output) in enumerate(node.next_functions):
                if before is not None and before in shared:
                    yield _Use(node, slot, (before, output))


def _adding(slots: dict[int, _Sum]) -> Callable[[Gradients, Gradients], Gradients]:
    def hook(grads: Gradients, _: Gradients) -> Gradients:
        return tuple(
            slots[slot].add(grad)
            if slot in slots and (grad is None or grad.dtype in _LOW_PRECISION)
            else grad
            for slot, grad in enumerate(grads)
        )

    return hook


def _resetting(sums: list[_Sum]) -> Callable[[Gradients], None]:
    def hook(_: Gradients) -> None:
        for each in sums:
            each.reset()

    return hook
