"""What an engine ran, for a caller that the engine's tensors do not tell it.

The engines run inside opaque operators, which return tensors alone. A caller opens a record around
the call; the engine is noted where it is looked up, and its schedule where it is planned. A record
belongs to one thread and to one `with` block. Without an open one nothing is kept. A compiled
forward has none: the compiler traces the block, but only the operator runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_fused_head.engines.select import Choice
    from hf_fused_head.planning.schedule import Schedule


@dataclass
class RunRecord:
    """The last loss inside a `recording` block.

    Attributes:
        choice: The engine, and why; None if no operator ran.
        schedule: How it computed the loss; None if no token counts.
    """

    choice: Choice | None = None
    schedule: Schedule | None = None


_open: ContextVar[RunRecord | None] = ContextVar("open_run_record", default=None)


@contextlib.contextmanager
def recording() -> Iterator[RunRecord]:
    """Yields a record that the engines fill inside the block, in this thread."""
    record = RunRecord()
    token = _open.set(record)
    try:
        yield record
    finally:
        _open.reset(token)


def note_engine(choice: Choice) -> None:
    """Called with the engine of an operator, before it runs."""
    record = _open.get()
    if record is not None:
        record.choice, record.schedule = choice, None


def note_schedule(schedule: Schedule | None) -> None:
    """Called by an engine with the schedule that it follows; None if it has nothing to compute."""
    record = _open.get()
    if record is not None:
        record.schedule = schedule
