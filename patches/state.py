"""What a patched model and its head share.

It outlives the forwards; a running forward (running.py) lives for one call in one thread.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_fused_head.engines.select import Choice

from .running import LossForward, RunningForward, innermost_of, opened_outside, suspended
from .settings import PatchOptions
from .trial import Trials

FUSED = "fused"
"""What `PatchState.last_loss` says of a loss that came out of the head."""


class LastForward(NamedTuple):
    """What the report says of the last fused forward."""

    kind: str
    ranks: int  # that share the head's rows
    impl: str  # as it was asked for
    engine: Choice | None  # None where the head's own forward ran
    ran: str  # the schedule, for people


class PatchState:
    """What a patched model and its head share: options, running forwards, what the last one left.

    Attributes:
        options: Those of the next forward.
        own_options: Those that `apply_patch` was called with, without what a trainer has changed.
        running: The innermost running forward of each thread.
        trials: Of heads that run in chunks of tokens.
        ran: Whether a forward has taken its loss out of the head since this was last lowered.
        last_loss: "fused", or why the last loss was not; "" before the first.
        warn_once: Warns of a text once; also while the compiler traces, which cannot call the
            `warnings` module.
    """

    def __init__(self, options: PatchOptions) -> None:
        self.options = options
        self.own_options = options
        self.running: dict[int, RunningForward] = {}
        self.stats: tuple[Tensor | None, ...] | None = None
        self.last: LastForward | None = None
        self.trials: Trials = {}
        self.ran = False
        self.last_loss = ""
        self.warned: set[str] = set()
        self.warn_once = _warner(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle starts without the forwards and results of the original.
        return {"options": self.options, "own_options": self.own_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PatchState.__init__(self, state["options"])
        self.own_options = state["own_options"]

    def innermost(self) -> RunningForward | None:
        """The innermost running forward of this thread, or of the compiled region that it runs."""
        return innermost_of(self.running)

    def current(self) -> LossForward | None:
        """The innermost running forward, if its loss is computed in the head."""
        innermost = self.innermost()
        return innermost if isinstance(innermost, LossForward) else None

    def opened_outside(self) -> bool:
        """Whether this is compiled code inside a forward that is not, and that is to be fused."""
        return opened_outside(self.running)

    def suspended(self) -> contextlib.AbstractContextManager[None]:
        """Runs the stock forward of the head, whatever forward is running."""
        return suspended(self.running)


def _warner(state: PatchState) -> Callable[[str], bool]:
    known = weakref.ref(state)

    # A function of constants, which the compiler calls while it traces.
    @torch.compiler.assume_constant_result
    def warn_once(text: str) -> bool:
        state = known()
        if state is None or text in state.warned:
            return False
        state.warned.add(text)
        warnings.warn(text, UserWarning, stacklevel=2)
        return True

    return warn_once
