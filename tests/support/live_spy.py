"""How much memory eager code holds at once, by watching every storage that an operator makes."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveSpy(TorchDispatchMode):
    """Bytes alive at each operator, of storages that were made under the mode.

    Attributes:
        largest: Bytes of the largest single storage.
        peak: Most bytes alive at once.
        operators: Names of the operators that ran, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.largest = 0
        self.peak = 0
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.operators.append(func.overloadpacket.__name__)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in given:
                storage = tensor.untyped_storage()
                self.known[_address(tensor)] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        alive = {k: (ref, size) for k, (ref, size) in self.known.items() if not ref.expired()}
        self.known = alive
        self.peak = max(self.peak, sum(size for _, size in alive.values()))
        return result


class Poisoned(TorchDispatchMode):
    """Fills every `torch.empty` with nan, which anything that reads it too early keeps."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "empty" in func.overloadpacket.__name__ and result.is_floating_point():
            result.fill_(float("nan"))
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
