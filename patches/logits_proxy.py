"""What the fused head returns in the place of logits: a proxy that records what is done to it.

The stock forward uses it as it would the logits. A few operations are understood and recorded; the
record shows, on the very pass that trains, what the model does between its head and its loss.
Anything else ends the pass with the name of the operation.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import UnsupportedModelError
from .tensor_parallel import check_gathered


class ProxyOwner(Protocol):
    """The fused forward that a proxy belongs to."""

    loss_returned: bool  # whether the loss function has returned the loss of the head

    @property
    def return_own_loss(self) -> Callable[..., Tensor]:
        """Returns the loss in the place of a `cross_entropy` that the forward calls itself."""
        ...

    def logits(self, proxy: LogitsProxy) -> Tensor:
        """Real logits in the place of the proxy."""
        ...


class Step(NamedTuple):
    """One recorded operation, as it can be done again on real logits."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]

    def __call__(self, logits: Tensor) -> Tensor:
        return self.function(logits, *self.args)


def replay(steps: tuple[Step, ...], logits: Tensor) -> Tensor:
    """Real logits after the recorded operations."""
    for step in steps:
        logits = step(logits)
    return logits


# A dataclass and a pytree node: FSDP finds the loss in the head's output by either, and hangs the
# hook on it that gathers the head before its backward.
@dataclass(eq=False)
class LogitsProxy:
    """Stands for the logits between the head and the loss; no tensor.

    Attributes:
        loss: The finished loss, 0-d, or values per token; what the model returns must come from
            this very tensor.
        owner: The forward that this belongs to.
        shape: That of the logits, [..., vocab].
        dtype: That of the logits at this point of the forward.
        device: That of the logits.
        steps: What the model has done to the head's output so far.
    """

    loss: Tensor
    owner: ProxyOwner = field(repr=False)
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    steps: tuple[Step, ...] = ()

    def _with(self, step: Step, dtype: torch.dtype | None = None) -> LogitsProxy:
        steps = (*self.steps, step)
        dtype = self.dtype if dtype is None else dtype
        return LogitsProxy(self.loss, self.owner, self.shape, dtype, self.device, steps)

    def _in_place(self, step: Step) -> LogitsProxy:
        self.steps = (*self.steps, step)
        return self

    def _other(self, name: str) -> Tensor:
        """An operation that no record can hold: real logits once the loss is out, else the end."""
        if not self.owner.loss_returned:
            raise UnsupportedModelError(
                f"the model's forward, or a hook on its head, does `{name}` to the logits before "
                "the loss, which the fused head cannot take over: leave this model stock "
                "(remove_patch)"
            )
        return self.owner.logits(self)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.__name__
        proxy = args[0] if args and isinstance(args[0], LogitsProxy) else None
        own_loss = func is nn.functional.cross_entropy
        if proxy is not None and own_loss and not proxy.owner.loss_returned:
            return proxy.owner.return_own_loss(*args, **(kwargs or {}))
        if proxy is not None and not kwargs:
            if name == "tanh":
                return proxy.tanh()
            if name == "add":
                return proxy + args[1]
            if name in ("mul", "multiply") and _is_scalar(args[1]):
                return proxy * args[1]
            if name in ("div", "divide", "true_divide") and _is_scalar(args[1]):
                return proxy / args[1]
        real = pytree.tree_map(
            lambda leaf: leaf._other(name) if isinstance(leaf, LogitsProxy) else leaf,
            (args, kwargs or {}),
            is_leaf=lambda leaf: isinstance(leaf, LogitsProxy),
        )
        return func(*real[0], **real[1])

    def __add__(self, other: Any) -> Any:
        if not self._is_row(other):
            return self._other("add") + other
        dtype = torch.promote_types(self.dtype, other.dtype)
        return self._with(Step("add", operator.add, (other,)), dtype)

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Any:
        if self._is_row(other):
            return self._in_place(Step("add", operator.add, (other,)))
        return self._other("add_").add_(other)

    def add(self, other: Any, *, alpha: float = 1) -> Any:
        return self + other if alpha == 1 else self._other("add").add(other, alpha=alpha)

    def add_(self, other: Any, *, alpha: float = 1) -> Any:
        return self.__iadd__(other) if alpha == 1 else self._other("add_").add_(other, alpha=alpha)

    def _is_row(self, value: Any) -> bool:
        """Whether this has one number for each class, as a bias has."""
        shapes = ((self.shape[-1],), (1, self.shape[-1]))
        return isinstance(value, Tensor) and tuple(value.shape) in shapes

    def __mul__(self, other: Any) -> Any:
        if _is_scalar(other):
            return self._with(Step("mul", operator.mul, (other,)))
        return self._other("mul") * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if _is_scalar(other):
            return self._with(Step("div", operator.truediv, (other,)))
        return self._other("div") / other

    def __imul__(self, other: Any) -> Any:
        if _is_scalar(other):
            return self._in_place(Step("mul", operator.mul, (other,)))
        return self._other("mul_").mul_(other)

    def __itruediv__(self, other: Any) -> Any:
        if _is_scalar(other):
            return self._in_place(Step("div", operator.truediv, (other,)))
        return self._other("div_").div_(other)

    mul, mul_ = __mul__, __imul__
    div, div_ = __truediv__, __itruediv__

    def tanh(self) -> LogitsProxy:
        return self._with(Step("tanh", torch.tanh, ()))

    def tanh_(self) -> LogitsProxy:
        return self._in_place(Step("tanh", torch.tanh, ()))

    def _cast(self, dtype: torch.dtype) -> LogitsProxy:
        if not dtype.is_floating_point:
            raise UnsupportedModelError(
                f"the model's forward casts the logits to {dtype} before its loss: leave this "
                "model stock (remove_patch)"
            )
        if dtype == self.dtype:
            return self
        return self._with(Step("cast", Tensor.to, (dtype,)), dtype)

    def float(self) -> LogitsProxy:
        return self._cast(torch.float32)

    def double(self) -> LogitsProxy:
        return self._cast(torch.float64)

    def half(self) -> LogitsProxy:
        return self._cast(torch.float16)

    def bfloat16(self) -> LogitsProxy:
        return self._cast(torch.bfloat16)

    def type(self, dtype: torch.dtype) -> LogitsProxy:
        return self._cast(dtype)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        target: Any = kwargs.get("dtype", kwargs.get("device", args[0] if args else None))
        if isinstance(target, (LogitsProxy, Tensor)):
            return self._move(target.device)._cast(target.dtype)
        if isinstance(target, torch.dtype):
            return self._cast(target)
        if isinstance(target, (str, int, torch.device)):
            moved = self._move(torch.device(target))
            return moved._cast(args[1]) if len(args) > 1 else moved
        return self._other("to").to(*args, **kwargs)

    def _move(self, device: torch.device) -> LogitsProxy:
        if device.type == self.device.type and device.index in (None, self.device.index):
            return self
        moved = self._with(Step("move", Tensor.to, (device,)))
        moved.loss, moved.device = self.loss.to(device), device
        return moved

    def contiguous(self) -> LogitsProxy:
        return self

    # torch's tensor parallelism asks a head's output for its layout, and gathers it.
    @property
    def placements(self) -> None:
        return None

    def redistribute(self, device_mesh: Any = None, placements: Any = (), **_: Any) -> LogitsProxy:
        check_gathered(placements)
        return self

    def to_local(self) -> LogitsProxy:
        return self

    def view(self, *sizes: Any) -> Any:
        return self._reshape("view", sizes)

    def reshape(self, *sizes: Any) -> Any:
        return self._reshape("reshape", sizes)

    def _reshape(self, name: str, sizes: tuple[Any, ...]) -> Any:
        wanted = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        if len(wanted) == len(self.shape):
            pairs = zip(wanted, self.shape, strict=True)
            unknown = [size for size in wanted if size == -1]
            if len(unknown) <= 1 and all(ours in (-1, own) for ours, own in pairs):
                return self
        rows, vocab_size = math.prod(self.shape[:-1]), self.shape[-1]
        if wanted in ((-1, vocab_size), (rows, vocab_size)) and not self.owner.loss_returned:
            flat = torch.Size((rows, vocab_size))
            return LogitsProxy(self.loss, self.owner, flat, self.dtype, self.device, self.steps)
        return getattr(self._other(name), name)(*sizes)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    ndimension = dim

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        return True

    @property
    def requires_grad(self) -> bool:
        return self.loss.requires_grad

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def __len__(self) -> int:
        return self.shape[0]

    def __neg__(self) -> Tensor:
        return -self._other("neg")

    def __rtruediv__(self, other: Any) -> Any:
        return other / self._other("truediv")

    def __getitem__(self, index: Any) -> Any:
        if not self.owner.loss_returned and _keeps_all(index, self.shape):
            return self
        return self._other("getitem")[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        raise UnsupportedModelError(
            "the model's forward writes into the logits, which the fused head cannot take over: "
            "leave this model stock (remove_patch)"
        )

    def __iter__(self) -> Any:
        return iter(self._other("iter"))

    def __getattr__(self, name: str) -> Any:
        # Called only for what is not defined above. Names that no tensor has are plain mistakes
        # or the duck typing of others, and get the usual result.
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._other(name), name)


def _binary(name: str, reflected: bool) -> Callable[[LogitsProxy, Any], Any]:
    function = getattr(operator, name)

    def method(self: LogitsProxy, other: Any) -> Any:
        real = self._other(name)
        return function(other, real) if reflected else function(real, other)

    return method


for _name in ("sub", "pow", "matmul"):
    setattr(LogitsProxy, f"__{_name}__", _binary(_name, reflected=False))
    setattr(LogitsProxy, f"__r{_name}__", _binary(_name, reflected=True))
for _name in ("lt", "le", "gt", "ge"):
    setattr(LogitsProxy, f"__{_name}__", _binary(_name, reflected=False))


def _flatten(proxy: LogitsProxy) -> tuple[list[Tensor], tuple[Any, ...]]:
    return [proxy.loss], (proxy.owner, proxy.shape, proxy.dtype, proxy.device, proxy.steps)


def _unflatten(children: Any, rest: tuple[Any, ...]) -> LogitsProxy:
    (loss,) = children
    return LogitsProxy(loss, *rest)


pytree.register_pytree_node(
    LogitsProxy, _flatten, _unflatten, serialized_type_name="hf_fused_head.LogitsProxy"
)


def observed_facts(steps: tuple[Step, ...]) -> tuple[float, float | None, Tensor | None]:
    """Scale, cap and bias of `cap * tanh(scale * (z + bias) / cap)` from what was recorded.

    Raises:
        UnsupportedModelError: If the record has another form.
    """
    factor, inner, bias = 1.0, None, None
    for step in steps:
        if step.name == "add":
            if bias is not None or inner is not None or factor != 1.0:
                raise UnsupportedModelError(
                    "the model's forward must add at most one bias, right to the head's output, "
                    "got another `add` before its loss: leave this model stock (remove_patch)"
                )
            bias = step.args[0]
        elif step.name == "mul":
            factor *= step.args[0]
        elif step.name == "div":
            factor *= 1.0 / step.args[0]
        elif step.name == "tanh":
            if inner is not None:
                raise UnsupportedModelError(
                    "the model's forward does `tanh` to the logits twice: leave this model stock "
                    "(remove_patch)"
                )
            factor, inner = 1.0, factor
    return (factor, None, bias) if inner is None else (inner * factor, factor, bias)


def same_facts(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Equal up to the rounding of the few float operations that they were made by."""
    if (one[1] is None) != (other[1] is None):
        return False
    cap = (0.0, 0.0) if one[1] is None or other[1] is None else (one[1], other[1])
    return _close(one[0], other[0]) and _close(*cap)


def _close(one: float, other: float) -> bool:
    # Not `math.isclose`, which takes no number that torch.compile(dynamic=True) leaves open.
    return abs(one - other) <= 1e-12 * max(abs(one), abs(other))


def _keeps_all(index: Any, shape: torch.Size) -> bool:
    """Whether an index is made of slices that leave nothing out."""
    parts = index if isinstance(index, tuple) else (index,)
    return len(parts) <= len(shape) and all(
        isinstance(part, slice) and part.indices(size) == (0, size, 1)
        for part, size in zip(parts, shape[: len(parts)], strict=True)
    )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
