"""Data parallel engines on two processes: everything is as on one, and as in a stock model."""

from __future__ import annotations

import pytest
from two_processes import assert_worker_passes


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2"])
def test_engine_trains_evaluates_resumes_and_unpatches(engine: str) -> None:
    """Every way to shard, to train and to patch: see `CASES` of the worker."""
    assert_worker_passes("engines_worker.py", engine)
