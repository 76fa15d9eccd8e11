"""Runs one of the worker files of this folder in two processes that talk over gloo."""

from __future__ import annotations

import os
import subprocess
import sys

from places import SUPPORT, environment


def run_in_two(
    *command: str, timeout_s: int = 300, place: str = "cpu"
) -> subprocess.CompletedProcess[str]:
    """Starts a program once a process, and waits.

    Args:
        *command: A file or `-m` and a module, with arguments.
        timeout_s: When to give up.
        place: Where they compute; see places.py.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, *launch, *command],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **environment(place), "PYTHONWARNINGS": "ignore"},
    )


def assert_worker_passes(
    worker: str, *arguments: str, timeout_s: int = 300, place: str = "cpu"
) -> None:
    """Fails with the first traceback of the processes, if one of them fails or hangs.

    Args:
        worker: Name of the file in this folder.
        *arguments: Of its command line.
        timeout_s: When to give up.
        place: Where they compute; see places.py.
    """
    done = run_in_two(str(SUPPORT / worker), *arguments, timeout_s=timeout_s, place=place)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[:6000]}"
