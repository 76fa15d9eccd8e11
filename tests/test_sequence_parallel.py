"""Sequence and context parallelism on two processes: parts sum up to whole sequences."""

from __future__ import annotations

from pathlib import Path

from two_processes import assert_worker_passes


def test_parts_of_sequences_train_and_evaluate_as_whole_ones(tmp_path: Path) -> None:
    """Boundary tokens, parts without a token, Ulysses' mean, and the Trainer's context parallel."""
    assert_worker_passes("sequence_worker.py", str(tmp_path))
