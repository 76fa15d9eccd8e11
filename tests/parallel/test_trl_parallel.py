"""TRL's protocol and trainers on two processes: as on one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs trl (pip install trl)")

from data_parallel import needs_deepspeed
from two_processes import assert_worker_passes


def test_values_per_token_under_every_engine() -> None:
    """The head in its own unit of FSDP2 too, where TRL's own head gets a wrong gradient."""
    assert_worker_passes("trl_engines_worker.py", "ddp", "fsdp1", "fsdp2")


@needs_deepspeed
def test_values_per_token_under_deepspeed() -> None:
    assert_worker_passes("trl_engines_worker.py", "deepspeed")


def test_trainers_in_ddp_and_fsdp2(tmp_path: Path) -> None:
    assert_worker_passes("trl_trainers_worker.py", str(tmp_path), "sft", "dpo", "kto", "grpo")
