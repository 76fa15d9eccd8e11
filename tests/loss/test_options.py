"""Options check themselves, and an engine is used or refused by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from typing import Any

import numpy as np
import pytest
import torch

from hf_fused_head.engines import select
from hf_fused_head.engines.select import resolve_impl, triton_obstacle
from hf_fused_head.options import LossOptions
from hf_fused_head.planning.cards import HOPPER

GOOD = {
    "reduction": ("mean", "sum", "none"),
    "ignore_index": (-100, 0, 7),
    "label_smoothing": (0.0, 0.1, 1),
    "logit_scale": (1.0, 0.0625, -2),
    "softcap": (None, 30.0, 5),
    "z_loss": (0.0, 1e-4),
}
BAD = [
    ("reduction", "max", ValueError, "`reduction` must be one of"),
    ("ignore_index", 1.5, TypeError, "`ignore_index` must be an int, got 1.5"),
    ("ignore_index", True, TypeError, "`ignore_index` must be an int, got True"),
    ("ignore_index", np.bool_(True), TypeError, "`ignore_index` must be an int, got True"),
    ("ignore_index", np.array([1, 2]), TypeError, "`ignore_index` must be an int, got array"),
    ("label_smoothing", -0.1, ValueError, r"`label_smoothing` must lie in \[0, 1\], got -0.1"),
    ("label_smoothing", 1.1, ValueError, r"`label_smoothing` must lie in \[0, 1\], got 1.1"),
    ("label_smoothing", "0.1", TypeError, "`label_smoothing` must be a number, got '0.1'"),
    ("logit_scale", float("nan"), ValueError, "`logit_scale` must be finite, got nan"),
    ("logit_scale", None, TypeError, "`logit_scale` must be a number, got None"),
    ("softcap", 0.0, ValueError, "`softcap` must be positive or None, got 0.0"),
    ("softcap", -30, ValueError, "`softcap` must be positive or None, got -30"),
    ("softcap", float("inf"), ValueError, "`softcap` must be positive or None, got inf"),
    ("z_loss", -1e-4, ValueError, "`z_loss` must be at least 0 and finite, got -0.0001"),
]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD.items() for v in values])
def test_an_option_takes_its_values(name: str, value: object) -> None:
    assert getattr(LossOptions(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ignore_index", np.int64(-1)),
        ("ignore_index", np.array(7)),
        ("label_smoothing", np.float32(0.25)),
        ("logit_scale", np.float64(0.5)),
        ("softcap", np.array(30.0)),
        ("z_loss", np.array([0.5])),
    ],
)
def test_an_option_takes_numbers_of_numpy(name: str, value: Any) -> None:
    taken = getattr(LossOptions(**{name: value}), name)
    assert isinstance(taken, (int, float))
    assert taken == value


def test_no_ignored_index_is_that_of_torch() -> None:
    assert LossOptions(ignore_index=None) == LossOptions()  # pyright: ignore


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD)
def test_an_option_refuses_others_by_name(
    name: str, value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LossOptions(**{name: value})


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LossOptions().z_loss = 1.0


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("device", ["cpu", "cuda", torch.device("cpu")])
def test_the_torch_engines_run_on_any_device(impl: str, device: object) -> None:
    assert resolve_impl(impl, device, torch.bfloat16).impl == impl


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`impl` must be one of .* got 'cuda'"):
        resolve_impl("cuda", "cpu", torch.float32)


def test_auto_says_why() -> None:
    choice = resolve_impl("auto", "cpu", torch.float32)
    assert choice.impl == "torch"
    assert "cpu" in choice.reason


def test_triton_is_refused_with_the_reason_or_used() -> None:
    obstacle = triton_obstacle("cpu", torch.float64)
    assert obstacle is not None
    with pytest.raises(NotImplementedError, match=r"'triton': .*; use impl='torch'"):
        resolve_impl("triton", "cpu", torch.float64)


def test_auto_works_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    choice = resolve_impl("auto", "cuda", torch.bfloat16)
    assert choice.impl == "torch"
    assert "triton is not installed" in choice.reason
    with pytest.raises(NotImplementedError, match="triton is not installed"):
        resolve_impl("triton", "cuda", torch.bfloat16)


def test_auto_takes_triton_on_cuda_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = type(sys)("hf_fused_head.engines.triton_engine.engine")
    fused.unavailable_reason = lambda device_type, dtype: None
    fused.slower_reason = lambda dtype: "an older kernel runs"
    monkeypatch.setitem(sys.modules, "hf_fused_head.engines.triton_engine.engine", fused)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(select, "card_of", lambda device: HOPPER)
    choice = resolve_impl("auto", "cuda", torch.bfloat16)
    assert choice.impl == "triton" and choice.reason.endswith("; an older kernel runs")
    fused.slower_reason = lambda dtype: None
    assert "older" not in resolve_impl("auto", "cuda", torch.bfloat16).reason
    assert resolve_impl("auto", "cuda", torch.bfloat16).product == "epilogue"
    # float32 products have no kernel that is as fast as the library.
    assert resolve_impl("auto", "cuda", torch.float32).product == "tile"
    assert resolve_impl("auto", "cpu", torch.bfloat16).impl == "torch"
    assert resolve_impl("triton", "cpu", torch.bfloat16).impl == "triton"
