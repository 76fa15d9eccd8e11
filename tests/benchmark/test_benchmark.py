"""The measuring instruments: data, truth, meters, verdicts, and what is made of the records."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hf_fused_head.benchmark import (
    accuracy,
    columns,
    contenders,
    environment,
    measure,
    report,
    suite,
)
from hf_fused_head.benchmark.accuracy import Result
from hf_fused_head.benchmark.contenders import Entrant
from hf_fused_head.benchmark.plot import save_plot
from hf_fused_head.benchmark.workloads import (
    CPU_WORKLOADS,
    CUDA_WORKLOADS,
    IGNORE_INDEX,
    WORKLOADS,
    Workload,
    make_batch,
)

CPU = torch.device("cpu")
SMOKE = WORKLOADS["smoke"]
SETTINGS = suite.Settings(repeats=2, warmup=0, check=False)


def case(mode: str = "fwd+bwd", ignored: float = 0.0) -> suite.Case:
    return suite.Case(SMOKE, mode, ignored, "float32")


@pytest.mark.parametrize("name", [*CUDA_WORKLOADS, *CPU_WORKLOADS])
def test_the_default_workloads_are_known(name: str) -> None:
    assert WORKLOADS[name].name == name


@pytest.mark.parametrize("ignored", [0.0, 0.5, 0.99])
def test_data_are_the_same_for_a_seed_and_ignore_the_asked_share(ignored: float) -> None:
    batch, again = (make_batch(SMOKE, torch.float32, CPU, ignored) for _ in range(2))
    assert torch.equal(batch.hidden, again.hidden)
    assert torch.equal(batch.labels, again.labels)
    num_ignored = int((batch.labels == IGNORE_INDEX).sum())
    assert num_ignored == round(ignored * SMOKE.num_tokens)
    assert batch.num_valid == SMOKE.num_tokens - num_ignored


def test_data_look_trained_and_labels_follow_zipf() -> None:
    workload = Workload("", 4096, 96, 5003, "float32", "")
    batch = make_batch(workload, torch.float32, CPU)
    loss = F.cross_entropy(F.linear(batch.hidden, batch.weight), batch.labels, reduction="none")
    assert 1 < loss.mean() < 3
    assert loss.min() < math.log(2) / 10, "no token is certain"
    assert loss.max() > math.log(5003) / 2, "no token is a surprise"
    assert (batch.labels < 10).float().mean() > (batch.labels >= 2500).float().mean()


@pytest.mark.parametrize("mode", contenders.MODES)
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_the_truth_in_chunks_is_plain_torch_at_once(mode: str, ignored: float) -> None:
    workload = Workload("", 700, 16, 37, "float32", "")  # More than one chunk of tokens.
    batch = make_batch(workload, torch.float32, CPU, ignored)
    hidden, weight = batch.hidden.double().requires_grad_(), batch.weight.double().requires_grad_()
    loss = F.cross_entropy(F.linear(hidden, weight), batch.labels, ignore_index=IGNORE_INDEX)
    loss.backward()
    truth = accuracy.truth_of(batch, mode)
    assert truth.loss.dtype == torch.float64
    torch.testing.assert_close(truth.loss, loss.detach())
    wanted = {"fwd": (None, None), "frozen": (hidden.grad, None)}.get(
        mode, (hidden.grad, weight.grad)
    )
    for name, chunked, whole in zip(("dX", "dW"), truth[1:3], wanted, strict=True):
        assert (chunked is None) == (whole is None)
        if chunked is not None and whole is not None:
            torch.testing.assert_close(chunked, whole, msg=lambda text, name=name: name + text)


def test_the_loss_of_stock_is_judged_by_its_tokens_and_not_by_its_luck() -> None:
    """Token errors that happen to cancel leave the budget that they would leave on average."""
    truth = torch.tensor([1.0, 2.0, 3.0, 0.0, 2.0], dtype=torch.float64)
    noise = torch.tensor([1e-2, -1e-2, 1e-2, 0.0, -1e-2], dtype=torch.float64)
    results = [
        accuracy.Result(losses.sum() / 4, None, None, losses) for losses in (truth + noise, truth)
    ]
    assert accuracy.errors_of(*results).loss < 1e-12
    expected = 1e-2 / 2 / 2  # Root mean square over the root of four tokens, over a loss of 2.
    assert accuracy.errors_of_stock(*results).loss == pytest.approx(expected)


def test_the_memory_meter_counts_the_peak_and_not_the_sum() -> None:
    mib = 2**20

    def step() -> torch.Tensor:
        kept = torch.ones(mib // 4)
        for _ in range(3):
            passing = torch.ones(2 * mib // 4)
            del passing
        return kept

    _, peak = measure.peak_of(step, CPU)
    assert 3 * mib <= peak < 3 * mib + 4096


def test_the_memory_meter_sees_inside_of_custom_operators() -> None:
    batch = make_batch(SMOKE, torch.float32, CPU)
    logits_bytes = SMOKE.num_tokens * SMOKE.vocab_size * 4
    step = contenders.entrants(["ours:reference"], [])[0].prepare(batch, "fwd")
    step()
    _, peak = measure.peak_of(step, CPU)
    assert peak >= logits_bytes, "the reference stores its logits inside of an operator"


def test_poisoned_memory_shows_what_was_never_written() -> None:
    with measure.poisoned():
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_turn_begins_with_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, a turn pays for the power that the turn before it drew."""
    calls: list[str] = []
    time_ms = measure.time_ms
    monkeypatch.setattr(measure, "rest", lambda device: calls.append("rest"))
    monkeypatch.setattr(measure, "steps_to_settle", lambda step, device: 1)
    monkeypatch.setattr(measure, "time_ms", lambda *given: calls.append("time") or time_ms(*given))
    entrants = contenders.entrants(["floor", "ours:reference"], [])
    suite.run_case(case("fwd", 0.0), entrants, SETTINGS, CPU, lambda: None)
    assert calls == ["rest", "time"] * (2 * (SETTINGS.warmup + SETTINGS.repeats))


@pytest.mark.parametrize("mode", contenders.MODES)
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_a_case_has_a_full_record_for_every_contender(mode: str, ignored: float) -> None:
    names = ["floor", "ours", "ours:reference", "stock"]
    steps: list[None] = []
    entrants = contenders.entrants(names, [])
    records = suite.run_case(
        case(mode, ignored), entrants, SETTINGS, CPU, lambda: steps.append(None)
    )
    assert [record.contender for record in records] == names
    assert len(steps) == suite.num_steps(len(names), SETTINGS)
    for record in records:
        assert record.status == "ok"
        assert record.time_ms and record.floor_ratio and len(record.samples_ms or ()) == 2
        if record.contender == "floor":
            continue
        assert record.check == "passed"
        assert record.peak_bytes and record.loss_error is not None
        assert (record.dhidden_error is None) == (mode == "fwd")
        assert (record.dweight_error is None) == (mode != "fwd+bwd")


def test_the_time_of_the_host_is_a_column_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU is its own host, and older files do not have it."""
    entrants = contenders.entrants(["floor", "ours"], [])
    assert measure.host_ms(pytest.fail, CPU) is None
    for time_ms, shown in ((None, False), (1.25, True)):
        monkeypatch.setattr(measure, "host_ms", lambda *given, ms=time_ms: ms)
        records = suite.run_case(case("fwd", 0.0), entrants, SETTINGS, CPU)
        assert [record.host_ms for record in records] == [time_ms] * 2
        content = {"header": {}, "results": [asdict(record) for record in records]}
        assert ("host ms" in columns.columns_of(content)) == shown
    cells = columns.cells(content["results"][1], columns.columns_of(content))
    assert "1.25" in cells


@pytest.mark.gpu
def test_the_host_issues_a_step_before_the_device_has_done_it() -> None:
    device = torch.device("cuda", 0)
    big = make_batch(Workload("", 8192, 1024, 64_000, "bfloat16", ""), torch.bfloat16, device)
    step = contenders.FLOOR.prepare(big, "fwd+bwd")
    step()
    issued = measure.host_ms(step, device)
    assert issued is not None and 0 < issued < measure.time_ms(step, device, 3)


def test_budgets_multiply_ours_and_an_at_sign_sets_one() -> None:
    entrants = contenders.entrants(["ours", "stock", "ours:torch@7"], [1, 64])
    assert [e.name for e in entrants] == ["ours@1", "ours@64", "stock", "ours:torch@7"]
    assert [e.budget_mib for e in entrants] == [1, 64, None, 7]


def test_every_schedule_enters_once() -> None:
    batch = make_batch(SMOKE, torch.float32, CPU)
    (ours,) = contenders.entrants(["ours"], [])
    entered = contenders.every_schedule(ours, batch, "fwd+bwd")
    assert entered
    assert len({entrant.name for entrant in entered}) == len(entered)


def _broken(change: str) -> Entrant:
    """Ours with one fault: the check must see each of them."""
    (ours,) = contenders.entrants(["ours"], [])

    def prepare(batch, mode):
        step = ours.prepare(batch, mode)

        def faulty() -> Result:
            loss, dhidden, dweight, _ = step()
            if dhidden is None or dweight is None:
                raise RuntimeError("this test runs with both gradients")
            return {
                "loss": Result(loss * (1 + 1e-5), dhidden, dweight),
                "dhidden": Result(loss, dhidden * (1 + 1e-5), dweight),
                "dweight": Result(loss, dhidden, dweight * (1 + 1e-5)),
                "missing": Result(loss, dhidden, None),
                "nan": Result(loss, dhidden.log(), dweight),
            }[change]

        return faulty

    return replace(ours, prepare=prepare)


@pytest.mark.parametrize("change", ["loss", "dhidden", "dweight", "missing", "nan"])
def test_the_check_fails_on_a_wrong_result_before_anything_is_timed(change: str) -> None:
    with pytest.raises(suite.CheckFailed, match="ours: failed"):
        suite.run_case(case(), [_broken(change)], replace(SETTINGS, check=True), CPU)


def test_a_contender_that_dies_keeps_its_row_and_ends_nothing() -> None:
    def prepare(batch, mode):
        def step() -> Result:
            raise RuntimeError("no kernel\nwith a long story")

        return step

    dying = Entrant("dying", "", prepare)
    records = suite.run_case(case(), [dying, *contenders.entrants(["ours"], [])], SETTINGS, CPU)
    assert records[0].status == "failed"
    assert records[0].reason == "RuntimeError: no kernel"
    assert records[1].status == "ok"


def test_a_missing_contender_says_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    entrants = contenders.entrants(["liger", "cce", "trl", "quack"], [])
    records = suite.run_case(case(), entrants, SETTINGS, CPU)
    assert {record.status for record in records} == {"not installed"}
    assert records[0].reason == "pip install liger-kernel"


@pytest.fixture(scope="module")
def content() -> dict:
    """A document as a file would give it back."""
    entrants = contenders.entrants(["floor", "ours", "stock"], [])
    entrants += [Entrant("absent", "", _absent)]
    records = [
        record
        for mode in ("fwd", "fwd+bwd")
        for record in suite.run_case(case(mode), entrants, SETTINGS, CPU)
    ]
    header = environment.header(CPU, contenders.PEER_PACKAGES, SETTINGS.protocol(CPU))
    return json.loads(json.dumps(report.document(header, records)))


def _absent(batch, mode):
    raise contenders.Unavailable("pip install absent", status="not installed")


def test_the_markdown_table_has_every_row(content: dict) -> None:
    text = report.markdown(content)
    for name in ("floor", "ours", "stock"):
        assert text.count(f"| {name} |") == 2
    assert text.count("| not installed |") == 2
    assert torch.__version__ in text


def test_the_matrix_has_a_line_a_workload_and_a_table_a_mode(content: dict) -> None:
    text = report.matrix(content)
    assert text.count("| smoke 192x64x1031 float32 |") == 2
    assert "**fwd**" in text and "**fwd+bwd**" in text


def test_the_plot_is_an_image(content: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    save_plot(content, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_infinite_errors_become_null(tmp_path: Path) -> None:
    report.write_json(tmp_path / "x.json", {"a": [math.inf, {"b_ms": math.nan}], "c": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, {"b_ms": None}], "c": 1}


def test_a_case_that_is_too_large_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(suite, "make_batch", fail)
    with pytest.raises(suite.DoesNotFit, match="smoke 192x64x1031 float32 fwd"):
        suite.run_case(case(), contenders.entrants(["ours"], []), SETTINGS, CPU)
