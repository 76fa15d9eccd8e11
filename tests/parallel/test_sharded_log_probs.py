"""Log-probabilities of a head sharded along the vocabulary are those of the whole head."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import SUPPORT
from ranks import assert_passed, run_ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_shard_is_the_whole(ranks: int, tmp_path: Path) -> None:
    assert_passed(run_ranks(SUPPORT / "sharded_log_probs_worker.py", ranks, tmp_path))
