"""A card whose results nobody has seen: the first call checks itself, once, and is believed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="needs triton (pip install triton)")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1 only", allow_module_level=True)

from hf_fused_head.engines import select
from hf_fused_head.engines.triton_engine import first_use
from hf_fused_head.planning.cards import card_of_type

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nothing_checked() -> Iterator[None]:
    first_use._checked.cache_clear()
    yield
    first_use._checked.cache_clear()


@pytest.mark.parametrize("product", ["epilogue", "tile"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_results_are_not_objected_to(dtype: torch.dtype, product: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert first_use.objection(CPU, dtype, product) is None


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (lambda stats, grads: (stats._replace(nll=stats.nll * 1.001), grads), "loss"),
        (lambda stats, grads: (stats, [grads[0] * 1.1, *grads[1:]]), "dX"),
        (lambda stats, grads: (stats, [grads[0], grads[1].roll(1, 0), *grads[2:]]), "dW"),
        (lambda stats, grads: (stats, [grads[0], grads[1] / 0, *grads[2:]]), "dW"),
        (lambda stats, grads: [][0], "IndexError"),
    ],
    ids=["loss", "scaled", "shifted", "not finite", "raises"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_result_is_named_once(dtype, fault, named, monkeypatch) -> None:
    run, calls = first_use.engine.stats_and_grads, []

    def faulty(*arguments):
        calls.append(arguments)
        return fault(*run(*arguments))

    monkeypatch.setattr(first_use.engine, "stats_and_grads", faulty)
    with pytest.warns(UserWarning, match="impl='torch'") as warned:
        found = [first_use.objection(CPU, dtype, "tile") for _ in range(3)]
    assert [w.category for w in warned].count(UserWarning) == len(calls) == 1
    assert named in found[0] and found == 3 * found[:1]


def test_nothing_around_the_first_call_sees_the_check() -> None:
    with FlopCounterMode(display=False) as counter:
        assert first_use.objection(CPU, torch.float32, "tile") is None
    assert counter.get_total_flops() == 0
    with FakeTensorMode():
        assert first_use.objection(CPU, torch.bfloat16, "tile") is None
    with torch.autocast("cpu", torch.bfloat16):
        assert first_use.objection(CPU, torch.float16, "tile") is None
    before = torch.get_rng_state()
    assert first_use.objection(CPU, torch.bfloat16, "epilogue") is None
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("objection", [None, "the Triton kernels failed their check"])
def test_auto_takes_a_card_that_nobody_has_seen_after_its_check(objection, monkeypatch) -> None:
    """Also one with Hopper's kernels switched off: the library's products, and the check first."""
    asked = []
    monkeypatch.setattr(select, "card_of", lambda device: card_of_type("cuda"))
    monkeypatch.setattr(select, "triton_obstacle", lambda device_type, dtype: None)
    monkeypatch.setattr(
        first_use, "objection", lambda *question: asked.append(question) or objection
    )
    choice = select.resolve_impl("auto", "cuda", torch.bfloat16)
    assert asked == [(torch.device("cuda"), torch.bfloat16, "tile")]
    if objection is None:
        assert choice.name == "triton:tile" and "checked against float64" in choice.reason
    else:
        assert choice.name == "torch" and choice.reason == objection
    # Whoever asks for an engine by name gets it.
    assert select.resolve_impl("triton", "cuda", torch.bfloat16).name == "triton:tile"
    assert select.resolve_impl("triton:epilogue", "cuda", torch.bfloat16).product == "epilogue"
    assert len(asked) == 1
