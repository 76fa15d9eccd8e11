"""Whether and how a model is fused: a report for people, a check for training jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from hf_fused_head.engines.select import resolve_impl

from . import wrappers
from .adapter import state_of
from .class_swap import stock_class, swapped_class
from .eligibility import refusal_of, static_obstacle
from .errors import UnsupportedModelError
from .heads import MODULE, engine_obstacle, innermost_head, kind_of
from .registry import facts_of, family_of
from .state import LastForward, PatchState


@dataclass(frozen=True)
class PatchReport:
    """What stands between a model and its loss.

    Attributes:
        fused: Whether the next forward with labels computes the loss inside the head.
        reason: Why, or why not.
        family: Name of the family whose facts are used, "" for none.
        scale: Factor on the logits.
        softcap: Cap of the logits, None for none.
        bias: Whether the head has a bias.
        tied: Whether the head shares its weight with the input embeddings.
        wrapper: What is around the head's weight: "none", "LoRA", the name of a class, ...
        sharding: "none", or the placements of the head's weight, and after a forward that shared
            its rows the number of ranks.
        kernel: The engine that computes the loss, and why.
        schedule: The one that the last fused forward ran; "" before it. A compiled forward chooses
            it inside, where it is not recorded.
        last_loss: "fused", or why the loss of the last forward was not; "" before the first.
    """

    fused: bool
    reason: str
    family: str = ""
    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False
    tied: bool = False
    wrapper: str = "none"
    sharding: str = "none"
    kernel: str = ""
    schedule: str = ""
    last_loss: str = ""

    def __str__(self) -> str:
        lines = [f"fused: {'yes' if self.fused else 'no'}, {self.reason}"]
        if self.kernel:
            cap = "none" if self.softcap is None else f"{self.softcap:g}"
            lines += [
                f"head: family {self.family or 'none, taken for plain'}, scale {self.scale:g}, "
                f"softcap {cap}, {'with' if self.bias else 'no'} bias, "
                f"{'tied to' if self.tied else 'not tied to'} the embeddings, "
                f"wrapper {self.wrapper}, sharding {self.sharding}",
                f"kernel: {self.kernel}",
                f"schedule: {self.schedule or 'no forward with labels yet'}",
                f"last loss: {self.last_loss or 'none yet'}",
            ]
        return "\n".join(lines)


def patch_report(model: nn.Module) -> PatchReport:
    """Whether and how a model is fused.

    Args:
        model: Any model, patched or not.

    Returns:
        The report; `str()` of it is for people.
    """
    target: Any = wrappers.unwrapped(model)
    state = state_of(model)
    if state is None:
        return PatchReport(fused=False, reason=_why_stock(target))
    if swapped_class(type(target)) is None or not wrappers.runs_ours(target):
        reason = "its forward was replaced after apply_patch: call apply_patch last"
        return PatchReport(fused=False, reason=reason)
    obstacle = static_obstacle(target)
    if obstacle is not None:
        return PatchReport(fused=False, reason=f"the next forward will refuse it: {obstacle}")
    return _facts(target, state)


@contextlib.contextmanager
def require_fused(model: nn.Module) -> Iterator[None]:
    """Makes sure that a forward inside the `with` block takes its loss out of the head.

    A patched model holds every pass with labels to that by itself. This sees also what never
    reaches it: labels that were taken away before, a former `model.forward` that was kept,
    another model in the place of the patched one. It waits for nothing on the device.

    Args:
        model: A patched model, or what it has been wrapped into.

    Raises:
        UnsupportedModelError: At the end of the block, if no forward did; an exception of the block
            itself goes first.
    """
    state = state_of(model)
    if state is not None:
        state.ran = False
    yield
    state = state_of(model)
    if state is None or not state.ran:
        report = patch_report(model)
        missing = (
            "no forward with labels has reached it, although it is patched: give it the labels and "
            "call the model itself, or patch with strict=False to accept such passes"
        )
        raise UnsupportedModelError(
            f"this pass was not fused: {missing if report.fused else report.reason}"
        )


def _why_stock(target: Any) -> str:
    refused = refusal_of(target) if isinstance(target, nn.Module) else None
    if refused is not None:
        return refused.reason
    return static_obstacle(target) or "apply_patch has not been called on this model"


def _facts(target: Any, state: PatchState) -> PatchReport:
    family = family_of(target)
    facts = facts_of(target, family)
    outer = target.get_output_embeddings()
    head = innermost_head(outer)
    base = getattr(head, "base_layer", head)
    weight, embeddings = _stored(base, "weight"), _input_embeddings(target)
    return PatchReport(
        fused=True,
        reason="forwards with labels compute the loss inside the head" + _for_trl(target),
        family="" if family is None else family.name,
        scale=facts.logit_scale,
        softcap=facts.softcap,
        bias=_stored(base, "bias") is not None,
        tied=weight is not None and _stored(embeddings, "weight") is weight,
        wrapper=_wrapper(outer, head),
        sharding=_sharding(weight, state.last),
        kernel=_kernel(state, weight, head),
        schedule=_schedule(state),
        last_loss=state.last_loss,
    )


def _input_embeddings(target: Any) -> Any:
    """None where transformers does not know them."""
    try:
        return target.get_input_embeddings()
    except NotImplementedError:
        return None


def _for_trl(target: Any) -> str:
    head = wrappers.trl_head(target.forward)
    if head is None:
        return ""
    return f", those of TRL {' and '.join(head.outputs)} at temperature {head.temperature:g}"


def _stored(module: Any, name: str) -> Any:
    """A parameter as it is kept: to compute a parametrised one may change its module."""
    if isinstance(module, nn.Module) and parametrize.is_parametrized(module, name):
        parametrizations: Any = module.parametrizations
        return next(parametrizations[name].parameters(), None)
    return getattr(module, name, None)


def _wrapper(outer: nn.Module, head: nn.Module) -> str:
    names = [] if outer is head else [_stock_name(outer)]
    kind = kind_of(stock_class(type(head)))
    if kind not in ("linear", "conv1d"):
        names.append("LoRA" if kind == "lora" else _stock_name(head))
    return " > ".join(names) or "none"


def _stock_name(module: nn.Module) -> str:
    cls = stock_class(type(module))
    path = cls.__module__.split(".")
    # Every tuner of PEFT calls its layer Linear; peft.tuners.ia3.layer is named `ia3.Linear`.
    tuner = f"{path[2]}." if path[:2] == ["peft", "tuners"] else ""
    return tuner + cls.__name__


def _sharding(weight: Any, last: LastForward | None) -> str:
    placements = getattr(weight, "placements", None)
    if placements is None:
        return "none"
    spelled = ", ".join(str(place) for place in placements)
    if last is None or last.ranks == 1:
        return spelled
    return f"{spelled}, vocabulary parallel on {last.ranks} ranks"


def _kernel(state: PatchState, weight: Any, head: nn.Module) -> str:
    last = state.last
    kind = kind_of(stock_class(type(head))) if last is None else last.kind
    if kind == MODULE or not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return _own_forward(head, state.options.impl)
    choice = None if last is None or last.impl != state.options.impl else last.engine
    try:
        choice = choice or resolve_impl(state.options.impl, weight.device, weight.dtype)
    except NotImplementedError as error:
        return f"none here, {error}"
    return f"{choice.impl}: {choice.reason}"


def _own_forward(head: nn.Module, impl: str) -> str:
    """The engine of a head that is not taken apart."""
    obstacle = engine_obstacle(head, impl)
    if obstacle is not None:
        return f"none here, {obstacle}"
    how = "on all tokens at once" if impl == "reference" else "in chunks of tokens"
    return f"the forward of {_stock_name(head)} itself, {how}"


def _schedule(state: PatchState) -> str:
    if state.last is not None:
        return state.last.ran
    return "chosen for each shape inside the compiled forward" if state.ran else ""
