"""Sees every tensor that eager code makes, inside our own operators too."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationSpy(TorchDispatchMode):
    """Records (operator, shape, bytes of its storage) of every new tensor.

    An operator of ours would be one opaque call to a dispatch mode; it is run with the mode still
    on, so that what happens inside is seen as well. Views and in-place results are not new.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A freed tensor's address is given out again, so only the arguments of this call are known.
        known = {_storage_address(t) for t in _tensors((args, kwargs))}
        if func.namespace == "hf_fused_head":
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            with self:
                result = func.redispatch(keys, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if _storage_address(tensor) not in known:
                storage_bytes = tensor.untyped_storage().nbytes()
                self.seen.append((str(func), tuple(tensor.shape), storage_bytes))
        return result

    def largest(self) -> tuple[str, tuple[int, ...], int]:
        """The record with the most bytes."""
        return max(self.seen, key=lambda record: record[2])

    def with_dimension(self, size: int) -> list[tuple[str, tuple[int, ...], int]]:
        """The records of which one dimension is `size`."""
        return [record for record in self.seen if size in record[1]]


def _tensors(tree: object) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _storage_address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
