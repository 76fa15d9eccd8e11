"""Calls of `hf-fused-head` in this process, and the keys of what it writes."""

from __future__ import annotations

import pytest

from hf_fused_head import cli


def run(*arguments: object) -> int:
    """The exit status of a call."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code if isinstance(stop.value.code, int) else 1


def keys(value: object) -> set[tuple[str, type]]:
    """Every key of a document with the type of its value."""
    if isinstance(value, dict):
        inner = [keys(part) for part in value.values()]
        return {(key, type(part)) for key, part in value.items()}.union(*inner)
    return set().union(*map(keys, value)) if isinstance(value, list) else set()
