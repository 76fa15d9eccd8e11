"""`linear_kl_div`, impl="torch": bounded memory, and no work that is not needed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from live_spy import LiveSpy, Poisoned
from plain_divergence import (
    NAMES,
    Pair,
    by_ours,
    results,
)
from torch import Tensor

from hf_fused_head.run_record import recording

IMPLS = ("reference", "torch")
BETAS = (0.0, 0.3, 0.5, 1.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
SHAPED = {
    "temperature": 1.7,
    "student_logit_scale": 0.7,
    "student_softcap": 3.0,
    "teacher_logit_scale": 1.2,
    "teacher_softcap": 2.0,
}
LARGE = Pair(shape=(200,), vocab_size=1031, masked=9)
SMALLEST_MIB = 0.001


def test_a_smaller_budget_takes_more_chunks() -> None:
    pair = Pair(shape=(400,), vocab_size=1031, masked=0)
    tensors, chunks = pair.tensors(torch.float32), []
    for mib in (SMALLEST_MIB, 1.0, 1024.0):
        with recording() as record:
            by_ours(pair, "torch", mib)(tensors)
        assert record.schedule is not None and record.choice is not None
        assert record.choice.impl == "torch"
        assert record.schedule.fits == (mib > SMALLEST_MIB)
        assert ("was raised" in record.schedule.reason) == (mib == SMALLEST_MIB)
        chunks.append(record.schedule.chunk_tokens)
    assert chunks == sorted(set(chunks))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", [{}, SHAPED], ids=["plain", "shaped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mib", [SMALLEST_MIB, 1.5, 4.0, 1024.0])
def test_memory_stays_within_the_plan(
    beta: float, options: dict[str, Any], dtype: torch.dtype, mib: float
) -> None:
    pair = Pair((400,), (24, 40), 2053, masked=0, options={"beta": beta, **options})
    tensors = pair.tensors(dtype)
    for name in NAMES:
        tensors[name].requires_grad_()
    with recording() as record, LiveSpy() as spy:
        _run(by_ours(pair, "torch", mib), tensors)
    assert record.schedule is not None
    gradients = sum(tensors[name].numel() * tensors[name].element_size() for name in NAMES)
    allowed = record.schedule.workspace_bytes + gradients
    assert spy.peak <= allowed, f"{spy.peak} bytes alive, {allowed} planned"
    assert spy.largest * 4 < 400 * 2053 * tensors["student"].element_size() * 4
    if record.schedule.fits:
        assert allowed <= mib * 2**20 + gradients


def _run(divergence: Any, tensors: dict[str, Tensor]) -> None:
    """The forward, with the operator's body under the modes that are on."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with _Inside(keys):
        divergence(tensors)


class _Inside(torch.utils._python_dispatch.TorchDispatchMode):
    """Runs operators of ours with the other modes still on, so that these see what is inside."""

    def __init__(self, keys: Any) -> None:
        super().__init__()
        self.keys = keys

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hf_fused_head":
            return func.redispatch(self.keys, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_the_spy_sees_a_full_matrix() -> None:
    pair = Pair((400,), (24, 40), 2053, masked=0)
    with LiveSpy() as spy:
        _run(by_ours(pair, "reference"), pair.tensors(torch.float32))
    assert spy.largest >= 400 * 2053 * 4


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("mib", [SMALLEST_MIB, 1024.0])
def test_nothing_reads_memory_before_it_was_written(beta: float, mib: float) -> None:
    pair = LARGE.with_options(beta=beta, **SHAPED)
    tensors = pair.tensors(torch.bfloat16)
    plain = results(by_ours(pair, "torch", mib), tensors)
    with Poisoned(), _Inside(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)):
        poisoned = results(by_ours(pair, "torch", mib), tensors)
    for name, value in plain.items():
        assert torch.equal(value, poisoned[name]), name


PRODUCTS = {"addmm", "mm"}


@pytest.mark.parametrize("subset", list(itertools.product((False, True), repeat=2)))
def test_frozen_parts_cost_no_product(subset: tuple[bool, bool]) -> None:
    tensors = LARGE.tensors(torch.float32)
    for name, want in zip(NAMES, subset, strict=False):
        tensors[name].requires_grad_(want)
    with recording() as record, LiveSpy() as spy:
        _run(by_ours(LARGE, "torch"), tensors)
    assert record.schedule is not None
    chunks = -(-(200 - LARGE.masked) // record.schedule.chunk_tokens)
    count = sum(name in PRODUCTS for name in spy.operators)
    assert count == chunks * (2 + sum(subset)) == chunks * record.schedule.passes
