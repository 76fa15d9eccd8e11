"""FSDP2 on two processes: gradients are those of one process, wherever the head is sharded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("fully_shard_worker.py")


@pytest.mark.parametrize(
    ("head_unit", "order", "tie"),
    [
        ("root", "before", "untied"),
        ("root", "after", "tied"),
        ("own", "before", "untied"),
        ("own", "after", "untied"),
    ],
)
def test_gradients_are_those_of_one_process(head_unit: str, order: str, tie: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, str(WORKER), head_unit, order, tie], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
