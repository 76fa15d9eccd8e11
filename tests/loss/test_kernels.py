"""impl="triton" in Triton's interpreter: the kernels' own code, on the CPU, against float64."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from head_cases import (
    CASES,
    Case,
    all_needs,
    check_backward,
    check_forward_backward,
    doubled,
    fixed_schedule,
    in_float64,
    operands_of,
    row_weights,
    with_library,
)
from oracle import assert_close_as_torch, assert_norm_as_torch
from plain_head import Problem, by_ours, by_plain, exact, results, widened

pytest.importorskip("triton", reason="needs triton (pip install triton)")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1 only", allow_module_level=True)

from hf_fused_head import ops
from hf_fused_head.engines import reference
from hf_fused_head.engines.protocol import Needs, Rejected
from hf_fused_head.engines.triton_engine import engine as triton_engine
from hf_fused_head.engines.triton_engine import passes
from hf_fused_head.kernels.head import launch_exponents
from hf_fused_head.kernels.operands import Head, RowSums
from hf_fused_head.kernels.rows import launch_anchor
from hf_fused_head.kernels.tuning import TileConfig
from hf_fused_head.objective import RowWeights, Wanted

# Two row tiles and three column tiles of the interpreter's blocks, no size a multiple.
SIZES = (19, 21, 70)
_EPILOGUE = {
    "one_chunk": fixed_schedule("gradient_in_forward"),
    "chunks": fixed_schedule("gradient_in_forward", chunk_tokens=10),
    "windows": fixed_schedule("recompute", vocab_window=32),
    "hybrid": fixed_schedule("hybrid", vocab_window=32, kept_share=0.5),
}
# By the library one column tile at a time, of at most two row tiles.
SCHEDULES = with_library(_EPILOGUE, 4 * 32 * 32)
products = pytest.mark.parametrize("product", ["", ", tile"], ids=["epilogue", "tile"])


@pytest.fixture(autouse=True)
def small_multiples(monkeypatch):
    """Chunks and windows of the interpreter's tile, so that small sizes have several."""
    monkeypatch.setattr(passes, "MULTIPLE", 32)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_every_schedule_is_as_exact_as_float32_products(name, schedule, monkeypatch):
    sizes = (40, *SIZES[1:]) if "chunks" in schedule else SIZES
    operands, labels = operands_of(CASES[name], *sizes, torch.float32, "cpu")
    check_forward_backward(triton_engine, CASES[name], operands, labels, SCHEDULES[schedule])


@pytest.mark.parametrize("late", [False, True], ids=["in_the_last_product", "late"])
def test_the_heads_gradient_of_chunks_is_rounded_late_where_it_has_no_memory(late, monkeypatch):
    """Until the tile is gone; otherwise nobody sees a sum once the last product is done."""
    schedule = fixed_schedule("gradient_in_forward", chunk_tokens=10, late_rounding=late)
    made, seen = [], []

    def empty_grads(*args, _make=triton_engine._empty_grads, **options):
        made.append(_make(*args, **options))
        return made[-1]

    def add_chunks(call, chunks, *rest, _add=passes._add_chunks):
        seen.append((len(chunks), made[-1][1].untyped_storage().nbytes()))
        _add(call, chunks, *rest)

    monkeypatch.setattr(triton_engine, "_empty_grads", empty_grads)
    monkeypatch.setattr(passes, "_add_chunks", add_chunks)
    operands, labels = operands_of(CASES["plain"], 40, *SIZES[1:], torch.bfloat16, "cpu")
    check_forward_backward(triton_engine, CASES["plain"], operands, labels, schedule)
    size = made[0][1].nbytes
    assert seen == [(2, 0 if late else size)]
    assert made[0][1].untyped_storage().nbytes() == size > 0


@pytest.mark.parametrize(
    ("size", "most", "sizes"),
    [(100, 96, [64, 36]), (128, 96, [64, 64]), (96, 96, [96]), (5, 96, [5]), (0, 96, [])],
)
def test_no_part_of_the_rows_is_much_shorter_than_the_others(size, most, sizes):
    parts = passes._slices(size, most)
    assert [part.stop - part.start for part in parts] == sizes
    assert [part.start for part in parts] == [sum(sizes[:index]) for index in range(len(sizes))]


@products
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("plain", "everything")])
def test_every_option_with_stored_exponents(name, product):
    operands, labels = operands_of(CASES[name], *SIZES, torch.float32, "cpu")
    schedule = SCHEDULES[f"one_chunk{product}"]
    check_forward_backward(triton_engine, CASES[name], operands, labels, schedule)


@products
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["everything", "class_weight_smooth", "overflow"])
def test_half_precision_is_as_exact_as_torch(name, dtype, product):
    operands, labels = operands_of(CASES[name], *SIZES, dtype, "cpu")
    schedule = SCHEDULES[f"hybrid{product}"]
    check_forward_backward(triton_engine, CASES[name], operands, labels, schedule)


@products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["everything", "class_weight_smooth", "softcap_smooth"])
def test_any_upstream_gradient_per_token(name, dtype, product):
    operands, labels = operands_of(CASES[name], *SIZES, dtype, "cpu")
    check_backward(triton_engine, CASES[name], operands, labels, SCHEDULES[f"windows{product}"])


@products
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 16, 2), (33, 7, 33)])
def test_smallest_sizes(sizes, product):
    operands, labels = operands_of(CASES["plain"], *sizes, torch.float32, "cpu")
    schedule = SCHEDULES[f"one_chunk{product}"]
    check_forward_backward(triton_engine, CASES["plain"], operands, labels, schedule)


def test_a_forgotten_softcap_fails(monkeypatch):
    """The oracle is sharp enough to see a wrong fact."""
    operands, labels = operands_of(CASES["plain"], *SIZES, torch.float32, "cpu")
    stats = triton_engine.row_stats(operands, labels, Wanted(), fixed_schedule("loss_only"))
    capped = reference.row_stats(operands._replace(softcap=30.0), labels, Wanted())
    with pytest.raises(AssertionError, match="nll"):
        assert_close_as_torch("nll", stats.nll, capped.nll, capped.nll.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("halves", [False, True])
def test_descriptor_kernel_equals_pointer_kernel(dtype, halves):
    """Both kernels make the same tiles and row sums; the first one owns several tiles a program."""
    num_tokens, vocab_size = 35, 72
    operands, labels = operands_of(CASES["everything"], num_tokens, 24, vocab_size, dtype, "cpu")
    (hidden, low), (weight, low_weight) = operands.inputs, operands.weights
    head = Head(hidden, weight, low, low_weight, operands.bias, None, 1.5, None)
    anchor = torch.empty(num_tokens)
    launch_anchor(head, labels, anchor)
    results = []
    for programs in (0, 3):
        config = TileConfig(16, 32, 16, 2, 4, 1, programs, halves, False)
        sums = RowSums(*(torch.full((3, num_tokens), torch.nan) for _ in range(5)), anchor.clone())
        store = torch.full((num_tokens, vocab_size), torch.nan, dtype=dtype)
        launch_exponents(head, labels, 0, anchor, sums, store, config)
        results.append([*sums, store])
    for ours, theirs in zip(*results, strict=True):
        assert not ours.isnan().any()
        assert torch.equal(ours, theirs)


def test_confident_tokens_keep_their_digits(monkeypatch):
    """Gradients of tokens with p = 1 - 1e-6 come from the other columns, not from p - 1."""
    operands, labels = operands_of(CASES["plain"], *SIZES, torch.float32, "cpu")
    weight = operands.weights[0]
    logits = operands.inputs[0] @ weight.T
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    lift = others - torch.tensor(1e-6).log() - logits.gather(1, labels[:, None])[:, 0]
    target = weight[labels]
    hidden = operands.inputs[0] + lift[:, None] * target / target.pow(2).sum(1, keepdim=True)
    operands = operands._replace(inputs=[hidden])
    schedule = SCHEDULES["one_chunk"]
    stats = check_forward_backward(triton_engine, CASES["plain"], operands, labels, schedule)
    assert (stats.nll < 1e-3).any()


@products
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["far", "overflow"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tokens_sure_of_another_class_keep_their_digits(reduction, scale, product, monkeypatch):
    """There lse and loss are large, and so is what rounding takes from them and from exponents."""
    monkeypatch.setattr(ops, "plan", lambda problem: SCHEDULES[f"windows{product}"])
    options = {"reduction": reduction, "logit_scale": scale}
    problem = Problem(shape=(40,), ignored=0, surprised=True, options=options)
    tensors = exact(problem.tensors(torch.float32))
    upstream = torch.ones(40 if reduction == "none" else ())
    ours = results(by_ours(problem, "triton"), tensors, upstream)
    plain = results(by_plain(problem), tensors, upstream)
    truth = results(by_plain(problem), widened(tensors), upstream.double())
    assert (truth["loss"] > 20 * scale).any()
    for name, value in ours.items():
        assert_close_as_torch(name, value, plain[name], truth[name])


def test_only_the_asked_gradients_are_made(monkeypatch):
    operands, labels = operands_of(CASES["everything"], *SIZES, torch.bfloat16, "cpu")
    weights = row_weights(CASES["everything"], SIZES[0], "cpu")
    everything = None
    for schedule in ("one_chunk", "hybrid"):
        for wanted in ((1, 1, 1, 1, 1), (1, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 1)):
            flags = [bool(flag) for flag in wanted]
            needs = Needs(flags[:2], flags[2:4], flags[4])
            rest = (needs, Wanted(smooth=True), SCHEDULES[schedule])
            _, grads = triton_engine.stats_and_grads(operands, labels, weights, *rest)
            everything = grads if all(flags) else everything
            for grad, whole, flag in zip(grads, everything, flags, strict=True):
                assert torch.equal(grad, whole if flag else whole.new_empty(0))


@pytest.mark.parametrize("schedule", ["chunks", "hybrid", "chunks, tile", "hybrid, tile"])
def test_nothing_unwritten_is_read(schedule, monkeypatch):
    """With poisoned memory the results are finite, so everything that is read was written."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(make):
        def make_poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return make_poisoned

    operands, labels = operands_of(CASES["everything"], 40, *SIZES[1:], torch.bfloat16, "cpu")
    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    weights = row_weights(CASES["everything"], 40, "cpu")
    rest = (all_needs(operands), Wanted(True, True, True), SCHEDULES[schedule])
    stats, grads = triton_engine.stats_and_grads(operands, labels, weights, *rest)
    for tensor in [*stats[:5], *grads]:
        assert torch.isfinite(tensor.float()).all()


def _ignore(labels, places, index=-100):
    return labels.clone().index_fill_(0, torch.tensor(places), index)


class WithIgnoredRows:
    """The engine on a batch with some more rows, ignored ones, launched speculatively.

    Returns what it has for the rows that count, and checks that the rest is zero.
    """

    def __init__(self, places):
        self.places = places

    def stats_and_grads(self, operands, labels, weights, needs, wanted, schedule):
        num_tokens = labels.shape[0] + len(self.places)
        kept = torch.ones(num_tokens, dtype=torch.bool).index_fill_(0, self.places, False)

        def among_all(rows, fill):
            if rows is None:
                return None
            # Whatever stands there must not matter.
            return rows.new_full((num_tokens, *rows.shape[1:]), fill).masked_scatter_(
                kept.reshape(-1, *[1] * (rows.dim() - 1)), rows
            )

        more = operands._replace(inputs=[among_all(hidden, 2) for hidden in operands.inputs])
        vocab_size = operands.weights[0].shape[0]
        launch = triton_engine.speculate(among_all(labels, -100), -100, vocab_size, pytest.fail)
        weights = RowWeights(*(among_all(weight, 3.0) for weight in weights))
        rest = (needs, wanted, schedule, launch)
        stats, grads = triton_engine.stats_and_grads(more, launch.labels, weights, *rest)
        alone = triton_engine.row_stats(more, launch.labels, wanted, schedule, launch)
        rows = [value for value in stats[:5] if value.numel()]
        for value, other in zip(rows, [v for v in alone[:5] if v.numel()], strict=True):
            assert torch.equal(value, other)
        assert torch.isfinite(alone.correction).all()
        count = len(operands.inputs)
        for value in (*rows, *grads[:count]):
            assert not value[~kept].any()
        kept_stats = [value[kept] if value.numel() else value for value in stats[:5]]
        kept_grads = [grad[kept] for grad in grads[:count]] + grads[count:]
        return stats._replace(**dict(zip(stats._fields[:5], kept_stats, strict=True))), kept_grads


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["plain", "everything", "softcap_smooth"])
def test_a_few_ignored_rows_change_nothing(name, schedule):
    """Launched before the labels are counted: the same as without the rows, and zero in them."""
    operands, labels = operands_of(CASES[name], 66, *SIZES[1:], torch.float32, "cpu")
    engine = WithIgnoredRows(torch.tensor([0, 41]))
    check_forward_backward(engine, CASES[name], operands, labels, SCHEDULES[schedule])


@products
def test_a_speculative_launch_with_many_ignored_rows_is_rejected(product):
    """Nothing is written on the device, and the caller has to drop the rows."""
    operands, labels = operands_of(CASES["plain"], 64, *SIZES[1:], torch.float32, "cpu")
    weights = row_weights(CASES["plain"], 64, "cpu")
    wanted, schedule = Wanted(), SCHEDULES[f"one_chunk{product}"]
    for places, rejected in (([5, 6], False), ([5, 6, 7], True)):
        launch = triton_engine.speculate(_ignore(labels, places), -100, SIZES[2], pytest.fail)
        head = (operands, launch.labels)
        needs = all_needs(operands)
        expected = pytest.raises(Rejected) if rejected else contextlib.nullcontext()
        with expected:
            triton_engine.stats_and_grads(*head, weights, needs, wanted, schedule, launch)
        with expected:
            triton_engine.row_stats(*head, wanted, schedule, launch)
        assert bool(launch.rejected) == rejected
        assert launch.kept_rows().tolist() == [i for i in range(64) if i not in places]


def test_a_wrong_label_reads_nothing_and_is_named():
    """Kernels see -2 for it before the host can raise, and its loss is NaN if it cannot."""
    operands, labels = operands_of(CASES["plain"], 64, *SIZES[1:], torch.float32, "cpu")
    wrong = _ignore(labels, [9], 2**40)

    def raise_for_label():
        raise ValueError("named")

    launch = triton_engine.speculate(wrong, -100, SIZES[2], raise_for_label)
    statistics = (operands, launch.labels, Wanted(), fixed_schedule("loss_only"))
    with pytest.raises(ValueError, match="named"):
        triton_engine.row_stats(*statistics, launch)
    captured = launch._replace(rejected=None, commit=lambda: True)
    nll = triton_engine.row_stats(*statistics, captured).nll
    assert nll.isnan().nonzero().tolist() == [[9]]


def test_labels_of_zero_weight_and_pure_smoothing(monkeypatch):
    """Rows whose softmax terms vanish or cancel give finite gradients."""
    case = Case(smooth=True)
    operands, labels = operands_of(case, *SIZES, torch.float32, "cpu")
    nll_weight, smooth_weight, _ = row_weights(case, SIZES[0], "cpu")
    rest = (all_needs(operands), Wanted(smooth=True), SCHEDULES["one_chunk"])
    nothing = torch.zeros_like(nll_weight)
    for smooth in (smooth_weight, nothing):
        weights = RowWeights(nothing, smooth)
        _, grads = triton_engine.stats_and_grads(operands, labels, weights, *rest)
        _, plain = reference.stats_and_grads(operands, labels, weights, *rest)
        exact = (in_float64(operands), labels, doubled(weights))
        _, truth = reference.stats_and_grads(*exact, *rest)
        for index, tensors in enumerate(zip(grads, plain, truth, strict=True)):
            assert_close_as_torch(f"gradient {index}", *tensors)


def test_unavailable_reason_names_the_obstacle():
    assert triton_engine.unavailable_reason("cpu", torch.bfloat16) is None
    assert "float64" in triton_engine.unavailable_reason("cpu", torch.float64)
    assert "mps" in triton_engine.unavailable_reason("mps", torch.float16)
    assert "TRITON_INTERPRET" in triton_engine.unavailable_reason("cuda", torch.float16)


@products
def test_small_logits_keep_their_digits_under_a_softcap(product):
    """A fresh head's logits lie far below the cap, where tanh is nearly its argument."""
    operands, labels = operands_of(Case(softcap=50.0), 40, 21, 300, torch.float32, "cpu")
    operands = operands._replace(inputs=[0.02 * hidden for hidden in operands.inputs])
    stats = triton_engine.row_stats(operands, labels, Wanted(), SCHEDULES[f"one_chunk{product}"])
    plain = reference.row_stats(operands, labels, Wanted())
    truth = reference.row_stats(in_float64(operands), labels, Wanted())
    assert_norm_as_torch("nll", stats.nll, plain.nll, truth.nll)
