"""The kernels without a Hopper card: the compiler accepts them, and they fit one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import SUPPORT

fused = pytest.importorskip("hf_fused_head.engines.triton_engine.engine", reason="needs triton")
tuning = pytest.importorskip("hf_fused_head.kernels.tuning", reason="needs triton")

# The most that one program may have there.
HOPPER_SHARED_BYTES = 227 * 1024


def compiled(which: str, cache: Path) -> dict[str, tuple[int, int]]:
    """Bytes of shared memory and of stack a thread of the variants of some kernels, by name."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "compile_for_card.py"), which],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: (int(a), int(b)) for name, a, b in map(str.split, done.stdout.splitlines())}
    assert max(shared for shared, _ in found.values()) <= HOPPER_SHARED_BYTES
    return found


@pytest.mark.skipif(not tuning.supports_gluon(), reason="this Triton's Gluon is not used")
def test_cooperative_kernels_compile_for_a_hopper_card(tmp_path: Path) -> None:
    """With whatever Triton is installed: Gluon is no stable interface."""
    found = compiled("gluon", tmp_path)
    assert list(found) == ["stored", "statistics", "everything", "gradient", "last_product"]
    # What training runs keeps its tile in registers. The statistics spill 14 of 128 once a tile
    # (Triton 3.9; none before), outside the loop of products; rare options may spill more.
    assert found["stored"][1] == found["last_product"][1] == 0
    assert found["statistics"][1] <= 64


def test_the_other_kernels_compile_for_a_hopper_card(tmp_path: Path) -> None:
    """What the interpreter accepts, the compiler of an older Triton may refuse."""
    found = compiled("triton", tmp_path)
    assert {name.split("_")[0] for name in found} == {
        *("descriptor", "pointer", "anchor", "finish", "overflow")
    }
    assert found["pointer_stored"][1] == 0


@pytest.mark.parametrize(
    ("version", "supported"),
    [("3.5.1", False), ("3.6.0", True), ("3.9.0", True), ("3.10.0", False)],
)
def test_only_tested_versions_of_gluon_are_used(
    version: str, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another version `slower_reason` states that an older kernel runs."""
    monkeypatch.setattr(tuning.triton, "__version__", version)
    assert tuning.supports_gluon() == supported
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert (fused.slower_reason(torch.bfloat16) is None) == supported
    assert supported or version in fused.slower_reason(torch.bfloat16)
    assert fused.slower_reason(torch.float32) is None
