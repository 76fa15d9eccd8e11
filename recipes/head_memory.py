"""What the head of a model holds at its peak, measured in one training step on the device at hand.

The window opens when the head is called and closes when the gradient of its input is complete, so
it covers the loss and both passes of the head and nothing of the layers below. On CUDA the
allocator counts. On the CPU nothing counts, so every tensor that an operator returns is followed
until it is freed; the bodies of this package's own operators are followed too.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def measure_head_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Peak bytes that the head adds in one forward and backward; gradients made by it included.

    Args:
        model: A causal language model in training mode; its gradients are dropped afterwards.
        batch: What the model is called with, labels included.
    """
    cuda = next(model.parameters()).is_cuda
    counter = _CudaBytes() if cuda else _LiveBytes([*model.parameters(), *model.buffers()])

    def opened(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counter.start()
        inputs[0].register_hook(lambda grad: counter.stop())

    hook = model.get_output_embeddings().register_forward_pre_hook(opened)
    try:
        with counter, torch.random.fork_rng():
            model(**batch).loss.backward()
    finally:
        hook.remove()
        model.zero_grad(set_to_none=True)
    return counter.peak_bytes


class _CudaBytes:
    """The allocator's own count between `start()` and `stop()`."""

    peak_bytes = 0

    def __enter__(self) -> _CudaBytes:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._base = torch.cuda.memory_allocated()

    def stop(self) -> None:
        self.peak_bytes = torch.cuda.max_memory_allocated() - self._base


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages made since it was entered and still alive, and their peak."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._live: dict[int, int] = {}  # storage address -> bytes
        self._bytes = self._base = self.peak_bytes = 0
        self._open = False

    def start(self) -> None:
        self._base, self._open = self._bytes, True

    def stop(self) -> None:
        self._open = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "hf_fused_head":
            # One level down, with this mode still on: what the operator makes inside counts too.
            with self:
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                result = func.redispatch(keys, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self._live or address in self._known:
            return
        self._live[address] = size
        self._bytes += size
        weakref.finalize(storage, self._freed, address)
        if self._open:
            self.peak_bytes = max(self.peak_bytes, self._bytes - self._base)

    def _freed(self, address: int) -> None:
        self._bytes -= self._live.pop(address)
