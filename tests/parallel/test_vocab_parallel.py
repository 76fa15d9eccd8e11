"""A head cut along the vocabulary on several processes: loss and gradients are those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import EVERYWHERE, SUPPORT
from ranks import assert_passed, run_ranks

WORKER = SUPPORT / "vocab_parallel_worker.py"
# Where processes share a GPU: its own kernels, few of them, since each takes seconds to compile.
OF_A_SHARED_GPU = (
    *("triton-plain", "triton-everything", "triton-per_token_everything", "triton-statistics"),
    *("triton-far", "triton-ignored", "triton-boundary_labels", "triton-each_dtype"),
    *(f"triton-{what}-{how}" for what in ("schedule", "parts") for how in ("chunks", "hybrid")),
    "the_forward_sends_at_most_8_bytes_a_token",
)


# One test of all cases: workers of pytest would each start the processes for their share of them.
@pytest.mark.parametrize("place", EVERYWHERE)
def test_two_processes_are_one(place: str, tmp_path: Path) -> None:
    cases = OF_A_SHARED_GPU if place == "shared" else ()
    assert_passed(run_ranks(WORKER, 2, tmp_path, *cases, place=place))


def test_four_processes_agree(tmp_path: Path) -> None:
    cases = ("reference-plain", "torch-per_token", "torch-boundary_labels")
    error = "an_error_on_one_rank_is_an_error_on_every_rank"
    assert_passed(run_ranks(WORKER, 4, tmp_path, *cases, error))


@pytest.mark.slow
def test_four_processes_are_one(tmp_path: Path) -> None:
    assert_passed(run_ranks(WORKER, 4, tmp_path))
