"""The plan: within the budget, the same every time, and never worse for more memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hf_fused_head.planning.cards import card_of_type
from hf_fused_head.planning.problem import DEFAULT_MEMORY_BUDGET_MIB, Problem, budget_bytes
from hf_fused_head.planning.schedule import Schedule, plan, schedules

SHAPES = [
    (8192, 4096, 128256),
    (2048, 576, 49152),
    (8192, 640, 262144),
    (300, 64, 1031),
    (7, 8, 37),
    (1, 1, 1),
]
WANTED = [(True, True), (True, False), (False, True), (False, False)]


def problem_of(
    shape: tuple[int, int, int],
    device_type: str = "cpu",
    memory_budget_mib: float | None = None,
    **changes: Any,
) -> Problem:
    fields = {"dtype": torch.float32, "impl": "torch", **changes}
    card, size = card_of_type(device_type), budget_bytes(memory_budget_mib)
    return Problem(*shape, card=card, budget_bytes=size, **fields)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mib", [0.5, 16, 1024, 10**6])
def test_every_schedule_says_truly_whether_it_fits(
    shape: tuple[int, int, int], impl: str, dtype: torch.dtype, mib: float
) -> None:
    for wanted, per_token in itertools.product(WANTED, (False, True)):
        grads = {"grad_hidden": wanted[0], "grad_weight": wanted[1], "per_token": per_token}
        found = schedules(problem_of(shape, impl=impl, dtype=dtype, memory_budget_mib=mib, **grads))
        for schedule in found:
            assert schedule.fits == (schedule.workspace_bytes <= mib * 2**20)
            assert 1 <= schedule.chunk_tokens <= shape[0]
            assert 1 <= schedule.vocab_window <= shape[2]
            assert ("within the budget" in schedule.reason) == schedule.fits
        assert found[0].fits or not any(schedule.fits for schedule in found)
        assert ("raised" in found[0].reason) == (not found[0].fits)


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_memory_is_never_slower(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    plans = [
        plan(problem_of(shape, dtype=dtype, memory_budget_mib=mib))
        for mib in (16, 64, 256, 1024, 4096, 16384)
    ]
    assert [p.passes for p in plans] == sorted((p.passes for p in plans), reverse=True)


def test_the_plan_is_a_function_of_its_arguments() -> None:
    assert plan(problem_of(SHAPES[0])) == plan(problem_of(SHAPES[0]))
    assert plan(problem_of(SHAPES[0])) == plan(
        problem_of(SHAPES[0], memory_budget_mib=DEFAULT_MEMORY_BUDGET_MIB)
    )


@pytest.mark.parametrize(
    ("changes", "name", "passes"),
    [
        ({"grad_hidden": False, "grad_weight": False}, "loss_only", 1),
        ({}, "gradient_in_forward", 3),
        ({"grad_weight": False}, "gradient_in_forward", 2),
        ({"grad_hidden": False}, "gradient_in_forward", 2),
        ({"per_token": True}, "recompute", 4),
        ({"per_token": True, "grad_weight": False}, "recompute", 3),
        ({"memory_budget_mib": 8}, "recompute", 4),
    ],
)
def test_what_is_needed_decides_the_schedule(changes: dict, name: str, passes: float) -> None:
    schedule = plan(problem_of((2048, 576, 49152), **changes))
    assert (schedule.name, schedule.passes) == (name, passes)
    assert schedule.fits


@pytest.mark.parametrize("shape", SHAPES)
def test_the_torch_engine_never_holds_a_quarter_of_the_logits(shape: tuple[int, int, int]) -> None:
    num_tokens, _, vocab_size = shape
    for schedule in schedules(problem_of(shape, memory_budget_mib=10**9)):
        columns = vocab_size if schedule.name == "gradient_in_forward" else schedule.vocab_window
        if num_tokens >= 64:
            assert schedule.chunk_tokens * columns * 4 < num_tokens * vocab_size


def test_triton_offers_to_keep_a_share() -> None:
    found = schedules(
        problem_of((8192, 4096, 128256), impl="triton", device_type="cuda", dtype=torch.bfloat16)
    )
    by_name = {schedule.name: schedule for schedule in found}
    assert set(by_name) == {"gradient_in_forward", "recompute", "hybrid"}
    hybrid = by_name["hybrid"]
    assert 0 < hybrid.kept_share < 1
    assert hybrid.passes == 4 - hybrid.kept_share


def test_the_tile_of_a_chunk_is_gone_before_the_heads_gradient_is_rounded() -> None:
    """So the two share memory: what is beyond gradients is less than tile and float32 sum."""
    tokens, hidden, vocab = 16384, 1024, 151936
    change = {"impl": "triton", "device_type": "cuda", "dtype": torch.bfloat16}
    schedule = plan(problem_of((tokens, hidden, vocab), **change, memory_budget_mib=1536))
    assert schedule.name == "gradient_in_forward"
    assert schedule.chunk_tokens == 4096
    tile, float32_sum = 4096 * vocab * 2, vocab * hidden * 4
    assert schedule.late_rounding
    assert float32_sum <= schedule.workspace_bytes < tile + float32_sum


def test_a_budget_that_holds_tile_sum_and_gradient_saves_the_rounding() -> None:
    tokens, hidden, vocab = 16384, 1024, 151936
    change = {"impl": "triton", "device_type": "cuda", "dtype": torch.bfloat16}
    schedule = plan(problem_of((tokens, hidden, vocab), **change, memory_budget_mib=4096))
    assert (schedule.chunk_tokens, schedule.late_rounding) == (8192, False)
    assert schedule.workspace_bytes >= 8192 * vocab * 2 + vocab * hidden * 4


def test_several_chunks_on_a_gpu_are_no_larger_than_is_fast() -> None:
    """However large the budget is, until it holds all tokens at once."""
    change = {"impl": "triton", "device_type": "cuda", "dtype": torch.bfloat16}
    chunks = {
        tokens: [
            plan(problem_of((tokens, 4096, 128256), **change, memory_budget_mib=mib)).chunk_tokens
            for mib in (3072, 4096, 6144, 9216)
        ]
        for tokens in (32768, 131072)
    }
    assert chunks == {32768: [8192, 8192, 8192, 32768], 131072: [8192, 8192, 8192, 8192]}


@pytest.mark.parametrize("memory_budget_mib", [1024, 1536, 4096])
def test_the_products_of_a_chunk_fill_a_gpu(memory_budget_mib: float) -> None:
    """One that leaves an eighth of its 132 multiprocessors idle is not taken."""
    change = {"impl": "triton", "device_type": "cuda", "dtype": torch.bfloat16}
    shape = (16384, 1024, 151936)
    schedule = plan(
        problem_of(shape, **change, grad_weight=False, memory_budget_mib=memory_budget_mib)
    )
    tiles = schedule.chunk_tokens // 128 * 1024 // 128
    assert tiles / (-(-tiles // 132) * 132) > 7 / 8


def test_a_frozen_matrix_of_a_sum_needs_no_sum_of_its_gradient() -> None:
    shape, low_rank = (2048, 4096, 128256), 16
    change = {"dtype": torch.bfloat16, "device_type": "cuda"}
    whole = plan(problem_of(shape, **change))
    adapter = plan(problem_of(shape, **change, grad_columns=low_rank))
    assert adapter.gradient_bytes < whole.gradient_bytes
    assert adapter.name == "gradient_in_forward"


def test_float16_counts_its_float32_gradients() -> None:
    half = plan(problem_of((2048, 576, 49152), dtype=torch.float16))
    brain = plan(problem_of((2048, 576, 49152), dtype=torch.bfloat16))
    assert half.workspace_bytes >= 49152 * 576 * 4
    assert half.gradient_bytes == brain.gradient_bytes


def test_the_reference_holds_all_logits() -> None:
    schedule = plan(problem_of((2048, 576, 49152), impl="reference"))
    assert (schedule.chunk_tokens, schedule.vocab_window) == (2048, 49152)
    assert not schedule.fits


def test_a_schedule_explains_itself() -> None:
    schedule = plan(problem_of((2048, 576, 49152), memory_budget_mib=64))
    assert isinstance(schedule, Schedule)
    text = str(schedule)
    assert schedule.name in text
    assert "64.0 MiB" in text
    assert str(schedule.chunk_tokens) in text


def test_a_gpu_gets_no_window_so_narrow_that_it_waits_for_the_host() -> None:
    """However small the budget is."""
    options = {"dtype": torch.bfloat16, "impl": "triton", "device_type": "cuda", "per_token": True}
    problem = problem_of((8192, 1024, 128256), **options, memory_budget_mib=1)
    assert plan(problem).vocab_window >= 1024
