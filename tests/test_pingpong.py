"""The ping-pong kernel where there is no Hopper card: the compiler takes it, and it fits one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

fused = pytest.importorskip("hf_fused_head.engines.triton_engine.engine", reason="needs triton")
tuning = pytest.importorskip("hf_fused_head.kernels.tuning", reason="needs triton")

# The most that one program may have there.
HOPPER_SHARED_BYTES = 227 * 1024


@pytest.mark.skipif(not tuning.knows_gluon(), reason="this Triton's Gluon is not used")
def test_it_compiles_for_a_hopper_card(tmp_path: Path) -> None:
    """With whatever Triton is installed: Gluon promises no stability."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_for_hopper.py"))],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: (int(a), int(b)) for name, a, b in map(str.split, done.stdout.splitlines())}
    assert list(found) == ["stored", "statistics", "everything", "gradient", "last_product"]
    assert max(shared for shared, _ in found.values()) <= HOPPER_SHARED_BYTES
    # What training runs keeps its tile in registers. The statistics set 14 of 128 aside once a tile
    # (Triton 3.9; none before), outside the loop of products; rare options may spill some of it.
    assert found["stored"][1] == found["last_product"][1] == 0
    assert found["statistics"][1] <= 64


@pytest.mark.parametrize(
    ("version", "known"), [("3.5.1", False), ("3.6.0", True), ("3.9.0", True), ("3.10.0", False)]
)
def test_only_known_versions_of_gluon_are_used(
    version: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a card that therefore runs an older kernel is told."""
    monkeypatch.setattr(tuning.triton, "__version__", version)
    assert tuning.knows_gluon() == known
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert (fused.slower_reason(torch.bfloat16) is None) == known
    assert known or version in fused.slower_reason(torch.bfloat16)
    assert fused.slower_reason(torch.float32) is None
