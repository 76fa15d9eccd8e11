"""The report names the engine and the schedule that the last fused forward ran."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from head_cases import fixed_schedule
from peft import LoraConfig, get_peft_model
from tiny_models import batch, build
from torch import Tensor, nn

from hf_fused_head import apply_patch, linear_cross_entropy, ops, patch_report
from hf_fused_head.patches import last_stats
from hf_fused_head.planning.problem import Problem
from hf_fused_head.planning.schedule import Schedule
from hf_fused_head.run_record import recording

ENGINES = ("torch", "triton", "reference")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Schedule]:
    """The schedules that the engines have been given, in order."""
    found: list[Schedule] = []

    def spy(problem: Problem, plan: Callable[[Problem], Schedule] = ops.plan) -> Schedule:
        found.append(plan(problem))
        return found[-1]

    monkeypatch.setattr(ops, "plan", spy)
    return found


def mostly_ignored(model: Any) -> dict[str, Tensor]:
    """A batch of which a quarter of the labels counts."""
    inputs = batch(model, rows=4, length=16)
    inputs["labels"][:, :12] = -100
    return inputs


def plain(family: str = "llama", **settings: Any) -> Any:
    return build(family, tie_word_embeddings=False, **settings)


def with_adapter(family: str = "llama") -> Any:
    return get_peft_model(plain(family), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))


def frozen_head() -> Any:
    model = plain()
    model.lm_head.requires_grad_(False)
    return model


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (plain, {}),
    "small budget": (plain, {"memory_budget_mib": 0.02}),
    "softcap": (lambda: plain("gemma2"), {"memory_budget_mib": 0.1}),
    "statistics": (plain, {"stats": ("accuracy", "entropy"), "memory_budget_mib": 0.1}),
    "smoothing": (lambda: plain("gemma2"), {"label_smoothing": 0.1}),
    "adapter": (with_adapter, {"memory_budget_mib": 0.1}),
    "frozen head": (frozen_head, {"memory_budget_mib": 0.05}),
}


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_the_report_names_the_schedule_of_the_last_forward(
    case: str, impl: str, planned: list[Schedule]
) -> None:
    make, options = CASES[case]
    model = apply_patch(make(), impl=impl, **options)
    everything, some = batch(plain(), rows=4, length=16), mostly_ignored(plain())
    found = []
    for inputs in (everything, some):
        model(**inputs).loss.backward()
        found.append(patch_report(model).schedule)
        assert found[-1] == str(planned[-1])
    # "triton" plans for a rounded number of tokens.
    assert found[0] != found[1] or impl == "triton"
    with torch.no_grad():
        model(**some)
    assert patch_report(model).schedule == str(planned[-1])
    assert patch_report(model).schedule.startswith("loss_only")
    assert patch_report(model).kernel.startswith(f"{impl}: impl='{impl}' was asked for")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nobody_plans_a_second_time(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that follows an odd schedule is reported with it."""
    odd = fixed_schedule("recompute", chunk_tokens=7, vocab_window=32)
    monkeypatch.setattr(ops, "plan", lambda problem: odd)
    model = apply_patch(plain(), impl=impl)
    model(**batch(model)).loss.backward()
    assert patch_report(model).schedule == str(odd)


@pytest.mark.parametrize("impl", ENGINES)
def test_a_forward_without_a_token_that_counts(impl: str) -> None:
    model = apply_patch(plain(), impl=impl)
    inputs = batch(model)
    model(**inputs)
    inputs["labels"].fill_(-100)
    model(**inputs, num_items_in_batch=7).loss.backward()
    assert "no token has a label" in patch_report(model).schedule


def test_a_head_that_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its own forward was called with, ignored labels left out."""
    sizes = []

    class Counting(nn.Sequential):
        def forward(self, hidden: Tensor) -> Tensor:
            sizes.append(hidden.shape[:-1].numel())
            return super().forward(hidden)

    model = plain()
    model.lm_head = Counting(model.lm_head)
    apply_patch(model)
    for inputs in (batch(model, rows=4, length=16), mostly_ignored(model)):
        sizes.clear()
        model(**inputs)
        assert f"chunks of {max(sizes)} tokens" in patch_report(model).schedule
    with torch.no_grad():
        model(**inputs)
    assert "backward" not in patch_report(model).schedule


def test_another_engine_is_reported_before_it_runs() -> None:
    model = apply_patch(plain())
    model(**batch(model))
    assert patch_report(model).kernel.startswith("torch: ")
    apply_patch(model, impl="reference")
    assert patch_report(model).kernel.startswith("reference: ")
    model(**batch(model))
    assert patch_report(model).kernel.startswith("reference: ")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_a_compiled_forward_leaves_no_former_schedule(backend: str, fresh_compiler: None) -> None:
    model = apply_patch(plain(num_hidden_layers=1), stats=("accuracy",))
    inputs = batch(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        model(**inputs)
        eager = patch_report(model).schedule
        assert "MiB" in eager
        compiled(**inputs)
        assert "inside the compiled forward" in patch_report(model).schedule
    assert last_stats(model) is not None


def loss(num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 8, generator=generator)
    weight = torch.randn(5, 8, generator=generator)
    return linear_cross_entropy(hidden, weight, torch.zeros(num_tokens, dtype=torch.int64))


def test_a_record_belongs_to_a_thread_and_a_block() -> None:
    other = threading.Thread(target=loss, args=(3,))
    with recording() as outer:
        other.start()
        other.join()
        assert outer.choice is None and outer.schedule is None
        with recording() as inner:
            loss(4)
        assert outer.schedule is None
        loss(6)
    loss(5)
    assert inner.schedule is not None and outer.schedule is not None
    assert outer.choice is not None and outer.choice.impl == "torch"
    assert inner.schedule != outer.schedule
    with pytest.raises(KeyError), recording() as broken:
        raise KeyError
    loss(3)
    assert broken.schedule is None
