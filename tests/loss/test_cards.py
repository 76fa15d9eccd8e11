"""Cards that are not here: their kernels compile and fit, and a GPU runs what older ones would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import SUPPORT, environment

pytest.importorskip("triton", reason="needs triton (pip install triton)")

KIB = 1024
# Shared memory that one program may have there, as the vendors state it.
SHARED_BYTES = {
    "sm_75": 64 * KIB,
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx90a": 64 * KIB,
    "gfx942": 64 * KIB,
    "gfx1100": 64 * KIB,
}
# Shared memory that the kernels take at most, the same on every card; those for rows that overflow
# take most of all, since they have a product.
NEEDED_BYTES = {
    "tile": 16 * KIB,
    "overflow": 17 * KIB,
    "finish": 2 * KIB,
    "anchor": 16,
    "count": 32,
}
# Products run without tensor cores of this kind there: rows that overflow are slow.
SPILLS = {("sm_75", "overflow")}


@pytest.mark.parametrize("card", SHARED_BYTES)
def test_kernels_for_any_card_compile_and_fit(card: str, tmp_path: Path) -> None:
    """With the Triton at hand, in every variant that training takes, and without a spill."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "compile_for_card.py"), "any", card],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split() for line in done.stdout.splitlines()]
    kinds = {name.partition("_")[0] for name, _, _ in found}
    assert kinds == {"tile", "anchor", "finish", "overflow", "count", "scale", "multiply"}
    for name, shared, spilled in found:
        kind = name.partition("_")[0]
        assert int(shared) <= NEEDED_BYTES.get(kind, 0) <= SHARED_BYTES[card], name
        assert int(spilled) == 0 or (card, kind) in SPILLS, name


@pytest.mark.gpu
@pytest.mark.parametrize("card", ["sm_80", "sm_89"])
def test_code_for_an_older_card_is_right_on_a_newer_one(card: str, tmp_path: Path) -> None:
    """Its PTX, compiled by the driver: what an A100 or a 4090 would run has run."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "older_card_worker.py"), card],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, **environment("shared"), "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-5000:]}"
    assert "tile: 7 kernels" in done.stdout
