"""Whether a head may run on a few tokens at a time: tried out on two tokens before the first loss.

Its logits of a token must not depend on other tokens, and a forward must not change the head: stock
runs it once for all tokens, chunks run it for each of them, and again in the backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .chunked_head import HeadForward
from .class_swap import stock_class
from .errors import UnsupportedModelError
from .recompute_logits import ComputeMode, version_of

# Products of float32 have no more digits where TF32 is switched on.
_TF32_EPS = 2.0**-11
# They may take the scale of their activations from all rows.
_NOISE_OF_QUANTISED_LAYERS = 0.05

Trials = dict[Hashable, frozenset[str]]
"""By fingerprint, the buffers that a forward of the head writes without changing them."""

# Layers that average over tokens. A new adapter is zero, so that a first forward cannot show it.
_MIXERS = {("peft.tuners.lily.layer", "Linear"): "PEFT's Lily, whose router averages over tokens"}


def fingerprint(head: nn.Module) -> Hashable:
    """What a trial holds for: the classes of the head's modules, their modes and their switches.

    Adapters may be put on later, and forwards replaced; observers of a quantisation keep their
    switches in buffers.
    """
    classes = [(stock_class(type(module)), module.training) for module in head.modules()]
    modules = tuple((cls, cls.forward, training) for cls, training in classes)
    switches = (buffer for buffer in head.buffers() if buffer.numel() == buffer.element_size() == 1)
    return modules, tuple((id(switch), version_of(switch)) for switch in switches)


def try_out(head: nn.Module, head_forward: HeadForward, hidden: Tensor) -> frozenset[str]:
    """Refuses a head that cannot run in chunks; its buffers and random states stay as they are.

    Args:
        head: The module; its dropouts are off meanwhile.
        head_forward: Its stock forward.
        hidden: [..., hidden].

    Returns:
        The buffers that a forward writes without changing them.

    Raises:
        UnsupportedModelError: If the head is known to mix tokens, if the first row's logits change
            with the second row's presence, or if a forward changes the head.
    """
    _refuse_mixers(head)
    found = _Found(head)
    rows = hidden.reshape(-1, hidden.shape[-1])[:2]
    mode = ComputeMode.current(rows.device.type)._replace(grad_enabled=False)
    try:
        with mode.restored(), _without_dropout(head):
            together, random = _run(head_forward, rows)
            alone, _ = _run(head_forward, rows[:1])
            attributes = _attributes(head)
            again, _ = _run(head_forward, rows[:1])
    finally:
        changed, written = found.restore()
    # What keeps the last token is the same after the same token; a moving average is not.
    changed += [value.place.path for value in attributes if not value.is_unchanged()]
    if changed:
        found.restore_attributes()
        raise keeps_state(head, changed)
    if together.dim() != 2 or together.shape[1:] != alone.shape[1:]:
        return written  # No map of tokens, which the chunks will tell.
    allowed = _allowed_difference(head, rows, alone)
    if _difference(alone, again) > allowed:
        found.restore_attributes()
        raise keeps_state(head, [])
    # Another number of rows draws other random numbers.
    if not random and _difference(together[:1], alone) > allowed:
        raise _mixes_tokens("a module that mixes them")
    return written


def buffer_versions(head: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensor each buffer is, and how often it has been written, by name."""
    return {name: (id(buffer), version_of(buffer)) for name, buffer in head.named_buffers()}


def written_since(before: dict[str, tuple[int, int]], head: nn.Module) -> frozenset[str]:
    """The names of buffers that were written, or replaced, since `before` was read."""
    now = buffer_versions(head)
    return frozenset(name for name in now if now[name] != before.get(name))


def keeps_state(head: nn.Module, names: list[str]) -> UnsupportedModelError:
    """The refusal of a head that its forward changes.

    Args:
        head: The module.
        names: The paths of the tensors that change; none where only the logits show it.
    """
    culprit = "other logits of the same token in a second forward"
    if names:
        module = head.get_submodule(names[0].rpartition(".")[0])
        culprit = f"another `{names[0]}` of its {type(module).__name__}"
    return UnsupportedModelError(
        "the head must not be changed by its forward, which runs for each chunk of tokens and "
        f"again in the backward, got {culprit}: switch that state off (eval(), its observer) or "
        "leave this model stock (remove_patch)"
    )


class _Place(NamedTuple):
    """Where a module holds a value."""

    holder: dict[str, Any]
    name: str
    path: str

    @property
    def value(self) -> Any:
        return self.holder.get(self.name)


class _Value(NamedTuple):
    """A tensor or a number that a module holds, and a copy of it."""

    place: _Place
    value: Any
    copy: Any

    @classmethod
    def of(cls, place: _Place) -> _Value:
        value = place.value
        return cls(place, value, value.clone() if _is_plain(value) else value)

    def is_unchanged(self) -> bool:
        """Whether the module holds the same object, bits or number."""
        now = self.place.value
        if _is_plain(self.value):
            return _is_plain(now) and _same_bits(now, self.copy)
        return now is self.value or (isinstance(now, float) and now == self.value)

    def restore(self) -> None:
        """Puts the former object and its former content back."""
        self.place.holder[self.place.name] = self.value
        if _is_plain(self.value) and not _same_bits(self.value, self.copy):
            # Its shape may have changed too.
            self.value.data = self.copy


class _Found:
    """What a trial could change in a head, as it was before."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.versions = buffer_versions(head)
        self.buffers = {place.path: _Value.of(place) for place in _buffers(head)}
        self.attributes = _attributes(head)
        self.held = {place.path: place.value for place in _places(head, "")}
        self.generators = [
            (value, value.get_state())
            for module in head.modules()
            for value in module.__dict__.values()
            if isinstance(value, torch.Generator)
        ]

    def restore(self) -> tuple[list[str], frozenset[str]]:
        """Restores buffers and generators; names of buffers that were changed, or just written."""
        written = written_since(self.versions, self.head)
        changed = [path for path, value in self.buffers.items() if not value.is_unchanged()]
        added = [place for place in _buffers(self.head) if place.path not in self.buffers]
        for path in changed:
            self.buffers[path].restore()
        for place in added:
            del place.holder[place.name]
        for generator, state in self.generators:
            generator.set_state(state)
        return [*changed, *(place.path for place in added)], written

    def restore_attributes(self) -> None:
        """Restores other tensors and numbers, of a head that turned out to keep its state there.

        Else they are left alone: a forward may have unmerged an adapter and noted it.
        """
        for value in self.attributes:
            value.restore()
        for place in [place for place in _places(self.head, "") if _may_be_state(place.value)]:
            if place.path not in self.held:
                del place.holder[place.name]
            else:
                place.holder[place.name] = self.held[place.path]


def _places(head: nn.Module, holder: str) -> Iterator[_Place]:
    for path, module in head.named_modules():
        held = module.__dict__ if holder == "" else module.__dict__[holder]
        for name in list(held):
            yield _Place(held, name, f"{path}.{name}".removeprefix("."))


def _buffers(head: nn.Module) -> Iterator[_Place]:
    return _places(head, "_buffers")


def _attributes(head: nn.Module) -> list[_Value]:
    """Other numbers and tensors. A matrix is a weight, and an int may just count calls."""
    places = [place for place in _places(head, "") if _may_be_state(place.value)]
    return [_Value.of(place) for place in places]


def _may_be_state(value: Any) -> bool:
    return type(value) is float or (type(value) is Tensor and value.dim() < 2)


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor whose bits can be read."""
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized)
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other.to(one.device))


def _run(head_forward: HeadForward, rows: Tensor) -> tuple[Tensor, bool]:
    """Logits, and whether random numbers were drawn for them; the next run draws the same."""
    devices = [rows.device] if rows.is_cuda else []

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]

    with torch.random.fork_rng(devices):
        before = states()
        logits = head_forward(rows)
        moved = [not torch.equal(*pair) for pair in zip(before, states(), strict=True)]
    return logits, any(moved)


def _refuse_mixers(head: nn.Module) -> None:
    for module in head.modules():
        for cls in type(module).__mro__:
            if (cls.__module__, cls.__qualname__) in _MIXERS:
                raise _mixes_tokens(_MIXERS[cls.__module__, cls.__qualname__])
        # It fails on a single token, so a run cannot show it.
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise _mixes_tokens(f"{type(module).__name__}, which averages over them in training")


def _mixes_tokens(culprit: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the head's logits of a token must not depend on other tokens, got {culprit}: keep it off "
        "the head or leave this model stock (remove_patch)"
    )


def _difference(one: Tensor, other: Tensor) -> Tensor:
    return (one.double() - other.double()).abs().max()


def _allowed_difference(head: nn.Module, hidden: Tensor, logits: Tensor) -> Tensor:
    """What another batch size may change, since it may pick another kernel."""
    scale = logits.double().abs().max()
    tensors = [hidden, logits, *head.parameters()]
    if any(type(t) not in (Tensor, nn.Parameter) or not t.is_floating_point() for t in tensors):
        return _NOISE_OF_QUANTISED_LAYERS * scale
    dtypes = {t.dtype for t in tensors}
    if torch.is_autocast_enabled(hidden.device.type):
        dtypes.add(torch.get_autocast_dtype(hidden.device.type))
    rounding = max(_TF32_EPS, *(torch.finfo(dtype).eps for dtype in dtypes))
    return min(8 * rounding, _NOISE_OF_QUANTISED_LAYERS) * scale


@contextlib.contextmanager
def _without_dropout(head: nn.Module) -> Iterator[None]:
    dropouts = [m for m in head.modules() if isinstance(m, _DropoutNd) and m.training]
    for module in dropouts:
        module.training = False
    try:
        yield
    finally:
        for module in dropouts:
            module.training = True
