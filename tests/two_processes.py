"""Runs one of the worker files of this folder in two processes that talk over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}


def assert_worker_passes(worker: str, *arguments: str, timeout_s: int = 300) -> None:
    """Fails with the first traceback of the processes, if one of them fails or hangs.

    Args:
        worker: Name of the file in this folder.
        *arguments: Of its command line.
        timeout_s: When to give up.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launch, str(TESTS / worker), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), **CPU_ONLY},
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[:6000]}"
