"""`FusedHeadTrainer` on two processes that share weights or sequences: as one process trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from data_parallel import needs_deepspeed
from packaging.version import Version
from two_processes import assert_worker_passes

pytestmark = pytest.mark.newest

knows_models_cut_when_loaded = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="a Trainer before 5.23 is not known to take a model that is cut when it is loaded",
)


@pytest.mark.parametrize(
    "engines",
    [
        ("fsdp2", "cp"),
        ("tp",),
        pytest.param(("fsdp2_at_load",), marks=knows_models_cut_when_loaded),
        pytest.param(("zero2", "zero3", "ulysses"), marks=needs_deepspeed),
    ],
    ids=" ".join,
)
def test_losses_weights_metrics_and_checkpoints(engines: tuple[str, ...], tmp_path: Path) -> None:
    """Under context parallelism also sequences split by hand, with parts that have no token."""
    assert_worker_passes("trainer_worker.py", str(tmp_path), *engines)
