"""Where logits come from that were not made: the head's forward, run again as it was run then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from hf_fused_head.distributed.dtensor import layout_of

from .errors import LogitsUnavailableError
from .logits_proxy import Step, replay
from .tensor_parallel import whole_logits

REMEDY = (
    "call the model without labels to get logits, read them before the next optimizer step, or "
    "use remove_patch(model)"
)


class ComputeMode(NamedTuple):
    """What torch takes from the surroundings of a forward instead of from its arguments."""

    device_type: str
    autocast_enabled: bool
    autocast_dtype: torch.dtype | None
    grad_enabled: bool
    inference: bool

    @classmethod
    def current(cls, device_type: str) -> ComputeMode:
        """The mode of the running code."""
        available = torch.amp.is_autocast_available(device_type)
        enabled = available and torch.is_autocast_enabled(device_type)
        return cls(
            device_type,
            enabled,
            torch.get_autocast_dtype(device_type) if available else None,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a linear layer's result, for weights of `dtype`."""
        if self.autocast_enabled and self.autocast_dtype and dtype != torch.float64:
            return self.autocast_dtype
        return dtype

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Runs code as it would have run then."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad_enabled))
            if torch.amp.is_autocast_available(self.device_type):
                stack.enter_context(
                    torch.autocast(
                        self.device_type,
                        dtype=self.autocast_dtype,
                        enabled=self.autocast_enabled,
                        # A cast made without gradients must not serve code that needs them.
                        cache_enabled=False,
                    )
                )
            yield


class RecomputedLogits:
    """Where lazy logits come from: the head, its input, and the modes that it ran under.

    Args:
        head: The module whose stock forward makes the logits.
        hidden: Its input, [..., hidden], with its graph.
        shape: That of the logits.
        device: That of the head's output.
        suspended: Context in which the head runs its stock forward, whatever call is open.
    """

    def __init__(
        self,
        head: nn.Module,
        hidden: Tensor,
        shape: torch.Size,
        device: torch.device,
        suspended: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.head: nn.Module | None = head
        self.hidden: Tensor | None = hidden
        self.shape = shape
        self.device = device
        self.suspended = suspended
        self.mode = ComputeMode.current(device.type)
        self.hidden_version = version_of(hidden)
        self.obstacle = _random_obstacle(head)
        self.state = HeadState.of(head)
        # Inside its forward a head is as spread over ranks as the forward can deal with.
        self.layouts = _layouts(head)
        self.output: Tensor | None = None
        self.requires_grad = self.mode.grad_enabled and (
            hidden.requires_grad or any(p.requires_grad for p in head.parameters())
        )

    def settle(self) -> None:
        """Takes the head as it stands after the forward, offloaded or sharded, as the reference."""
        if self.head is not None:
            self.state = HeadState.of(self.head)

    def head_output(self) -> Tensor:
        """The head's stock output, made once."""
        if self.output is not None:
            return self.output
        head, hidden = self.head, self.hidden
        if head is None or hidden is None:
            raise LogitsUnavailableError(f"these logits were dropped: {REMEDY}")
        self._check(head, hidden)
        with self.mode.restored(), self.suspended():
            output = whole_logits(head.forward(hidden))
        self.head = self.hidden = None
        self.output = output
        return output

    def replayed(self, steps: tuple[Step, ...]) -> Tensor:
        """The head's stock output after the recorded operations."""
        output = self.head_output()
        with self.mode.restored():
            return replay(steps, output)

    def _check(self, head: nn.Module, hidden: Tensor) -> None:
        reason = self.obstacle or self.state.difference(HeadState.of(head))
        if _layouts(head) != self.layouts:
            reason = "the head's parameters are sharded outside its forward"
        if reason is None and version_of(hidden) != self.hidden_version:
            reason = "the hidden states were changed in place since the forward"
        if reason is not None:
            raise LogitsUnavailableError(
                f"the logits of this forward were never stored and cannot be made again: {reason}; "
                f"{REMEDY}"
            )


class HeadState(NamedTuple):
    """What the head's output depends on beside its input; compared, never kept alive by value."""

    parameters: tuple[tuple[Tensor, int], ...]
    switches: tuple[Any, ...]

    @classmethod
    def of(cls, head: nn.Module) -> HeadState:
        """The state of the head now."""
        tensors = (*head.parameters(), *head.buffers())
        return cls(
            tuple((tensor, version_of(tensor)) for tensor in tensors),
            tuple(_switches(module) for module in head.modules()),
        )

    def difference(self, other: HeadState) -> str | None:
        """Why `other` would give other logits; None when it would not."""
        if any(hasattr(tensor, "ds_numel") for tensor, _ in other.parameters):
            return "the head's parameters are sharded outside its forward"
        if len(self.parameters) != len(other.parameters) or any(
            mine is not theirs
            for (mine, _), (theirs, _) in zip(self.parameters, other.parameters, strict=False)
        ):
            return "the head's parameters were replaced since the forward"
        if any(
            mine != theirs
            for (_, mine), (_, theirs) in zip(self.parameters, other.parameters, strict=True)
        ):
            return "the head's parameters have changed since the forward"
        if self.switches != other.switches:
            return "the head's adapters or its training mode were switched since the forward"
        return None


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    # Tensors made under inference mode keep no version; they cannot be trained either.
    return 0 if tensor.is_inference() else tensor._version


def _layouts(head: nn.Module) -> list[tuple[Any, ...]]:
    """How the head's parameters are spread over ranks, by tensor parallelism or by FSDP2."""
    return [layout_of(parameter) for parameter in head.parameters()]


def _switches(module: nn.Module) -> tuple[Any, ...]:
    """What PEFT layers and dropouts are switched to."""
    state = module.__dict__
    active = state.get("_active_adapter", ())
    return (
        state.get("_disable_adapters"),
        active if isinstance(active, str) else tuple(active),
        tuple(state.get("merged_adapters", ())),
        tuple(sorted(state.get("scaling", {}).items())),
        module.training if isinstance(module, _DropoutNd) else None,
    )


def _random_obstacle(head: nn.Module) -> str | None:
    for module in head.modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            return "the head has dropout, so a second run of it would draw another mask"
    return None
