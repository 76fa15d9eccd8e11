"""Tensor parallel models on two processes: patched, they train as stock does in one."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import ON_TWO_DEVICES, SUPPORT
from ranks import assert_passed, run_ranks

pytestmark = pytest.mark.newest

WORKER = SUPPORT / "tensor_parallel_worker.py"


# One test of all cases: workers of pytest would each start the processes for their share of them.
@pytest.mark.parametrize("place", ON_TWO_DEVICES)
def test_two_processes_are_one(place: str, tmp_path: Path) -> None:
    assert_passed(run_ranks(WORKER, 2, tmp_path, place=place))


@pytest.mark.slow
def test_two_processes_compile_down_to_autograd(tmp_path: Path) -> None:
    cases = ("compiled-aot_eager", "compiled-sequence-aot_eager")
    assert_passed(run_ranks(WORKER, 2, tmp_path, *cases))


@pytest.mark.slow
def test_four_processes_are_sharded_in_two_dimensions(tmp_path: Path) -> None:
    assert_passed(run_ranks(WORKER, 4, tmp_path, "fully_sharded_over_every_grid"))
