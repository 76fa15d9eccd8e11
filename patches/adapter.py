"""`apply_patch` and back: the stock forward runs, and its head computes the loss.

The model's and the head's class are swapped on the instance (class_swap.py). A forward with labels
becomes a fused forward (model_forward.py, fused_forward.py): the head computes the loss in the
place of logits (heads.py) and returns a proxy that records what the model does to it
(logits_proxy.py); the model's own loss function then returns the loss, if the record is what the
family's facts say (registry.py). Without labels nothing of this happens.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar, cast, get_args

from torch import nn
from transformers import PreTrainedModel

from hf_fused_head.functional import STAT_NAMES, LossStats
from hf_fused_head.options import Impl, LossOptions

from . import class_swap, wrappers
from .class_swap import STATE
from .eligibility import (
    forget_refusal,
    option_obstacle,
    refusal_of,
    refuse_mildly,
    static_obstacle,
    stock_loss_function,
)
from .errors import UnsupportedModelError
from .model_forward import adopt_head, loss_function_of, run_model, unpatch
from .running import class_layer
from .settings import PatchOptions
from .state import PatchState

Model = TypeVar("Model", bound=nn.Module)


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
    """Makes a language model compute its loss inside its head, without logits.

    The model is causal, masked or sequence-to-sequence: labels are shifted as the stock one does.

    `model(..., labels=labels)` then returns the stock loss and the stock gradients. Without labels
    the forward is the stock one. Called again, it takes the new options.

    Every forward with labels must take its loss out of the head, whatever is done to the model
    later: another head is taken over; a forward that is put on the instance, on the class or
    on the head's class runs inside ours; a loss function that is replaced, also in a module
    of transformers or torch, is refused, and so is an active `TorchFunctionMode` from outside of
    torch, which may replace it. A forward that renames or makes its labels is fused where they
    reach the forward of transformers below it, and refused where its loss comes from elsewhere. In
    training a forward without labels warns once, as does a call of the head by itself: a loss from
    its logits is not fused.

    Args:
        model: A transformers model, plain or inside PEFT, torch.compile, DDP or FSDP2.
        impl: "auto", "triton", "torch" or "reference". A head that is not taken apart (DoRA,
            quantised, a module of your own) runs its own forward, on chunks of tokens for "auto"
            and "torch", on all tokens at once for "reference"; "triton" is refused.
        memory_budget_mib: Largest workspace of the loss; default 1024.
        label_smoothing: Share of the target that is spread over the vocabulary, 0 to 1. As the
            smoothing of the Trainer it obeys `num_items_in_batch`, also where the model's own loss
            does not.
        z_loss: Factor on the squared log-sum-exp of each token that counts.
        stats: Which of "accuracy" and "entropy" `last_stats` shall tell of every forward.
        strict: Raise if the model cannot be fused, now or in a later pass; False warns once and
            leaves it stock. `FusedHeadTrainer` checks every step as well.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: If the model cannot be fused. What only a forward can tell is raised
            by the first forward with a loss, which leaves the model stock.
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
        target = _patchable(model, options)
    except UnsupportedModelError as error:
        if strict:
            raise
        refuse_mildly(wrappers.unwrapped(model), error, options)
        return model
    state = target.__dict__.get(STATE) or PatchState(options)
    state.options = state.own_options = options
    forget_refusal(target)
    _adopt_model(target, state)
    return model


def remove_patch(model: Model) -> Model:
    """Gives back exactly the model that came in; does nothing to a stock one.

    Args:
        model: What `apply_patch` was given, or what it has been wrapped into since.

    Returns:
        The same object.
    """
    for target in map(wrappers.unwrapped, wrappers.with_original(model)):
        if isinstance(target, nn.Module):
            forget_refusal(target)
            unpatch(target)
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
    target = wrappers.unwrapped(model)
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
        forward, where nothing was asked for, and after one of TRL's, whose output has them.
    """
    state = state_of(model)
    return None if state is None or state.stats is None else LossStats(*state.stats)  # type: ignore[arg-type]


def state_of(model: nn.Module) -> PatchState | None:
    """The state of a patched model, through its wrappers; None for a stock one."""
    target = wrappers.unwrapped(model)
    return target.__dict__.get(STATE) if isinstance(target, nn.Module) else None


def options_of(model: nn.Module) -> PatchOptions:
    """What `apply_patch` was last called with, also where it left the model stock.

    Args:
        model: Any model; one that `apply_patch` was never called on has the default options.
    """
    state, refusal = state_of(model), refusal_of(model)
    if state is not None:
        return state.own_options
    return PatchOptions() if refusal is None else refusal.options


def check_keywords(argument: str, options: Mapping[str, Any]) -> None:
    """Refuses options that `apply_patch` does not take.

    Args:
        argument: What they were passed as, for the message.
        options: By name.

    Raises:
        TypeError: If one is unknown.
    """
    known = inspect.signature(apply_patch).parameters.keys() - {"model"}
    for key in options:
        if key not in known:
            raise TypeError(
                f"`{argument}` must hold keywords of apply_patch, got {key!r}: "
                f"choose from {', '.join(sorted(known))}"
            )


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


def _checked_stats(stats: Sequence[str]) -> tuple[str, ...]:
    names = (stats,) if isinstance(stats, str) else tuple(stats)
    unknown = [name for name in names if name not in STAT_NAMES]
    if unknown:
        raise ValueError(
            f"`stats` must name some of {STAT_NAMES}, got {unknown[0]!r}: leave it out"
        )
    return names


def _patchable(model: Any, options: PatchOptions) -> PreTrainedModel:
    target = wrappers.unwrapped(model)
    obstacle = static_obstacle(target) or option_obstacle(target, options)
    if obstacle is not None:
        raise UnsupportedModelError(f"this model cannot be fused: {obstacle}")
    return cast(PreTrainedModel, target)


@functools.cache
def fused_model_class(base: type) -> type:
    """`base` with a forward that opens calls, and a loss function that returns their loss.

    A subclass outside transformers may give its labels to the forward below it under another name.
    That forward is taken over too, by a class between the two.
    """

    def loss_function(self: Any) -> Any:
        state = getattr(self, STATE, None)
        return stock_loss_function(self) if state is None else loss_function_of(self, state)

    def set_loss_function(self: Any, value: Any) -> None:
        found = base.loss_function
        if isinstance(found, property):
            found.__set__(self, value)
        else:
            self.__dict__["loss_function"] = value

    def set_attribute(self: Any, name: str, value: Any) -> None:
        cast(Any, base).__setattr__(self, name, value)
        # Whoever puts a forward on the instance, after the patch, shadows ours.
        if name == "forward" and STATE in self.__dict__:
            wrappers.compose(self, run_model)

    namespace = {
        "forward": _layered_forward("class", base),
        "loss_function": property(loss_function, set_loss_function),
        "__setattr__": set_attribute,
        "_fused_maker": fused_model_class,
    }
    defining = next((c for c in base.__mro__ if _defines_forward(c)), base)
    below = () if defining is base else (_layer_below(defining),)
    return class_swap.make_subclass(base, namespace, below)


@functools.cache
def _layer_below(base: type) -> type:
    """A class that comes right before `base` in the order of inheritance, with its forward."""
    looks = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    namespace = {**looks, "forward": _layered_forward("transformers", base)}
    return type(base)(base.__name__, (base,), namespace)


def _layered_forward(name: str, base: type) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = getattr(self, STATE, None)
        stock = functools.partial(base.forward, self)
        if state is None:
            return stock(*args, **kwargs)
        return run_model(self, state, stock, args, kwargs, class_layer(name, base.forward))

    return class_swap.method_like(base.forward, forward)


def _defines_forward(cls: type) -> bool:
    return "forward" in cls.__dict__ and cls.__module__.partition(".")[0] == "transformers"


def _adopt_model(model: Any, state: PatchState) -> None:
    """Swaps the classes of the model and of its head."""
    class_swap.swap(model, fused_model_class, state)
    _follow(class_swap.swapped_class(type(model)))
    wrappers.compose(model, run_model)
    adopt_head(model, state)


def _follow(ours: Any) -> None:
    """Takes over what was replaced on the stock class since ours was derived from it."""
    base = ours._fused_base
    ours._fused_loss_property = base.loss_function
    ours._fused_loss_getter = base.loss_function.fget
    ours.__dict__["forward"].__signature__ = inspect.signature(base.forward)
