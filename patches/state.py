"""What a patched model and its head share.

It outlives the forwards; a call (call.py) lives for one forward in one thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_fused_head.options import Choice

from .settings import PatchOptions

if TYPE_CHECKING:
    from .call import Call

_COMPILED = 0
"""The key of calls under torch.compile, which cannot ask for the thread; no thread has it."""


class LastForward(NamedTuple):
    """What the report tells of the last fused forward."""

    kind: str
    ranks: int  # that share the head's rows
    impl: str  # as it was asked for
    engine: Choice | None  # None where the head's own forward ran
    ran: str  # the schedule, for people


class PatchState:
    """What a patched model and its head share: options, open calls, what the last forward left.

    Attributes:
        options: Those of the next forward.
        own_options: Those that `apply_patch` was called with, without what a trainer has changed.
        rowwise: What heads that treat each token by itself are made of.
        ran: Whether a forward has taken its loss out of the head since this was last lowered.
    """

    def __init__(self, options: PatchOptions) -> None:
        self.options = options
        self.own_options = options
        self.calls: dict[int, Call | None] = {}
        self.stats: tuple[Tensor | None, ...] | None = None
        self.last: LastForward | None = None
        self.rowwise: set[tuple[type, ...]] = set()
        self.ran = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle starts without the calls and results of the original.
        return {"options": self.options, "own_options": self.own_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PatchState.__init__(self, state["options"])
        self.own_options = state["own_options"]

    def current(self) -> Call | None:
        """The open call of this thread, or of the compiled region that it runs."""
        return self.calls.get(call_key()) or self.calls.get(_COMPILED)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Runs the stock forward of the head, whatever call is open."""
        saved = {key: self.calls.pop(key) for key in (call_key(), _COMPILED) if key in self.calls}
        try:
            yield
        finally:
            self.calls.update(saved)


def call_key() -> int:
    """What an open call is kept under: the thread, or that it is compiled."""
    return _COMPILED if torch.compiler.is_compiling() else threading.get_ident()
