"""What a patched model and its head share.

It outlives the forwards; a pass (passes.py) lives for one forward in one thread.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from hf_fused_head.options import Choice

from .settings import PatchOptions
from .trial import Trials

if TYPE_CHECKING:
    from .call import Call
    from .passes import Pass

_COMPILED = 0
"""The key of passes under torch.compile, which cannot ask for the thread; no thread has it."""

FUSED = "fused"
"""What `PatchState.last_loss` says of a loss that came out of the head."""


class LastForward(NamedTuple):
    """What the report tells of the last fused forward."""

    kind: str
    ranks: int  # that share the head's rows
    impl: str  # as it was asked for
    engine: Choice | None  # None where the head's own forward ran
    ran: str  # the schedule, for people


class PatchState:
    """What a patched model and its head share: options, running passes, what the last one left.

    Attributes:
        options: Those of the next forward.
        own_options: Those that `apply_patch` was called with, without what a trainer has changed.
        running: The innermost pass of each thread.
        trials: Of heads that run in chunks of tokens.
        ran: Whether a forward has taken its loss out of the head since this was last lowered.
        last_loss: "fused", or why the last loss was not; "" before the first.
        warn_once: Warns of a text once; also while the compiler traces, which cannot call the
            `warnings` module.
    """

    def __init__(self, options: PatchOptions) -> None:
        self.options = options
        self.own_options = options
        self.running: dict[int, Pass] = {}
        self.stats: tuple[Tensor | None, ...] | None = None
        self.last: LastForward | None = None
        self.trials: Trials = {}
        self.ran = False
        self.last_loss = ""
        self.warned: set[str] = set()
        self.warn_once = _warner(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle starts without the passes and results of the original.
        return {"options": self.options, "own_options": self.own_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PatchState.__init__(self, state["options"])
        self.own_options = state["own_options"]

    def innermost(self) -> Pass | None:
        """The running pass of this thread, or of the compiled region that it runs."""
        key = pass_key()
        return self.running[key] if key in self.running else self.running.get(_COMPILED)

    def current(self) -> Call | None:
        """The innermost pass, if it takes its loss out of the head."""
        innermost = self.innermost()
        return cast("Call", innermost) if innermost is not None and innermost.is_fused else None

    def opened_outside(self) -> bool:
        """Whether this is compiled code inside a forward that is not, and that is to be fused."""
        if not torch.compiler.is_compiling() or _COMPILED in self.running:
            return False
        return any(running.is_fused for running in self.running.values())

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Runs the stock forward of the head, whatever pass is running."""
        keys = (pass_key(), _COMPILED)
        saved = {key: self.running.pop(key) for key in keys if key in self.running}
        try:
            yield
        finally:
            self.running.update(saved)


def pass_key() -> int:
    """What a running pass is kept under: the thread, or that it is compiled."""
    return _COMPILED if torch.compiler.is_compiling() else threading.get_ident()


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
