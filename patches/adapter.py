"""`apply_patch` and back: the stock forward runs, its head answers with the finished loss.

The model's and the head's class are swapped on the instance (swap.py). A forward with labels opens
a call (call.py), the head computes the loss in the place of logits (heads.py) and returns a
stand-in that records what the model does to it (trace.py); the model's own loss function then hands
the loss back, if the record is what the family's facts say (registry.py). Without labels nothing of
this happens.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, TypeVar, cast, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from hf_fused_head.functional import STAT_NAMES, LossStats
from hf_fused_head.options import Impl, LossOptions

from . import neighbours, swap
from .call import Call, LossArguments, causal_convention
from .errors import RowCountError, UnsupportedModelError
from .heads import innermost_head, kind_of
from .registry import facts_of, family_of
from .settings import PatchOptions
from .state import PatchState
from .swap import STATE

Model = TypeVar("Model", bound=nn.Module)


class Refusal(NamedTuple):
    """Why a model is stock although it was to be fused, and the options that it was to have."""

    reason: str
    options: PatchOptions


_refusals: weakref.WeakKeyDictionary[nn.Module, Refusal] = weakref.WeakKeyDictionary()
"""The refusals of stock models, which carry no trace of one themselves."""


def apply_patch(
    model: Model,
    *,
    impl: str = "auto",
    memory_budget_mib: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    stats: Sequence[str] = (),
    strict: bool = True,
) -> Model:
    """Makes a causal language model compute its loss inside its head, without logits.

    `model(..., labels=labels)` then returns the stock loss and the stock gradients. Without labels
    the forward is the stock one. Called again, it takes the new options.

    Every pass with labels is held to a loss out of the head, whatever is done to the model later:
    another head is taken over, a forward that somebody puts on the instance or the class runs
    inside ours, and where the loss then comes from elsewhere `strict` decides.

    Args:
        model: A transformers model, plain or inside PEFT, torch.compile, DDP or FSDP2.
        impl: "auto", "triton", "torch" or "reference".
        memory_budget_mib: Largest workspace of the loss; default 1024.
        label_smoothing: Share of the target that is spread over the vocabulary, 0 to 1.
        z_loss: Factor on the squared log-sum-exp of each token that counts.
        stats: Which of "accuracy" and "entropy" `last_stats` shall tell of every forward.
        strict: Raise if the model cannot be fused, now or in a later pass; False warns once and
            leaves it stock. `FusedHeadTrainer` checks every step as well.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: If the model cannot be fused. What only a forward can tell is raised
            by the first forward with labels, which leaves the model stock.
        ValueError: If an option is out of range.
    """
    options = PatchOptions(
        impl, memory_budget_mib, label_smoothing, z_loss, _checked_stats(stats), strict
    )
    LossOptions(label_smoothing=label_smoothing, z_loss=z_loss)
    if impl not in get_args(Impl):
        raise ValueError(
            f"`impl` must be one of {get_args(Impl)}, got {impl!r}: 'auto' picks a fitting one"
        )
    if memory_budget_mib is not None and not memory_budget_mib > 0:
        raise ValueError(
            f"`memory_budget_mib` must be positive or None, got {memory_budget_mib!r}: None means "
            "the default"
        )
    try:
        target = _patchable(model)
    except UnsupportedModelError as error:
        if strict:
            raise
        _refuse_mildly(neighbours.unwrapped(model), error, options)
        return model
    state = target.__dict__.get(STATE) or PatchState(options)
    state.options = state.own_options = options
    _refusals.pop(target, None)
    _adopt_model(target, state)
    return model


def remove_patch(model: Model) -> Model:
    """Gives back exactly the model that came in; does nothing to a stock one.

    Args:
        model: What `apply_patch` was given, or what it has been wrapped into since.

    Returns:
        The same object.
    """
    target = neighbours.unwrapped(model)
    if isinstance(target, nn.Module):
        _refusals.pop(target, None)
        for module in list(swap.swapped_modules(target)):
            neighbours.decompose(module)
            swap.restore(module)
    return model


@contextlib.contextmanager
def patched(
    model: Model,
    *,
    impl: str = "auto",
    memory_budget_mib: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    stats: Sequence[str] = (),
    strict: bool = True,
) -> Iterator[Model]:
    """`apply_patch` for the time of a `with` block; undone also after an exception.

    A model that was patched before gets its former options back. Takes the arguments of
    `apply_patch` and yields the model.
    """
    target = neighbours.unwrapped(model)
    state = target.__dict__.get(STATE) if isinstance(target, nn.Module) else None
    former = None if state is None else (state.options, state.own_options)
    apply_patch(
        model,
        impl=impl,
        memory_budget_mib=memory_budget_mib,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        stats=stats,
        strict=strict,
    )
    try:
        yield model
    finally:
        if state is not None and former is not None and STATE in target.__dict__:
            state.options, state.own_options = former
        else:
            remove_patch(model)


def last_stats(model: nn.Module) -> LossStats | None:
    """Statistics of the last fused forward, detached.

    Args:
        model: A patched model.

    Returns:
        Those that `apply_patch(stats=...)` asked for beside the loss; None before the first fused
        forward and where nothing was asked for.
    """
    state = state_of(model)
    return None if state is None or state.stats is None else LossStats(*state.stats)  # type: ignore[arg-type]


def state_of(model: nn.Module) -> PatchState | None:
    """The state of a patched model, through its wrappers; None for a stock one."""
    target = neighbours.unwrapped(model)
    return target.__dict__.get(STATE) if isinstance(target, nn.Module) else None


def refusal_of(model: nn.Module) -> Refusal | None:
    """Why this stock model was refused; None where it was not."""
    return _refusals.get(neighbours.unwrapped(model))


def options_of(model: nn.Module) -> PatchOptions:
    """What `apply_patch` was last called with, also where it left the model stock.

    Args:
        model: Any model; one that `apply_patch` was never called on has the default options.
    """
    state, refusal = state_of(model), refusal_of(model)
    if state is not None:
        return state.own_options
    return PatchOptions() if refusal is None else refusal.options


def patch_for_trainer(model: Model, options: PatchOptions, label_smoothing: float) -> Model:
    """`apply_patch` with a smoothing that is the trainer's and not one of the model's options.

    Args:
        model: As for `apply_patch`.
        options: What `options_of` gives afterwards.
        label_smoothing: Used by forwards instead of `options.label_smoothing`.
    """
    apply_patch(model, **asdict(replace(options, label_smoothing=label_smoothing)))
    state = state_of(model)
    if state is not None:
        smoothing = options.label_smoothing
        state.own_options = replace(state.options, label_smoothing=smoothing)
    return model


def static_obstacle(target: Any) -> str | None:
    """Why a model cannot be fused, as far as can be told without a forward."""
    name = type(target).__name__
    if not isinstance(target, PreTrainedModel):
        return f"{name} is no transformers model: pass the model itself or a known wrapper of it"
    head = target.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return f"{name} has no output embeddings: load it with its language modelling head"
    forwards = (c.__dict__["forward"] for c in type(target).__mro__ if "forward" in c.__dict__)
    if not any("labels" in inspect.signature(forward).parameters for forward in forwards):
        return f"the forward of {name} takes no labels"
    rival = neighbours.rival_of(target)
    if rival is not None:
        return rival
    loss_function = target.loss_function
    if not causal_convention(loss_function):
        spelled = getattr(loss_function, "__qualname__", repr(loss_function))
        return (
            f"its loss function is {spelled}, not a cross-entropy of transformers: unset "
            "model.loss_function or leave the model stock"
        )
    return neighbours.instance_forward_obstacle(target, name, True) or head_obstacle(head)


def head_obstacle(head: nn.Module) -> str | None:
    """Why a head's forward cannot be taken over."""
    inner = innermost_head(head)
    name = f"the head ({type(inner).__name__})"
    return neighbours.instance_forward_obstacle(inner, name, False)


def _checked_stats(stats: Sequence[str]) -> tuple[str, ...]:
    names = (stats,) if isinstance(stats, str) else tuple(stats)
    unknown = [name for name in names if name not in STAT_NAMES]
    if unknown:
        raise ValueError(
            f"`stats` must name some of {STAT_NAMES}, got {unknown[0]!r}: leave it out"
        )
    return names


def _patchable(model: Any) -> PreTrainedModel:
    target = neighbours.unwrapped(model)
    obstacle = static_obstacle(target)
    if obstacle is not None:
        raise UnsupportedModelError(f"this model cannot be fused: {obstacle}")
    return cast(PreTrainedModel, target)


def _refuse_mildly(target: nn.Module, error: UnsupportedModelError, options: PatchOptions) -> None:
    if isinstance(target, nn.Module):
        _refusals[target] = Refusal(str(error), options)
    warnings.warn(f"{type(target).__name__} stays stock: {error}", UserWarning, stacklevel=3)


def _head_of(model: Any) -> nn.Module:
    return innermost_head(model.get_output_embeddings())


def _adopt(head: nn.Module, state: PatchState) -> None:
    """Makes `head` answer the calls of `state`."""
    adopted = head.__dict__.get(STATE) is state and swap.swapped_class(type(head)) is not None
    if adopted and (torch.compiler.is_compiling() or "forward" not in head.__dict__):
        return
    if torch.compiler.is_compiling():
        raise UnsupportedModelError(
            "the head was replaced since apply_patch: call apply_patch again before torch.compile"
        )
    obstacle = head_obstacle(head)
    if obstacle is not None:
        raise UnsupportedModelError(f"this model cannot be fused: {obstacle}")
    swap.swap(head, fused_head_class, state)
    neighbours.compose(head, _answer)


def _answer(
    head: Any,
    state: PatchState,
    stock: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The forward of a head that has one on the instance, tensor parallelism's, `stock`."""
    call = state.current()
    if call is None or call.head is not head:
        return stock(*args, **kwargs)
    base = type(head)._fused_base
    return call.answer(kind_of(base), base.forward, args, kwargs)


@functools.cache
def fused_model_class(base: type) -> type:
    """`base` with a forward that opens a call, and a loss function that hands its loss back."""
    stock_loss_function = base.loss_function.fget

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = getattr(self, STATE, None)
        stock = functools.partial(base.forward, self)
        if state is None:
            return stock(*args, **kwargs)
        return _run(self, state, stock, args, kwargs)

    def loss_function(self: Any) -> Any:
        state = getattr(self, STATE, None)
        call = None if state is None else state.current()
        return stock_loss_function(self) if call is None else call.hand_back

    def set_attribute(self: Any, name: str, value: Any) -> None:
        cast(Any, base).__setattr__(self, name, value)
        # Whoever puts a forward on the instance, after the patch, shadows ours.
        if name == "forward" and STATE in self.__dict__:
            neighbours.compose(self, _run)

    namespace = {
        "forward": swap.method_like(base.forward, forward),
        "loss_function": property(loss_function, base.loss_function.fset),
        "__setattr__": set_attribute,
        "_fused_labels": _positions(base.forward),
        "_fused_maker": fused_model_class,
    }
    return swap.make_subclass(base, namespace)


@functools.cache
def fused_head_class(base: type) -> type:
    """`base` with a forward that answers an open call with the loss."""
    kind = kind_of(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = getattr(self, STATE, None)
        call = None if state is None else state.current()
        if call is None or call.head is not self:
            return base.forward(self, *args, **kwargs)
        return call.answer(kind, base.forward, args, kwargs)

    namespace = {
        "forward": swap.method_like(base.forward, forward),
        "_fused_maker": fused_head_class,
    }
    return swap.make_subclass(base, namespace)


def _positions(forward: Callable[..., Any]) -> dict[str, int]:
    """Where a forward takes the arguments of the loss, `self` not counted."""
    names = list(inspect.signature(forward).parameters)[1:]
    return {name: names.index(name) for name in LossArguments._fields if name in names}


def _loss_arguments(
    positions: dict[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LossArguments | None:
    """What the forward was given for its loss; None without labels."""
    found = {}
    for name in LossArguments._fields:
        value = kwargs.get(name)
        if name in positions and positions[name] < len(args):
            value = args[positions[name]]
        if value is not None:
            found[name] = value
    return LossArguments(**found) if "labels" in found else None


def _run(
    model: Any,
    state: PatchState,
    stock: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The stock forward, inside a call where there are labels and none is open already."""
    arguments = _loss_arguments(type(model)._fused_labels, args, kwargs)
    if arguments is None:
        return stock(*args, **kwargs)
    if torch.compiler.is_compiling():
        return _open(model, state, arguments).run(stock, args, kwargs)
    try:
        return _open(model, state, arguments).run(stock, args, kwargs)
    except UnsupportedModelError as error:
        # A compiler that broke its graph here would go on to compile the way back to stock.
        refused: Any = torch.compiler.disable(_refused)
        return refused(model, state, error, stock, args, kwargs)


def _refused(
    model: Any,
    state: PatchState,
    error: UnsupportedModelError,
    stock: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Any,
) -> Any:
    """Leaves the model stock; raises, or returns its stock output where the patch is not strict."""
    remove_patch(model)
    if isinstance(error, RowCountError):
        _let_stock_complain(model, state, stock, args, kwargs)
    if state.options.strict or kwargs.get("past_key_values") is not None:
        _refusals[model] = Refusal(str(error), state.own_options)
        raise error
    _refuse_mildly(model, error, state.own_options)
    return stock(*args, **kwargs)


def _let_stock_complain(
    model: Any, state: PatchState, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
) -> None:
    """Lets stock's own error out, and the patch stay, where the caller's shapes are wrong."""
    mistaken = True
    try:
        stock(*args, **kwargs)
        mistaken = False
    finally:
        if mistaken:
            _adopt_model(model, state)


def _adopt_model(model: Any, state: PatchState) -> None:
    """Swaps the classes of the model and of its head."""
    swap.swap(model, fused_model_class, state)
    neighbours.compose(model, _run)
    _adopt(_head_of(model), state)


def _stock_loss_function(model: Any) -> Any:
    """`model.loss_function`, without the warning at an unknown type where the compiler traces.

    It cannot trace a logger; apply_patch has read the property, with the warning, before.
    """
    by_type = not hasattr(model, "_loss_function") and model.loss_type not in LOSS_MAPPING
    return ForCausalLMLoss if by_type and torch.compiler.is_compiling() else model.loss_function


def _open(model: Any, state: PatchState, arguments: LossArguments) -> Call:
    rival = None if torch.compiler.is_compiling() else neighbours.rival_of(model)
    if rival is not None:
        raise UnsupportedModelError(f"this model cannot be fused any more: {rival}")
    head = _head_of(model)
    _adopt(head, state)
    neighbours.refuse_backward_hooks(head)
    outer = state.current()
    # Inside a call, of a wrapper around this forward, the property gives what hands its loss back.
    loss_function = _stock_loss_function(model) if outer is None else outer.loss_function
    if not causal_convention(loss_function):
        spelled = getattr(loss_function, "__qualname__", repr(loss_function))
        raise UnsupportedModelError(
            f"model.loss_function must be a cross-entropy of transformers, got {spelled}: unset it "
            "or leave the model stock (remove_patch)"
        )
    facts = facts_of(model, family_of(model))
    if facts.own_loss == "CrossEntropyLoss" and torch.compiler.is_compiling():
        # The compiler puts this module into its graph by itself, with nothing but tensors.
        raise UnsupportedModelError(
            "the model's class calls `CrossEntropyLoss` itself, which torch.compile does not let "
            "the fused head take over: compile without fullgraph=True, or leave this model stock "
            "(remove_patch)"
        )
    replica = getattr(model, "_is_replica", False)
    return Call(state, head, arguments, loss_function, facts, replica)
