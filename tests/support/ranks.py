"""Several processes of one worker: started once, with many cases, each told apart in the end."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from places import environment, settle

Failures = list[dict[str, str]]


def run_ranks(worker: Path, ranks: int, folder: Path, *cases: str, place: str = "cpu") -> Failures:
    """Runs `worker` once a rank at a place; what failed on each rank, by the name of the case."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(ranks), str(folder), *cases],
            env={**os.environ, **environment(place), **_environment(rank, ranks)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        if process.returncode:
            raise AssertionError(f"rank {rank}: {outputs[rank][-3000:]}")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def _environment(rank: int, ranks: int) -> dict[str, str]:
    """What a launcher tells a process; transformers reads the sizes of its plans from it."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    return {name: str(value) for name, value in places.items()}


def assert_passed(failures: Failures) -> None:
    """Fails with what every rank has left of the cases."""
    lines = [
        f"rank {rank}, {name}: {text}"
        for rank, failed in enumerate(failures)
        for name, text in failed.items()
    ]
    if lines:
        raise AssertionError("\n".join(lines))


def run_cases(
    cases: dict[str, Callable[[], None]], rank: int, ranks: int, folder: Path, chosen: list[str]
) -> None:
    """In the worker: runs the cases and leaves what failed, by name, in a file of this rank."""
    dist.init_process_group(settle(rank), f"file://{folder}/meet", rank=rank, world_size=ranks)
    failed = {}
    for name in chosen or cases:
        torch.manual_seed(0)
        try:
            cases[name]()
        except Exception:
            failed[name] = traceback.format_exc()
    (folder / f"rank{rank}.json").write_text(json.dumps(failed))
    # The traceback of an error that a case expected is garbage that still holds the group: with it
    # gloo's threads outlive the interpreter, which aborts the process.
    gc.collect()
    dist.destroy_process_group()


@contextmanager
def refused(error: type[Exception], text: str) -> Iterator[None]:
    """Fails unless this rank raises `error` with `text`."""
    try:
        yield
    except error as raised:
        if text not in str(raised):
            raise AssertionError(f"got {raised}") from raised
    else:
        raise AssertionError(f"no {error.__name__}")
