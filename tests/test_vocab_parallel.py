"""A head cut along the vocabulary on several processes: loss and gradients are those of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vocab_parallel_worker import CASES

WORKER = Path(__file__).with_name("vocab_parallel_worker.py")


def run_ranks(ranks: int, folder: Path, *arguments: str) -> list[dict[str, str]]:
    """Runs the worker once a rank; what failed on each, by the name of the case."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(ranks), str(folder), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank}: {outputs[rank][-3000:]}"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks(2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(failures: list[dict[str, str]], name: str) -> None:
    for rank, failed in enumerate(failures):
        assert name not in failed, f"rank {rank}: {failed[name]}"


@pytest.mark.slow
def test_four_processes_are_one(tmp_path: Path) -> None:
    assert run_ranks(4, tmp_path) == [{}] * 4
