"""A check of this machine: does every implementation agree with float64, and what would run."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from hf_fused_head.benchmark import accuracy, contenders, measure
from hf_fused_head.benchmark.accuracy import Errors, Result
from hf_fused_head.benchmark.columns import number
from hf_fused_head.benchmark.terminal import Grid
from hf_fused_head.benchmark.workloads import Batch, Workload, make_batch
from hf_fused_head.engines.select import resolve_impl

IMPLS = ("triton:epilogue", "triton:tile", "torch", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# No size is a multiple of a tile, and a quarter of the labels is ignored.
_PROBLEM = Workload("self-check", 301, 192, 1031, "float32", "self-check")
_IGNORED = 0.25


@dataclass(frozen=True)
class Check:
    """One implementation in one dtype: "passed", "failed" or "unavailable", and the evidence.

    Errors are relative (Frobenius norm) against float64; `stock_*` are those of plain torch in the
    same dtype. `first_call_ms` includes compilation, unless a compiled kernel was in the cache.
    """

    impl: str
    dtype: str
    status: str
    reason: str
    loss_error: float | None = None
    dhidden_error: float | None = None
    dweight_error: float | None = None
    stock_loss_error: float | None = None
    stock_dhidden_error: float | None = None
    stock_dweight_error: float | None = None
    first_call_ms: float | None = None
    second_call_ms: float | None = None


@dataclass(frozen=True)
class AutoChoice:
    """What `impl="auto"` means for one dtype on this device, and why."""

    dtype: str
    impl: str
    reason: str


def auto_choices(device: torch.device) -> list[AutoChoice]:
    """The choice of "auto" for every dtype."""
    choices = {dtype: resolve_impl("auto", device, dtype) for dtype in DTYPES}
    return [AutoChoice(_name(dtype), it.name, it.reason) for dtype, it in choices.items()]


def self_checks(device: torch.device) -> list[Check]:
    """Every implementation in every dtype on `device`, loss and both gradients."""
    checks = []
    for dtype in DTYPES:
        batch = make_batch(_PROBLEM, dtype, device, _IGNORED)
        truth = accuracy.truth_of(batch, "fwd+bwd")
        stock = accuracy.errors_of_stock(accuracy.plain_result(batch, "fwd+bwd", dtype), truth)
        checks += [_check(impl, batch, truth, stock) for impl in IMPLS]
    return checks


def _check(impl: str, batch: Batch, truth: Result, stock: Errors) -> Check:
    dtype = batch.hidden.dtype
    try:
        step = contenders.ours(impl).prepare(batch, "fwd+bwd")
    except contenders.Unavailable as obstacle:
        return Check(impl, _name(dtype), "unavailable", str(obstacle))
    begin = time.perf_counter()
    try:
        step()
        measure.synchronize(batch.hidden.device)
        first_call_ms = (time.perf_counter() - begin) * 1e3
        with measure.poisoned():
            result = step()
        second_call_ms = measure.time_ms(step, batch.hidden.device)
    except contenders.FAILURES as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return Check(impl, _name(dtype), "failed", reason)
    errors = accuracy.errors_of(result, truth)
    found = accuracy.objections(errors, stock, dtype)
    return Check(
        impl,
        _name(dtype),
        "failed" if found else "passed",
        "; ".join(found) or "as near to float64 as plain torch",
        *errors,
        *stock,
        round(first_call_ms, 3),
        round(second_call_ms, 3),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lines(content: dict) -> list[str]:
    """Versions and devices in words."""
    versions = [f"{name} {found or 'not installed'}" for name, found in content["versions"].items()]
    devices = [
        f"{device['device']}: "
        + ", ".join(f"{key} {value}" for key, value in device.items() if key != "device")
        for device in content["devices"]
    ]
    return versions + devices


def tables(content: dict) -> list[Grid]:
    """What "auto" chooses, and the evidence of the self-check."""
    names = ("dtype", "impl", "reason")
    choices = [[choice[name] for name in names] for choice in content["auto"]]
    rows = []
    for check in content["checks"]:
        errors = [
            _beside_stock(check[f"{name}_error"], check[f"stock_{name}_error"])
            for name in ("loss", "dhidden", "dweight")
        ]
        times = [number(check[f"{call}_call_ms"], ".1f") for call in ("first", "second")]
        verdict = [check["impl"], check["dtype"], check["status"]]
        rows.append([*verdict, *errors, *times, check["reason"]])
    columns = (
        "impl",
        "dtype",
        "status",
        "loss error (stock)",
        "dX error (stock)",
        "dW error (stock)",
        "first call ms",
        "second call ms",
        "reason",
    )
    words = ("impl", "dtype", "status", "reason")
    return [
        Grid(f"impl='auto' on {content['checked_device']}", names, choices, words=names),
        Grid("self-check against float64", columns, rows, words=words, keys=2),
    ]


def _beside_stock(ours: float | None, stock: float | None) -> str:
    return "" if ours is None else f"{ours:.1e} ({number(stock, '.1e')})"
