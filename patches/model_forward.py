"""What happens when a patched model is called: with labels a call is opened, without it is stock.

Where labels reach the model under another name or are made inside it, the loss is still taken out
of the head if a layer below (running.py) gets them as `labels`. A loss that comes from elsewhere is
noticed by what the forward asks for and by what it returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import class_swap, wrappers
from .class_swap import STATE
from .eligibility import (
    check_loss,
    head_obstacle,
    refuse_mildly,
    remember_refusal,
    stock_loss_function,
)
from .errors import RowCountError, UnsupportedModelError
from .fused_forward import FusedForward
from .heads import innermost_head, kind_of
from .registry import facts_of, family_of
from .running import Layer, LossArguments, RunningForward
from .state import PatchState
from .token_forward import TokenForward
from .trl import FusedLMHead, TokenRequest, casts_to_float32

Forward = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def run_model(
    model: Any, state: PatchState, stock: Forward, args: Args, kwargs: Kwargs, layer: Layer
) -> Any:
    """A forward of the model at one of its layers.

    Args:
        model: The patched model.
        state: Its state.
        stock: The forward below this layer.
        args: What it is called with.
        kwargs: What it is called with.
        layer: The layer.
    """
    if layer.trl_head is not None and kwargs.get("fused_lm_head"):
        return _run_for_tokens(model, state, stock, args, kwargs, layer)
    arguments = layer.loss_arguments(args, kwargs)
    if arguments is None:
        return _run_without_labels(model, state, stock, args, kwargs, layer)
    call = state.current()
    if call is not None and not call.entered(layer.name) and call.given.same_as(arguments):
        return stock(*args, **kwargs)
    if torch.compiler.is_compiling():
        return _open(model, state, arguments, layer).run(state.running, stock, args, kwargs)
    try:
        return _open(model, state, arguments, layer).run(state.running, stock, args, kwargs)
    except UnsupportedModelError as error:
        # A compiler that broke its graph here would compile the way back to stock next.
        refused: Any = torch.compiler.disable(_refused)
        return refused(model, state, error, stock, args, kwargs)


def _run_for_tokens(
    model: Any, state: PatchState, stock: Forward, args: Args, kwargs: Kwargs, layer: Layer
) -> Any:
    """A forward in which TRL asks for values per token; `stock` runs TRL's wrapper too."""
    request = TokenRequest.of(cast(FusedLMHead, layer.trl_head), kwargs)
    if torch.compiler.is_compiling():
        call = _open(model, state, request, layer)
        return call.run(state.running, stock, args, request.stock_keywords(kwargs))
    try:
        if request.head.runs_another(model):
            raise UnsupportedModelError(
                "a copy of a model with TRL's fused head runs the forward of the original: put "
                "TRL's head on the copy anew, or leave the copy stock (remove_patch)"
            )
        call = _open(model, state, request, layer)
        return call.run(state.running, stock, args, request.stock_keywords(kwargs))
    except UnsupportedModelError as error:
        return _refused(model, state, error, stock, args, kwargs)


def loss_function_of(model: Any, state: PatchState) -> Any:
    """What a forward of the model gets for its loss function."""
    call = state.current()
    if call is not None:
        return call.return_loss
    running = state.innermost()
    if running is not None and not running.accounted:
        running.accounted = True
        _refuse_outside(model, state)
    return stock_loss_function(model)


def unpatch(model: nn.Module) -> None:
    """Gives the modules of a model the classes and forwards back that they came with."""
    for module in list(class_swap.swapped_modules(model)):
        wrappers.decompose(module)
        class_swap.restore(module)


def adopt_head(model: Any, state: PatchState) -> nn.Module:
    """The model's head, which returns the loss in the calls of `state`."""
    head = innermost_head(model.get_output_embeddings())
    adopted = head.__dict__.get(STATE) is state and class_swap.swapped_class(type(head)) is not None
    if adopted and (torch.compiler.is_compiling() or "forward" not in head.__dict__):
        return head
    if torch.compiler.is_compiling():
        raise UnsupportedModelError(
            "the head was replaced since apply_patch: call apply_patch again before torch.compile"
        )
    obstacle = head_obstacle(head)
    if obstacle is not None:
        raise UnsupportedModelError(f"this model cannot be fused: {obstacle}")
    class_swap.swap(head, fused_head_class, state)
    wrappers.compose(head, _run_head)
    return head


@functools.cache
def fused_head_class(base: type) -> type:
    """`base` with a forward that returns the loss to an open call."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = getattr(self, STATE, None)
        if state is not None and state.opened_outside():
            return outside(self, *args, **kwargs)
        call = None if state is None else state.current()
        if call is None or call.head is not self:
            output = base.forward(self, *args, **kwargs)
            _check_lone_output(self, state, output)
            return output
        return call.compute_loss(kind_of(base), base.forward, args, kwargs)

    # A head that is compiled alone: its loss comes from one operator, which gains nothing by that.
    outside = torch.compiler.disable(
        forward,
        reason="a fused head that is compiled by itself computes its loss outside of its graph: "
        "compile the head without fullgraph=True, or the whole model",
    )
    namespace = {
        "forward": class_swap.method_like(base.forward, forward),
        "_fused_maker": fused_head_class,
    }
    return class_swap.make_subclass(base, namespace)


def _check_lone_output(head: nn.Module, state: PatchState | None, output: Any) -> None:
    """Notices, in training, logits that are made outside of every forward of the model."""
    # Inside a compiled head the forward of the model around it does not show.
    if state is None or torch.compiler.is_compiling() or state.innermost() is not None:
        return
    if head.training and torch.is_grad_enabled() and _requires_grad(output):
        _note_unfused(
            state,
            f"the head ({type(head).__name__}) was called in training outside of its model's "
            "forward, so a loss from its logits is not fused: call the model itself, not its "
            "head or the forward of its class, with `labels`",
        )


def _run_head(
    head: Any, state: PatchState, stock: Forward, args: Args, kwargs: Kwargs, layer: Layer
) -> Any:
    """The forward of a head that has one on the instance: tensor parallelism's, or TRL's cast."""
    del layer
    call = state.current()
    if call is None or call.head is not head:
        return stock(*args, **kwargs)
    base = type(head)._fused_base
    if casts_to_float32(stock, head):
        args = tuple(hidden.float() for hidden in args)
    return call.compute_loss(kind_of(base), base.forward, args, kwargs)


def _open(
    model: Any, state: PatchState, arguments: LossArguments | TokenRequest, layer: Layer
) -> FusedForward:
    conflict = None if torch.compiler.is_compiling() else wrappers.conflicting_patch(model)
    if conflict is not None:
        raise UnsupportedModelError(f"this model cannot be fused any more: {conflict}")
    head = adopt_head(model, state)
    wrappers.refuse_backward_hooks(head)
    loss_function = stock_loss_function(model)
    check_loss(loss_function)
    facts = facts_of(model, family_of(model))
    if facts.own_loss == "CrossEntropyLoss" and torch.compiler.is_compiling():
        # The compiler puts this module into its graph by itself, with nothing but tensors.
        raise UnsupportedModelError(
            "the model's class calls `CrossEntropyLoss` itself, which torch.compile does not let "
            "the fused head take over: compile without fullgraph=True, or leave this model stock "
            "(remove_patch)"
        )
    replica = getattr(model, "_is_replica", False)
    if isinstance(arguments, TokenRequest):
        return TokenForward(
            arguments, model, state, head, loss_function, facts, replica, layer.name
        )
    return FusedForward(state, head, arguments, loss_function, facts, replica, layer.name)


def _refused(
    model: Any,
    state: PatchState,
    error: UnsupportedModelError,
    stock: Forward,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    """Leaves the model stock; raises, or returns its stock output where the patch is not strict."""
    if isinstance(error, RowCountError):
        _let_stock_raise(model, stock, args, kwargs)
    unpatch(model)
    if state.options.strict or kwargs.get("past_key_values") is not None:
        remember_refusal(model, error, state.own_options)
        raise error
    refuse_mildly(model, error, state.own_options)
    return stock(*args, **kwargs)


def _let_stock_raise(model: nn.Module, stock: Forward, args: Args, kwargs: Kwargs) -> None:
    """Lets stock's own error out, and the patch stay, where the caller's shapes are wrong."""
    patched = [module for module in model.modules() if STATE in module.__dict__]
    states = [module.__dict__.pop(STATE) for module in patched]
    mistaken = True
    try:
        stock(*args, **kwargs)
        mistaken = False
    finally:
        if mistaken:
            for module, state in zip(patched, states, strict=True):
                module.__dict__[STATE] = state


def _run_without_labels(
    model: Any, state: PatchState, stock: Forward, args: Args, kwargs: Kwargs, layer: Layer
) -> Any:
    """The stock forward; inside a call only where the model was called anew, by a hook."""
    if layer.redirected:
        _note_unfused(
            state,
            f"a trainer of TRL runs in the place of the forward of {type(model).__name__}, so a "
            "loss that it computes from the head's weight is not fused: train it without the patch",
        )
        return stock(*args, **kwargs)
    outer = state.innermost()
    if outer is not None and not outer.entered(layer.name):
        return stock(*args, **kwargs)
    running = RunningForward(layer.name, outer)
    output = running.run(state.running, stock, args, kwargs)
    # A refusal inside has left the model stock.
    if STATE in model.__dict__ and not (running.accounted or running.delegated):
        _check_stock_output(model, state, output, outermost=outer is None)
    return output


def _check_stock_output(model: Any, state: PatchState, output: Any, outermost: bool) -> None:
    """Notices a loss that was computed outside the head, or that is going to be."""
    trains = outermost and model.training and torch.is_grad_enabled()
    if _has_loss(output):
        _refuse_outside(model, state)
    elif trains and _requires_grad(output):
        _note_unfused(
            state,
            f"{type(model).__name__} was called in training without labels, so a loss from its "
            "logits is not fused: pass `labels` to the model; where a Trainer takes them away to "
            "smooth them, use FusedHeadTrainer, or label_smoothing= of apply_patch; where "
            "compute_loss_func does, leave it out",
        )


def _refuse_outside(model: Any, state: PatchState) -> None:
    """A loss outside the head is an error, or a warning where the patch is not strict."""
    reason = (
        f"the loss of {type(model).__name__} must be computed in its head, got a loss from "
        "elsewhere in a forward without `labels`: pass them to the model by that name, or leave it "
        "stock (remove_patch)"
    )
    if not state.options.strict:
        _note_unfused(state, reason)
        return
    error = UnsupportedModelError(reason)
    if not torch.compiler.is_compiling():
        leave: Any = torch.compiler.disable(_leave_stock)
        leave(model, state, error)
    raise error


def _leave_stock(model: nn.Module, state: PatchState, error: UnsupportedModelError) -> None:
    unpatch(model)
    remember_refusal(model, error, state.own_options)


def _note_unfused(state: PatchState, reason: str) -> None:
    state.last_loss = f"not fused: {reason}"
    state.warn_once(reason)


def _has_loss(output: Any) -> bool:
    if isinstance(output, (tuple, Tensor)):
        first = output[0] if isinstance(output, tuple) and output else output
        return isinstance(first, Tensor) and first.dim() == 0
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return isinstance(loss, Tensor)


def _requires_grad(output: Any) -> bool:
    values = tuple(output.values()) if isinstance(output, dict) else output
    values = values if isinstance(values, tuple) else (values,)
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)
