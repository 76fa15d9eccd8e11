"""`FusedHeadTrainer` on two processes that share weights or sequences: as one process trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_engines import needs_deepspeed
from two_processes import assert_worker_passes

pytestmark = pytest.mark.newest


@pytest.mark.parametrize(
    "engines",
    [
        ("fsdp2", "cp"),
        ("tp",),
        pytest.param(("zero2", "zero3", "ulysses"), marks=needs_deepspeed),
    ],
    ids=" ".join,
)
def test_losses_weights_metrics_and_checkpoints(engines: tuple[str, ...], tmp_path: Path) -> None:
    """Under context parallelism also sequences split by hand, with parts that have no token."""
    assert_worker_passes("trainer_worker.py", str(tmp_path), *engines)
