"""Bytes alive while eager code runs, and how they grow with the number of tokens."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Records, after every operator, the bytes of storages that were made under the mode.

    Attributes:
        now: Bytes alive.
        line: `now` after each operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.line: list[int] = []
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Views and results in place have the storage of an argument.
        given = {key for key, _ in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for key, storage in _storages(result):
            if key not in given and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        self.line.append(self.now)
        return result

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storages(tree: Any) -> list[tuple[int, torch.UntypedStorage]]:
    storages = (t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor))
    return [(storage._cdata, storage) for storage in storages]


class Timeline:
    """The bytes of a run at every operator, as polynomials of the number of tokens.

    The same operators run whatever the number of tokens, each with tensors whose sizes are at most
    quadratic in it. Three runs give the bytes at every operator for any number; their maximum is
    the peak, wherever it lies.

    Args:
        lines: Of runs of `step`, `2 * step` and `3 * step` tokens.
        step: Tokens of the first run.

    Raises:
        ValueError: If the runs have different operators.
    """

    def __init__(self, lines: Sequence[Sequence[int]], step: int) -> None:
        if len({len(line) for line in lines}) != 1:
            raise ValueError("the operators of this model depend on the number of tokens")
        first, second, third = (torch.tensor(line, dtype=torch.float64) for line in lines)
        self._step = step
        self._first = first
        self._slope = second - first
        self._bend = (third - 2 * second + first) / 2

    def at(self, num_tokens: int) -> Tensor:
        """Bytes after each operator."""
        steps = num_tokens / self._step - 1
        return self._first + self._slope * steps + self._bend * (steps * (steps - 1))

    def peak(self, num_tokens: int) -> int:
        """Most bytes at once."""
        return round(self.at(num_tokens).max().item())
