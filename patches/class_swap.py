"""Patching by another class on the instance: what the model and its head become, and back.

The subclasses keep name, qualified name, module and signature, so whoever reads those (the stock
Trainer, `save_pretrained`, dataset column pruning) sees the stock model. Nothing callable is put on
the instance: a deep copy or a pickle of a patched model is a patched model with its own state.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

STATE = "_fused_state"
"""Name of the attribute that holds the state of a patched model and of its head."""

ClassMaker = Callable[[type], dict[str, Any]]


def make_subclass(base: type, namespace: dict[str, Any], below: tuple[type, ...] = ()) -> type:
    """A subclass of `base` that looks like it, with `namespace` on top.

    `namespace["_fused_maker"]` must be the function that makes it again from `base`. Classes of
    `below` come after `base` in the order of inheritance, before what they derive from.
    """
    looks = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    extra = {STATE: None, "_fused_base": base, "_fused_former": {}, "__reduce_ex__": _reduce_ex}
    make: Any = _metaclass_of_swapped(type(base))
    return make(base.__name__, (base, *below), {**looks, **extra, **namespace})


@functools.cache
def _metaclass_of_swapped(meta: Any) -> type:
    """`meta` for classes whose methods are set on the stock class, where they do not shadow ours.

    `type(model).forward = other` means the class that the model seems to have.
    """

    def set_attribute(cls: Any, name: str, value: Any) -> None:
        ours = swapped_class(cls)
        if ours is None or name.startswith("_") or name not in ours.__dict__:
            meta.__setattr__(cls, name, value)
        elif value is not ours.__dict__[name]:
            former = ours._fused_base.__dict__.get(name)
            ours._fused_former.setdefault(name, former)
            setattr(ours._fused_base, name, value)
        elif name in ours._fused_former:
            # Who patches for a while puts back what was found in the dictionary of our class.
            former = ours._fused_former.pop(name)
            if former is None:
                delattr(ours._fused_base, name)
            else:
                setattr(ours._fused_base, name, former)

    return type(meta.__name__, (meta,), {"__setattr__": set_attribute})


def method_like(stock: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` with the name, documentation and signature of `stock`.

    Unlike `functools.wraps` it leaves no `__wrapped__`: accelerate follows that to find the forward
    that it wrapped, and would put the stock one in the place of ours.
    """
    functools.update_wrapper(method, stock)
    del method.__wrapped__
    method.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
    method._fused_forward = method  # type: ignore[attr-defined]
    return method


def is_fused_forward(function: Any) -> bool:
    """Whether `function`, bound or not, is a forward of ours and no wrapper of one.

    `functools.wraps` copies the mark to a wrapper, where it still names the wrapped function.
    """
    function = getattr(function, "__func__", function)
    return getattr(function, "_fused_forward", None) is function


def swapped_class(cls: type) -> type | None:
    """The class of ours that `cls` is or derives from; None for a stock class."""
    return next((c for c in cls.__mro__ if "_fused_base" in c.__dict__), None)


def stock_class(cls: type) -> type:
    """The class that `cls` was made from by a swap; any other class itself."""
    ours = swapped_class(cls)
    return cls if ours is None else ours.__dict__["_fused_base"]


def swap(module: nn.Module, make: Callable[[type], type], state: Any) -> None:
    """Gives `module` the class that `make` builds on its own, and `state`."""
    if swapped_class(type(module)) is None:
        module.__class__ = make(type(module))
        _refresh_bound_forwards(module)
    module.__dict__[STATE] = state


def restore(module: nn.Module) -> None:
    """Gives `module` the class that it had, without ours but with what others have added since."""
    module.__dict__.pop(STATE, None)
    ours = swapped_class(type(module))
    if ours is not None:
        module.__class__ = _without(type(module), ours)
        _refresh_bound_forwards(module)


def swapped_modules(root: nn.Module) -> Iterator[nn.Module]:
    """Every module under `root` that carries a class or a state of ours."""
    for module in root.modules():
        if STATE in module.__dict__ or swapped_class(type(module)) is not None:
            yield module


@functools.cache
def _without(cls: type, ours: type) -> type:
    """`cls` as it would be if `ours` had never been put under it."""
    if cls is ours:
        return ours.__dict__["_fused_base"]
    bases = tuple(_without(b, ours) if issubclass(b, ours) else b for b in cls.__bases__)
    kept = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(ours.__dict__["_fused_base"])(cls.__name__, bases, kept)


def is_bound_forward(module: nn.Module, method: Any) -> bool:
    """Whether `method` is a forward of the module's own classes, bound to the module."""
    function = getattr(method, "__func__", None)
    if function is None or getattr(method, "__self__", None) is not module:
        return False
    forwards = [c.__dict__["forward"] for c in type(module).__mro__ if "forward" in c.__dict__]
    return function in forwards or is_fused_forward(function)


def _refresh_bound_forwards(module: nn.Module) -> None:
    """Puts the forward of the present class where accelerate keeps the former one.

    Its device hooks call the bound method that they found, `_old_forward`, and leave it on the
    instance when they are removed. Anything else in those places is not theirs and stays.
    """
    for name in ("forward", "_old_forward"):
        if is_bound_forward(module, module.__dict__.get(name)):
            module.__dict__[name] = type(module).forward.__get__(module)


def _reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickles and copies as the stock class, to be swapped again."""
    ours = swapped_class(type(self))
    parent = super(ours, self).__reduce_ex__(protocol)  # type: ignore[arg-type]
    function, args, *rest = parent
    base = ours.__dict__["_fused_base"]  # type: ignore[union-attr]
    args = tuple(base if arg is ours else arg for arg in args)
    return (_rebuild, (function, args, ours.__dict__["_fused_maker"]), *rest)  # type: ignore[union-attr]


def _rebuild(function: Callable[..., Any], args: tuple[Any, ...], make: Any) -> Any:
    instance = function(*args)
    instance.__class__ = make(type(instance))
    return instance
