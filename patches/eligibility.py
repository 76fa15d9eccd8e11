"""Why a model or its head cannot be fused, as far as can be known without a forward."""

from __future__ import annotations

import inspect
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, modeling_utils

from . import origin, wrappers
from .class_swap import stock_class, swapped_class
from .errors import UnsupportedModelError
from .heads import MODULE, engine_obstacle, innermost_head, kind_of
from .registry import facts_of, family_of
from .settings import PatchOptions


class Refusal(NamedTuple):
    """Why a model is stock although it was to be fused, and the options that it was to have."""

    reason: str
    options: PatchOptions


_refusals: weakref.WeakKeyDictionary[nn.Module, Refusal] = weakref.WeakKeyDictionary()
"""The refusals of stock models, which carry no trace of one themselves."""


def static_obstacle(target: Any) -> str | None:
    """Why a model cannot be fused, as far as can be known without a forward."""
    name = type(target).__name__
    if not isinstance(target, PreTrainedModel):
        return f"{name} is no transformers model: pass the model itself or a known wrapper of it"
    head = target.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return f"{name} has no output embeddings: load it with its language modelling head"
    if isinstance(head, nn.Embedding):
        return f"the output embeddings of {name} are an embedding of tokens, which makes no logits"
    rows, classes = _rows_of(head), getattr(target.config.get_text_config(), "vocab_size", None)
    if rows is not None and isinstance(classes, int) and rows < classes:
        return f"the output embeddings of {name} make {rows} logits for {classes} classes"
    forwards = (c.__dict__["forward"] for c in type(target).__mro__ if "forward" in c.__dict__)
    if not any("labels" in inspect.signature(forward).parameters for forward in forwards):
        return f"the forward of {name} takes no labels"
    conflict = wrappers.conflicting_patch(target)
    if conflict is not None:
        return conflict
    loss_function = stock_loss_function(target)
    if not _is_known_loss(loss_function):
        return (
            f"its loss function is {_spelled(loss_function)}, not a cross-entropy of transformers: "
            "unset model.loss_function or leave the model stock"
        )
    return (
        _replaced_loss_obstacle(loss_function)
        or wrappers.instance_forward_obstacle(target, name, True)
        or head_obstacle(head)
    )


def option_obstacle(target: Any, options: PatchOptions) -> str | None:
    """Why a model cannot be fused as it was asked for, as far as can be known without a forward."""
    head = innermost_head(target.get_output_embeddings())
    is_module = kind_of(stock_class(type(head))) == MODULE
    return engine_obstacle(head, options.impl) if is_module else None


def head_obstacle(head: nn.Module) -> str | None:
    """Why a head's forward cannot be taken over."""
    inner = innermost_head(head)
    name = f"the head ({type(inner).__name__})"
    return wrappers.instance_forward_obstacle(inner, name, False)


def check_loss(loss_function: Any) -> None:
    """Makes sure that the fused loss stands for the one that the stock forward would compute.

    Raises:
        UnsupportedModelError: If the loss function or a part of it was replaced, or may be by an
            active `TorchFunctionMode`.
    """
    if not _is_known_loss(loss_function):
        raise UnsupportedModelError(
            "model.loss_function must be a cross-entropy of transformers, got "
            f"{_spelled(loss_function)}: unset it or leave the model stock (remove_patch)"
        )
    obstacle = _replaced_loss_obstacle(loss_function) or _mode_obstacle()
    if obstacle is not None:
        raise UnsupportedModelError(f"this model cannot be fused: {obstacle}")


def stock_loss_function(model: Any) -> Any:
    """What `model.loss_function` is without the patch."""
    ours = swapped_class(type(model))
    if torch.compiler.is_compiling():
        return _traced_loss_function(model, ours)
    if ours is None:
        return model.loss_function
    attribute = ours.__dict__["_fused_base"].loss_function
    if isinstance(attribute, property):
        return attribute.__get__(model)
    # A method has taken the place of the property.
    return model.__dict__.get("loss_function", attribute.__get__(model))


def _traced_loss_function(model: Any, ours: Any) -> Any:
    """The compiler can call the getter that the patch has found, but not ask a class for it."""
    if ours._fused_base.loss_function is not ours._fused_loss_property:
        raise UnsupportedModelError(
            "the loss function of the model's class was replaced since apply_patch: call "
            "apply_patch again before torch.compile"
        )
    # Without the warning at an unknown type, which it cannot trace; apply_patch has given it.
    known = modeling_utils.LOSS_MAPPING  # pyright: ignore[reportPrivateImportUsage]
    if not hasattr(model, "_loss_function") and model.loss_type not in known:
        return known["ForCausalLM"]
    return ours._fused_loss_getter(model)


def shifts_labels(model: Any) -> bool:
    """Whether the model's loss compares the logits of a token with the label of the next one."""
    model = wrappers.unwrapped(model)
    facts = facts_of(model, family_of(model))
    if facts.own_loss or facts.unshifted:
        return False
    return not origin.is_masked_loss(stock_loss_function(model))


def remember_refusal(model: nn.Module, error: UnsupportedModelError, options: PatchOptions) -> None:
    """Keeps for the report why this model is stock."""
    _refusals[model] = Refusal(str(error), options)


def forget_refusal(model: nn.Module) -> None:
    """The model is to be fused again."""
    _refusals.pop(model, None)


def refusal_of(model: nn.Module) -> Refusal | None:
    """Why this stock model was refused; None where it was not."""
    return _refusals.get(wrappers.unwrapped(model))


def refuse_mildly(target: nn.Module, error: UnsupportedModelError, options: PatchOptions) -> None:
    """Warns that a model stays stock, where the patch is not strict."""
    if isinstance(target, nn.Module):
        remember_refusal(target, error, options)
    warnings.warn(f"{type(target).__name__} stays stock: {error}", UserWarning, stacklevel=3)


def _rows_of(head: nn.Module) -> int | None:
    """How many classes a linear layer has, where its weight is there to be read."""
    inner = innermost_head(head)
    # Not `inner.weight`: a parametrised one would be computed.
    weight = inner._parameters.get("weight") if isinstance(inner, nn.Linear) else None
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return None
    return weight.shape[0]


def _is_known_loss(loss_function: Any) -> bool:
    return origin.is_causal_loss(loss_function) or origin.is_masked_loss(loss_function)


def _replaced_loss_obstacle(loss_function: Any) -> str | None:
    replaced = origin.replaced_part_of_losses(loss_function)
    return None if replaced is None else f"{replaced}: put it back or leave the model stock"


def _mode_obstacle() -> str | None:
    mode = origin.replacing_mode()
    if mode is None:
        return None
    return (
        f"the function mode {mode} is active, which sees neither the loss nor the product of a "
        "fused head: leave it before the forward, or leave the model stock"
    )


def _spelled(loss_function: Any) -> str:
    return getattr(loss_function, "__qualname__", repr(loss_function))
