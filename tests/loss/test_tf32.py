"""TF32 as torch does it: by whichever of its APIs a setting was made, and none is ever changed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from places import SUPPORT, environment

from hf_fused_head.benchmark import accuracy
from hf_fused_head.benchmark.workloads import Workload, make_batch

pytest.importorskip("triton", reason="needs triton (pip install triton)")


def assert_passes(*check: str, place: str) -> None:
    """Fails with what the worker says; settings are those of a process, so it is one of its own."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "tf32_worker.py"), *check],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, **environment(place)},
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[:6000]}"


def test_every_engine_runs_under_every_setting_and_changes_none() -> None:
    """Each setting and each pair of them, in both orders."""
    assert_passes("runs", place="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [(), *((i,) for i in range(12)), (0, 6), (1, 5), (10, 1)])
def test_the_head_rounds_to_tf32_where_products_of_torch_do(settings: tuple[int, ...]) -> None:
    """After `SETTINGS` of the worker: each alone, and mixtures of the APIs."""
    assert_passes("computes", *map(str, settings), place="shared")


def test_the_truth_of_the_benchmark_needs_no_older_api(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a setting by the newer API, which makes reading the older one raise."""
    matmul = torch.backends.cuda.matmul
    batch = make_batch(Workload("", 20, 16, 37, "float32", ""), torch.float32, torch.device("cpu"))
    used = []
    plain_result = accuracy.plain_result

    def recorded(*given: object) -> accuracy.Result:
        used.append(matmul.fp32_precision)
        return plain_result(*given)

    monkeypatch.setattr(accuracy, "plain_result", recorded)
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        accuracy.truth_of(batch, "fwd")
        assert used == ["ieee"] and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
