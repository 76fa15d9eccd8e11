"""impl="torch": bounded for real, independent of the cut, and no work that nobody asked for."""

from __future__ import annotations

import itertools

import pytest
import torch
from head_cases import planned
from live_spy import LiveSpy, Poisoned
from oracle import assert_close_as_torch, relative_error
from torch import Tensor

from hf_fused_head.engines import reference
from hf_fused_head.engines.protocol import Needs, Operands
from hf_fused_head.engines.torch_engine import engine as torch_engine
from hf_fused_head.objective import RowStats, RowWeights, Upstream, Wanted
from hf_fused_head.planning.schedule import Schedule

NUM_TOKENS, HIDDEN, VOCAB = 192, 24, 2053
ALL = Needs([True], [True], True)
BUDGETS_MIB = (0.2, 1.0, 2.0, 1024.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def head(
    dtype: torch.dtype = torch.float32,
    *,
    num_tokens: int = NUM_TOKENS,
    vocab_size: int = VOCAB,
    bias: bool = True,
    softcap: float | None = None,
    class_weight: bool = False,
    pairs: int = 1,
) -> tuple[Operands, Tensor]:
    """A head and labels; the last label is the last class."""
    torch.manual_seed(3)
    sizes = [HIDDEN, 3][:pairs]
    inputs = [torch.randn(num_tokens, size).to(dtype) for size in sizes]
    weights = [(torch.randn(vocab_size, size) * size**-0.5).to(dtype) for size in sizes]
    labels = torch.randint(0, vocab_size, (num_tokens,))
    labels[-1] = vocab_size - 1
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        Operands(
            inputs,
            weights,
            torch.randn(vocab_size).to(dtype) if bias else None,
            torch.rand(vocab_size).to(kind) if class_weight else None,
            0.9,
            softcap,
        ),
        labels,
    )


def widened(operands: Operands) -> Operands:
    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    return Operands(
        [t.double() for t in operands.inputs],
        [t.double() for t in operands.weights],
        wide(operands.bias),
        wide(operands.class_weight),
        operands.logit_scale,
        operands.softcap,
    )


def has_extras(operands: Operands) -> bool:
    """Whether the objective has smoothing and z-loss, or upstream gradients of every statistic."""
    return operands.class_weight is not None


def scalar(engine, operands: Operands, labels: Tensor, mib: float, needs: Needs = ALL):
    kind = torch.float64 if operands.inputs[0].dtype == torch.float64 else torch.float32
    ones = torch.full(labels.shape, 1 / labels.numel(), dtype=kind)
    extras = (0.1 * ones, 0.01 * ones) if has_extras(operands) else (None, None)
    schedule, wanted = schedule_of(operands, mib, False, needs), Wanted(has_extras(operands))
    return engine.stats_and_grads(
        operands, labels, RowWeights(ones, *extras), needs, wanted, schedule
    )


def per_token(engine, operands: Operands, labels: Tensor, mib: float, needs: Needs = ALL):
    kind = torch.float64 if operands.inputs[0].dtype == torch.float64 else torch.float32
    extras = has_extras(operands)
    wanted = Wanted(extras, extras)
    stats = engine.row_stats(
        operands, labels, wanted, planned(operands, "torch", mib, wanted=wanted)
    )
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(labels.shape, generator=generator).to(kind) for _ in range(4)]
    upstream = Upstream(*vectors) if extras else Upstream(*vectors[:2])
    schedule = schedule_of(operands, mib, True, needs)
    return stats, engine.row_grads(operands, labels, stats, upstream, needs, schedule)


def schedule_of(operands: Operands, mib: float, is_per_token: bool, needs: Needs = ALL) -> Schedule:
    extras = has_extras(operands)
    wanted = Wanted(smooth=extras, entropy=extras and is_per_token)
    return planned(operands, "torch", mib, needs=needs, wanted=wanted, per_token=is_per_token)


@pytest.mark.parametrize("run", [scalar, per_token])
@pytest.mark.parametrize("mib", BUDGETS_MIB)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
def test_memory_stays_within_the_plan(run, mib: float, dtype: torch.dtype, extras: bool) -> None:
    options = {"softcap": 5.0, "class_weight": True} if extras else {}
    operands, labels = head(dtype, **options)
    schedule = schedule_of(operands, mib, run is per_token)
    with LiveSpy() as spy:
        _, grads = run(torch_engine, operands, labels, mib)
    # The plan counts float16's wider results as workspace already.
    half = dtype == torch.float16 and run is scalar
    gradients = 0 if half else sum(grad.numel() * grad.element_size() for grad in grads)
    allowed = schedule.workspace_bytes + gradients
    if half:
        allowed += schedule.gradient_bytes
    assert spy.peak <= allowed, f"{spy.peak} bytes alive, {allowed} planned: {schedule}"
    assert spy.largest * 4 < NUM_TOKENS * VOCAB * 4 or half
    if mib >= 1 and not half:
        assert schedule.fits
        assert spy.peak <= mib * 2**20 + gradients


@pytest.mark.parametrize("extras", [False, True])
def test_a_loss_without_gradients_stays_within_the_plan(extras: bool) -> None:
    options = {"softcap": 5.0, "class_weight": True} if extras else {}
    operands, labels = head(**options)
    wanted = Wanted(extras, extras, extras)
    for mib in BUDGETS_MIB:
        with LiveSpy() as spy:
            torch_engine.row_stats(
                operands, labels, wanted, planned(operands, "torch", mib, wanted=wanted)
            )
        assert spy.largest * 4 < NUM_TOKENS * VOCAB * 4
        assert spy.peak <= max(mib, 1.0) * 2**20


def test_the_spy_sees_a_full_matrix() -> None:
    operands, labels = head()
    with LiveSpy() as spy:
        scalar(reference, operands, labels, 1.0)
    assert spy.largest >= NUM_TOKENS * VOCAB * 4


@pytest.mark.parametrize("run", [scalar, per_token])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_does_not_depend_on_the_budget(run, dtype: torch.dtype) -> None:
    operands, labels = head(dtype)
    truth = run(reference, widened(operands), labels, 1.0)[1]
    whole = reference_in(dtype, run, operands, labels)
    errors = []
    for mib in BUDGETS_MIB:
        grads = run(torch_engine, operands, labels, mib)[1]
        for name, *values in zip(("hidden", "weight", "bias"), grads, whole, truth, strict=True):
            assert_close_as_torch(f"{name} at {mib} MiB", *values)
        errors.append([relative_error(g, t) for g, t in zip(grads, truth, strict=True)])
    if grads[1].dtype != torch.float32:
        # Rounding the result is all the error there is; float32's own depends on the order.
        for column in zip(*errors, strict=True):
            assert max(column) <= 1.1 * min(column)


def reference_in(dtype: torch.dtype, run, operands: Operands, labels: Tensor) -> list[Tensor]:
    return run(reference, operands, labels, 1.0)[1]


def test_a_running_sum_in_the_dtype_of_the_weight_would_be_noticed() -> None:
    operands, labels = head(torch.bfloat16)
    truth = scalar(reference, widened(operands), labels, 1.0)[1][1]
    ours = scalar(torch_engine, operands, labels, 1024.0)[1][1]
    total = torch.zeros_like(ours)
    for start in range(0, NUM_TOKENS, 8):
        rows = slice(start, start + 8)
        part = operands._replace(inputs=[operands.inputs[0][rows]])
        ones = torch.full((8,), 1 / NUM_TOKENS)
        grads = reference.stats_and_grads(part, labels[rows], RowWeights(ones), ALL, Wanted())[1]
        total += grads[1]
    assert relative_error(total, truth) > 1.5 * relative_error(ours, truth)


@pytest.mark.parametrize("run", [scalar, per_token])
@pytest.mark.parametrize("mib", BUDGETS_MIB)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "class_weight": True}, {"pairs": 2}])
def test_nothing_reads_memory_before_it_was_written(run, mib: float, options: dict) -> None:
    operands, labels = head(**options)
    needs = Needs([True] * len(operands.inputs), [True] * len(operands.inputs), True)
    plain = run(torch_engine, operands, labels, mib, needs)
    with Poisoned():
        poisoned = run(torch_engine, operands, labels, mib, needs)
    for one, other in zip(flat(plain), flat(poisoned), strict=True):
        assert torch.equal(one, other)
        assert not one.isnan().any()


def flat(result: tuple[RowStats, list[Tensor]]) -> list[Tensor]:
    return [value for value in (*result[0], *result[1]) if value is not None]


@pytest.mark.parametrize("run", [scalar, per_token])
@pytest.mark.parametrize("mib", [0.3, 1024.0])
def test_every_run_gives_the_same_bits(run, mib: float) -> None:
    operands, labels = head(torch.bfloat16, class_weight=True)
    first, second = (flat(run(torch_engine, operands, labels, mib)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("run", [scalar, per_token])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"class_weight": True}])
@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1, 1), (1, 2), (2, 7), (67, 1031)])
def test_sizes_that_no_tile_divides(run, options: dict, num_tokens: int, vocab_size: int) -> None:
    operands, labels = head(num_tokens=num_tokens, vocab_size=vocab_size, **options)
    truth_stats, truth = run(reference, widened(operands), labels, 1.0)
    plain_stats, plain = run(reference, operands, labels, 1.0)
    for mib in (0.01, 1024.0):
        stats, grads = run(torch_engine, operands, labels, mib)
        for name in ("nll", "lse", "smooth", "entropy"):
            values = [getattr(s, name) for s in (stats, plain_stats, truth_stats)]
            assert_close_as_torch(name, *values)
        for name, *values in zip(("hidden", "weight", "bias"), grads, plain, truth, strict=True):
            assert_close_as_torch(name, *values)


@pytest.mark.parametrize("mib", [0.3, 1024.0])
def test_entropy_and_correctness_beside_the_gradient(mib: float) -> None:
    operands, labels = head()
    logits = operands.inputs[0] @ operands.weights[0].T + operands.bias
    labels[::2] = logits.argmax(dim=1)[::2]
    wanted = Wanted(entropy=True, correct=True)
    truth = reference.row_stats(widened(operands), labels, wanted)
    plain = reference.row_stats(operands, labels, wanted)
    ones = torch.ones(NUM_TOKENS)
    schedule = planned(operands, "torch", mib, needs=ALL, wanted=wanted)
    stats, _ = torch_engine.stats_and_grads(
        operands, labels, RowWeights(ones), ALL, wanted, schedule
    )
    assert_close_as_torch("entropy", stats.entropy, plain.entropy, truth.entropy)
    assert torch.equal(stats.correct, truth.correct)
    assert stats.correct[::2].all()


PRODUCTS = {"addmm", "mm", "addmm_", "matmul", "bmm"}


@pytest.mark.parametrize("mib", [0.3, 1024.0])
@pytest.mark.parametrize("subset", list(itertools.product((False, True), repeat=2))[1:])
def test_frozen_parts_cost_no_product_and_no_memory(mib: float, subset: tuple[bool, bool]) -> None:
    operands, labels = head(bias=False)
    needs = Needs([subset[0]], [subset[1]], False)
    with LiveSpy() as spy:
        _, grads = scalar(torch_engine, operands, labels, mib, needs)
    assert [grad.numel() > 0 for grad in grads] == [*subset, False]
    with LiveSpy() as everything:
        scalar(torch_engine, operands, labels, mib, Needs([True], [True], False))
    if subset == (True, True):
        return
    # Dropping one of the two gradient products drops a third of the work at least.
    whole, part = (
        sum(name in PRODUCTS for name in s.operators) / tiles(operands, mib, n)
        for s, n in ((everything, (True, True)), (spy, subset))
    )
    assert part == whole - 1
    frozen_bytes = 4 * (VOCAB if subset[0] else NUM_TOKENS) * HIDDEN
    assert spy.peak <= everything.peak - frozen_bytes + 4 * NUM_TOKENS * 64


def tiles(operands: Operands, mib: float, wanted: tuple[bool, bool]) -> float:
    """How many tiles of the logits a call goes over, each time that it does."""
    needs = Needs([wanted[0]], [wanted[1]], False)
    schedule = planned(operands, "torch", mib, needs=needs)
    columns = VOCAB if schedule.name == "gradient_in_forward" else schedule.vocab_window
    return -(-NUM_TOKENS // schedule.chunk_tokens) * -(-VOCAB // columns)


def test_a_column_that_a_bias_masks_changes_nothing() -> None:
    operands, labels = head(vocab_size=1031)
    labels = labels.clamp(min=600)
    bias = operands.bias
    assert bias is not None
    bias[:512] = float("-inf")
    kept = operands._replace(weights=[operands.weights[0][512:]], bias=bias[512:])
    for mib in (0.01, 1024.0):
        for run in (scalar, per_token):
            stats, grads = run(torch_engine, operands, labels, mib)
            plain_stats, plain = run(reference, kept, labels - 512, 1.0)
            truth_stats, truth = run(reference, widened(kept), labels - 512, 1.0)
            assert_close_as_torch("nll", stats.nll, plain_stats.nll, truth_stats.nll)
            assert_close_as_torch("hidden", grads[0], plain[0], truth[0])
            assert not grads[1][:512].any()
