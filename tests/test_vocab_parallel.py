"""A head cut along the vocabulary on several processes: loss and gradients are those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import Failures, assert_passed, run_ranks
from vocab_parallel_worker import CASES

WORKER = Path(__file__).with_name("vocab_parallel_worker.py")


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    return run_ranks(WORKER, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(failures: Failures, name: str) -> None:
    assert_passed(failures, name)


@pytest.mark.slow
def test_four_processes_are_one(tmp_path: Path) -> None:
    assert run_ranks(WORKER, 4, tmp_path) == [{}] * 4
