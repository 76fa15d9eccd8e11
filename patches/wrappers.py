"""Wrappers and patches of other libraries: which are followed, which are refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .class_swap import STATE, is_bound_forward, is_fused_forward, swapped_class
from .errors import UnsupportedModelError
from .origin import module_of, name_of
from .running import Layer, positions
from .tensor_parallel import gathers_logits
from .trl import (
    FusedLMHead,
    casts_to_float32,
    fused_lm_head,
    is_fused_lm_head,
    is_redirection,
)

# Their forwards compute another loss in the place of the stock one, on the class or the instance.
# A package counts with those whose names begin with its own: unsloth_compiled_module_llama.
_CONFLICTING = {
    "liger_kernel": "load the model without use_liger_kernel and apply_liger_kernel_to_*, then "
    "apply_patch",
    "cut_cross_entropy": "leave out cce_patch, then apply_patch",
    "unsloth": "load the model with transformers instead of FastLanguageModel, then apply_patch",
    # A head of TRL that is_fused_lm_head does not know.
    "trl": "install a TRL with the fused head of 1.16, train with FusedHeadTrainer, or leave this "
    "model stock (remove_patch), with TRL's own head",
    "axolotl": "leave out the cut_cross_entropy plugin, then apply_patch",
}
# Their wrappers call the forward that they wrapped with the arguments that they were given.
_TRANSPARENT = ("accelerate", "torch")
_MAX_WRAPPERS = 100


class ComposedForward:
    """A forward on the instance, where a class swap does not reach, inside ours.

    accelerate's mixed precision puts the model's forward there, wrapped in autocast, before the
    patch or after it, and transformers' tensor parallelism the head's, between a split and a
    gathering. It stays in use, as `inner`, and comes back with `remove_patch`. Whatever it is, a
    pass with labels through it is held to a loss out of the head.
    """

    def __init__(
        self, model: nn.Module, inner: Callable[..., Any], run: Callable[..., Any]
    ) -> None:
        self.model = model
        self.inner = inner
        self.run = run
        # Several may lie around each other.
        # TRL's is read here, since the compiler cannot read a closure that it runs later.
        name, head = f"instance {id(self)}", trl_head(inner)
        self.layer = Layer(name, positions(inner), head, is_redirection(inner))

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self.model.__dict__.get(STATE)
        if state is None:
            return self.inner(*args, **kwargs)
        return self.run(self.model, state, self.inner, args, kwargs, self.layer)


def unwrapped(model: Any) -> nn.Module:
    """The model inside torch.compile, PEFT, DDP, DeepSpeed and FSDP1 wrappers."""
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        inner = _inside(model)
        if inner is None:
            break
        model = inner
    return model


def with_original(model: Any) -> tuple[Any, ...]:
    """The model and, of a copy by accelerate's `compile_regions`, what it shares its state with."""
    original = getattr(model, "__dict__", {}).get("_orig_mod")
    return (model,) if original is None else (model, original)


def _inside(model: Any) -> Any:
    children = model._modules
    if "_orig_mod" in children:
        return children["_orig_mod"]
    if "_fsdp_wrapped_module" in children:
        return children["_fsdp_wrapped_module"]
    is_peft = any(cls.__module__.split(".")[0] == "peft" for cls in type(model).__mro__)
    if is_peft and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return children.get("module")


def conflicting_patch(model: nn.Module) -> str | None:
    """Why the model's forward is no stock forward any more, with the remedy; None when it is."""
    ours = swapped_class(type(model))
    # Ours calls the forward that its base has at the time.
    below = [] if ours is None else _chain(ours.__dict__["_fused_base"].forward)
    for function in (*_chain(model.forward), *below):
        remedy = _conflict_remedy(function)
        if remedy is not None:
            return (
                f"its forward was replaced by {module_of(function)}, which computes a loss of its "
                f"own: {remedy}"
            )
    return None


def _conflict_remedy(function: Any) -> str | None:
    package = module_of(function).partition(".")[0]
    if package in ("transformers", *_TRANSPARENT) or is_fused_lm_head(function):
        return None
    for conflict, remedy in _CONFLICTING.items():
        if package == conflict or package.startswith(f"{conflict}_"):
            return remedy
    return None


def instance_forward_obstacle(module: nn.Module, name: str, composable: bool) -> str | None:
    """Why a forward on the instance is in the way; None when it is not or there is none.

    Args:
        module: The model or its head.
        name: For the message.
        composable: `compose` can put ours around wrappers that do not lead to ours.
    """
    forward = module.__dict__.get("forward")
    if forward is None or isinstance(forward, ComposedForward) or has_device_hook(module):
        return None
    if is_bound_forward(module, forward) or gathers_logits(forward, module):
        return None
    if casts_to_float32(forward, module):
        return None
    owner = type(module).__mro__
    own = [c.__dict__["forward"] for c in owner if "forward" in c.__dict__]
    chain = _chain(forward)
    if hasattr(forward, "_torchdynamo_orig_callable") and not any(map(is_fused_forward, chain)):
        return (
            f"the stock forward of {name} was compiled by itself: use .compile() of the module, or "
            "apply_patch before torch.compile"
        )
    for function in chain:
        if _is_ours(function) or (composable and function in own):
            return None
        if not composable or not (_is_transparent(function) or is_fused_lm_head(function)):
            remedy = "apply_patch before that" if composable else "take it off"
            return (
                f"there is a forward on {name}, {name_of(function)}: {remedy}, or leave "
                "this model stock"
            )
    return f"there is a forward on {name} that does not lead to its class's forward"


def runs_ours(model: nn.Module) -> bool:
    """Whether calling the model still reaches the fused forward."""
    if has_device_hook(model):
        return _is_ours(model.__dict__["_old_forward"])
    return any(_is_ours(function) for function in _chain(model.forward))


def trl_head(forward: Any) -> FusedLMHead | None:
    """TRL's fused head under a forward; None where there is none."""
    return fused_lm_head(_chain(forward))


def _is_transparent(function: Any) -> bool:
    return module_of(function).split(".")[0] in _TRANSPARENT


def has_device_hook(module: nn.Module) -> bool:
    """Whether accelerate's device hooks call the forward through `_old_forward`."""
    attributes = module.__dict__
    if "_hf_hook" not in attributes or "_old_forward" not in attributes:
        return False
    forward = attributes.get("forward")
    return isinstance(forward, functools.partial) and module_of(forward) == "accelerate.hooks"


def compose(model: nn.Module, run: Callable[..., Any]) -> None:
    """Puts ours around a forward on the instance that does not lead to ours already."""
    forward = model.__dict__.get("forward")
    if forward is None or has_device_hook(model) or _leads_to_ours(forward):
        return
    model.__dict__["forward"] = ComposedForward(model, forward, run)


def _leads_to_ours(forward: Any) -> bool:
    """Whether every call of `forward` reaches ours, through wrappers that are known to pass it on.

    Elsewhere `__wrapped__` is only what a function was named after: TRL's calls it sometimes.
    """
    for function in _chain(forward):
        if _is_ours(function):
            return True
        if not _is_transparent(function):
            return False
    return False


def decompose(model: nn.Module) -> None:
    """Puts the forward back that `compose` found."""
    forward = model.__dict__.get("forward")
    if isinstance(forward, ComposedForward):
        model.__dict__["forward"] = forward.inner


def refuse_backward_hooks(head: nn.Module) -> None:
    """A full backward hook waits for the gradient of logits, which never comes."""
    every = torch.nn.modules.module  # Those for all modules of the process.
    own = head._backward_hooks or head._backward_pre_hooks
    if own or every._global_backward_hooks or every._global_backward_pre_hooks:
        raise UnsupportedModelError(
            "a backward hook on the head needs the gradient of the logits, which the fused head "
            "never makes: remove the hook or leave this model stock (remove_patch)"
        )


def gathered_for_backward(head: Any, loss: Tensor) -> Tensor:
    """`loss`, whose backward begins with the head's weight in one piece.

    DeepSpeed's ZeRO-3 hangs the function that gathers a module's weights again on the tensors of
    its output, and looks for them in tensors, lists and dicts alone (read at 0.19). FSDP finds the
    loss in what the head returns.
    """
    if not any(hasattr(weight, "ds_numel") for weight in head.parameters()):
        return loss
    if not hasattr(head, "pre_bwd_fn"):
        raise UnsupportedModelError(
            "the head's weight is partitioned by ZeRO-3, whose hook for its backward was not found "
            "on the head: call deepspeed.initialize before the first forward, or leave this model "
            "stock (remove_patch)"
        )
    # Stock forwards add to the loss in place, which a view from a custom function does not allow.
    return head.pre_bwd_fn.apply(loss).clone()


def gathers_by_parts(head: nn.Module) -> bool:
    """Whether weights are missing inside the head's forward until their own modules run.

    So it is where ZeRO-3, or a unit of FSDP for each part, holds the layers inside an adapter.
    """
    return any(is_sharded(weight) for weight in head.parameters()) or any(
        "_fsdp_wrapped_module" in module._modules for module in head.modules()
    )


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor or partitioned by ZeRO-3."""
    return type(weight).__name__ == "DTensor" or hasattr(weight, "ds_numel")


def _is_ours(function: Any) -> bool:
    return isinstance(function, ComposedForward) or is_fused_forward(function)


def _chain(forward: Any) -> list[Any]:
    """The forward and what it wraps, as far as wrappers tell."""
    found: list[Any] = []
    while forward is not None and len(found) < _MAX_WRAPPERS:
        forward = getattr(forward, "__func__", forward)
        found.append(forward)
        inner = getattr(forward, "__wrapped__", None)
        forward = getattr(forward, "func", None) if inner is None else inner
    return found
