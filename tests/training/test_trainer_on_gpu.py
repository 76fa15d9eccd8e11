"""The real Trainer with the flags that everybody sets: fused losses and weights beside stock's.

Settings of a process must not reach the next case, so each runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_trainer_worker import CASES
from places import SUPPORT, environment

pytestmark = pytest.mark.newest


# fp16's scaler, TF32 and most quantised bodies need a GPU.
ON_THE_CPU = ["fp32", "bf16", "compile", "accumulation", "lora", "dora", "softcap"]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *((name, "cpu") for name in ON_THE_CPU),
        *(pytest.param(name, "shared", marks=pytest.mark.gpu) for name in CASES),
    ],
)
def test_trains_as_stock_does(name: str, place: str, tmp_path: Path) -> None:
    if CASES[name].bits:
        reason = "needs bitsandbytes (pip install bitsandbytes)"
        pytest.importorskip("bitsandbytes", reason=reason)
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "gpu_trainer_worker.py"), name, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, **environment(place)},
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-5000:]}"
