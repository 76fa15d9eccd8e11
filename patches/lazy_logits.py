"""`output.logits` of a fused forward: a tensor that is made on first use.

Loss-only evaluation, mixed precision wrappers and logging loops take the logits out of the output,
cast them and drop them. Shape, dtype, casts, copies and `detach` therefore cost nothing here. The
first real use runs the head's own forward on the kept hidden states, under the autocast and
gradient mode of that forward, and does again what the model did to the result: the stock value, and
in training the stock gradient. Where that is no longer possible the error names the remedy.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from .errors import LogitsUnavailableError
from .logits_proxy import Step
from .recompute_logits import REMEDY, ComputeMode, RecomputedLogits


class LazyValue:
    """A tensor that is made on first use, and what is known of it before.

    Args:
        make: Makes the tensor.
        requires_grad: Whether it will require grad.
    """

    def __init__(self, make: Callable[[], Tensor], requires_grad: bool) -> None:
        self.make: Callable[..., Tensor] = make
        self.requires_grad = requires_grad
        self.hooks: OrderedDict[int, Callable[[Tensor], Any]] = OrderedDict()
        self.node: Any = None
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The tensor, made once."""
        value = self._value
        if value is None:
            value = self._value = self.make()
            # What it was made from is not needed any more.
            self.make = torch.empty
            for hook in self.hooks.values():
                value.register_hook(hook)
        return value

    def grad_fn(self) -> Any:
        """That of the tensor; before, `node`: DDP asks, and leaves alone what has none."""
        return self.node if self._value is None else self._value.grad_fn

    def register_hook(self, hook: Callable[[Tensor], Any]) -> RemovableHandle:
        """A hook on the gradient; FSDP hangs one on every output that requires grad."""
        if self._value is not None:
            return self._value.register_hook(hook)
        if not self.requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        handle = RemovableHandle(self.hooks)
        self.hooks[handle.id] = hook
        return handle


class LazyLogits(Tensor):
    """Logits that exist once their values are used; see the module's docstring."""

    _lazy: LazyValue

    @staticmethod
    def __new__(
        cls, lazy: LazyValue, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> LazyLogits:
        # The wrapper itself never requires grad: a backward that starts from it, past all Python,
        # must fail instead of ending here. `requires_grad` is handled below.
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._lazy = lazy
        return self

    def __init__(self, *args: Any) -> None:
        pass

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if args and isinstance(args[0], LazyLogits):
            if func in _AUTOGRAD:
                return _AUTOGRAD[func](args[0]._lazy, *args[1:], **kwargs)
            result = _lazy_result(func, args[0], args[1:], kwargs)
            if result is not None:
                return result
        return _on_real_tensors(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Reached only past `__torch_function__`, from C++ code such as an autograd.Function's
        # inputs; autograd has been here already and saw no history.
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, LazyLogits) and leaf._lazy.requires_grad:
                raise LogitsUnavailableError(
                    f"{func} reached lazy logits below autograd, where their gradient would be "
                    f"lost: use logits * 1 first, or {REMEDY}"
                )
        return _on_real_tensors(func, args, kwargs or {})


def lazy_logits(source: RecomputedLogits, steps: tuple[Step, ...], dtype: torch.dtype) -> Tensor:
    """The head's output after the recorded operations, of the given dtype, made on first use."""
    moves = [step.args[0] for step in steps if step.name == "move"]
    device = moves[-1] if moves else source.device
    lazy = LazyValue(functools.partial(source.replayed, steps), source.requires_grad)
    return LazyLogits(lazy, source.shape, dtype, device)


def _on_real_tensors(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    real = pytree.tree_map(_made, (args, kwargs))
    return func(*real[0], **real[1])


def _made(leaf: Any) -> Any:
    return leaf._lazy.value if isinstance(leaf, LazyLogits) else leaf


_CASTS = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}


def _getter(name: str) -> Any:
    """How `__torch_function__` learns that an attribute is read."""
    return getattr(Tensor, name).__get__


_AUTOGRAD: dict[Any, Callable[..., Any]] = {
    _getter("requires_grad"): lambda lazy: lazy.requires_grad,
    _getter("is_leaf"): lambda lazy: not lazy.requires_grad,
    _getter("grad_fn"): LazyValue.grad_fn,
    Tensor.register_hook: LazyValue.register_hook,
}
_METADATA = {
    *(
        _getter(name)
        for name in (
            *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "names"),
            *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_xla", "is_mkldnn"),
            *("is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_vulkan", "is_maia"),
            "_base",
        )
        if hasattr(Tensor, name)
    ),
    *(Tensor.size, Tensor.stride, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed, Tensor.is_contiguous),
    *(Tensor.element_size, Tensor.get_device, Tensor.__len__, Tensor.__hash__),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}


def _lazy_result(
    func: Callable[..., Any], logits: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LazyLogits | None:
    """The result of a cast, a copy or a detach, still lazy; None for everything else."""
    plain = not (args or kwargs)
    if func in (Tensor.detach, torch.detach) and plain:
        return _derived(logits, Tensor.detach, (), logits.dtype, False)
    # DDP copies every output of a forward whose parameters it watches.
    if func in (Tensor.clone, torch.clone) and plain:
        return _derived(logits, Tensor.clone, (), logits.dtype, True)
    if func is Tensor.contiguous and plain:
        return logits
    if func is Tensor.view_as and len(args) == 1 and args[0] is logits:
        # Multi-gradient hooks, as of FlopCounterMode, take the node of a tensor from a view of it,
        # to ask whether a backward runs it. None runs that of a tensor which has not been made.
        view = _derived(logits, Tensor.view, (logits.shape,), logits.dtype, True)
        view._lazy.node = torch.zeros((), requires_grad=True).clone().grad_fn
        return view
    if func in _CASTS and plain:
        return _cast(logits, _CASTS[func])
    if func is Tensor.to and "copy" not in kwargs and len(args) < 4:
        # The parser behind nn.Module.to as well.
        parse: Any = torch._C._nn._parse_to  # pyright: ignore[reportAttributeAccessIssue]
        device, dtype, _, memory_format = parse(*args, **kwargs)
        if memory_format is None:
            return _cast(logits if device is None else _moved(logits, device), dtype)
    return None


def _moved(logits: LazyLogits, device: torch.device) -> LazyLogits:
    # accelerate's device maps bring every output back to where the inputs lay.
    device = torch.empty(0, device=device).device  # With its index.
    if device == logits.device:
        return logits
    return _derived(logits, Tensor.to, (device,), logits.dtype, True, device)


def _cast(logits: LazyLogits, dtype: torch.dtype | None) -> LazyLogits | None:
    if dtype is None or dtype == logits.dtype:
        return logits
    return _derived(logits, Tensor.to, (dtype,), dtype, True) if dtype.is_floating_point else None


def _derived(
    logits: LazyLogits,
    function: Callable[..., Tensor],
    args: tuple[Any, ...],
    dtype: torch.dtype,
    differentiable: bool,
    device: torch.device | None = None,
) -> LazyLogits:
    """`function(logits, *args)` as it would be now, made on first use."""
    parent, mode = logits._lazy, ComputeMode.current(logits.device.type)

    def make() -> Tensor:
        with mode.restored():
            return function(parent.value, *args)

    requires_grad = differentiable and parent.requires_grad and mode.grad_enabled
    lazy = LazyValue(make, requires_grad)
    return LazyLogits(lazy, logits.shape, dtype, device or logits.device)


class UnavailableLogits:
    """In the place of logits that nothing can make: after `torch.compile` there is no way back.

    Casts and `detach` return it as it is, since mixed precision wrappers do them unasked.
    """

    def _same(self, *args: Any, **kwargs: Any) -> UnavailableLogits:
        return self

    float = double = half = bfloat16 = detach = to = contiguous = _same

    def __getattr__(self, name: str) -> Any:
        raise LogitsUnavailableError(
            f"`logits.{name}` of a compiled or replicated fused forward does not exist: {REMEDY}"
        )

    def __getitem__(self, index: Any) -> Any:
        return self.__getattr__("__getitem__")

    def __len__(self) -> int:
        return self.__getattr__("__len__")

    def __bool__(self) -> bool:
        return self.__getattr__("__bool__")

    def __repr__(self) -> str:
        return f"<logits were not made: {REMEDY}>"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        raise LogitsUnavailableError(
            f"`{func.__name__}` of the logits of a compiled or replicated fused forward: {REMEDY}"
        )


# A node without leaves, so that torch.export takes and saves it as a part of the output.
pytree.register_pytree_node(
    UnavailableLogits,
    lambda logits: ([], None),
    lambda children, context: UnavailableLogits(),
    serialized_type_name="hf_fused_head.UnavailableLogits",
)


class ReplicaLogits(UnavailableLogits):
    """What a replica of `DataParallel` returns in training, so that gathering makes no logits.

    `torch.nn.parallel.gather` rebuilds unknown outputs by `type(out)(map(..., zip(*outputs)))`.
    """

    def __init__(self, parts: Any = ()) -> None:
        del parts

    def __iter__(self) -> Iterator[Any]:
        return iter(())
