"""Tensor parallel models on two processes: patched, they train as stock does in one."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import ON_TWO_DEVICES
from ranks import assert_passed, run_ranks

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")


# One test of all cases: workers of pytest would each start the processes for their share of them.
@pytest.mark.parametrize("place", ON_TWO_DEVICES)
def test_two_processes_are_one(place: str, tmp_path: Path) -> None:
    assert_passed(run_ranks(WORKER, 2, tmp_path, place=place))
