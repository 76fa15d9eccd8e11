"""impl="triton" on a CUDA device: exactness, determinism, large shapes, streams, compilation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from head_cases import (
    CASES,
    all_needs,
    check_backward,
    check_forward_backward,
    fixed_schedule,
    in_float64,
    operands_of,
    planned,
    row_weights,
    windows_of,
    with_library,
)
from oracle import assert_close_as_torch, relative_error
from torch import Tensor

from hf_fused_head import ops
from hf_fused_head.engines import reference
from hf_fused_head.engines.protocol import Needs, Operands
from hf_fused_head.functional import linear_cross_entropy, linear_cross_entropy_with_stats
from hf_fused_head.objective import RowWeights, Upstream, Wanted
from hf_fused_head.planning.schedule import Schedule

triton_engine = pytest.importorskip(
    "hf_fused_head.engines.triton_engine.engine", reason="needs triton (pip install triton)"
)
products = pytest.importorskip(
    "hf_fused_head.engines.triton_engine.products", reason="needs triton"
)
tuning = pytest.importorskip("hf_fused_head.kernels.tuning", reason="needs triton")

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The descriptor kernel needs rows of whole 16 bytes; the second shape takes the pointer kernel.
SIZES = {"aligned": (300, 200, 1300), "odd": (301, 197, 1301)}
_EPILOGUE = {
    "one_chunk": fixed_schedule("gradient_in_forward"),
    "chunks": fixed_schedule("gradient_in_forward", chunk_tokens=256),
    "windows": fixed_schedule("recompute", vocab_window=512),
    "hybrid": fixed_schedule("hybrid", vocab_window=512, kept_share=0.6),
}
# By the library in several tiles of these sizes.
SCHEDULES = with_library(_EPILOGUE, 2**20)
products_by = pytest.mark.parametrize("product", ["epilogue", "tile"])


def trained_head(
    num_tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels as of a trained model: frequent labels, lifted logits."""
    device = "cuda"
    weight = 0.02 * torch.randn(vocab_size, hidden_size, device=device)
    weight = (weight * (4096 / hidden_size) ** 0.5).to(dtype)
    ranks = torch.rand(num_tokens, device=device) * math.log(vocab_size)
    labels = (ranks.exp().long() - 1).clamp(0, vocab_size - 1)
    target = weight[labels].float()
    lift = 16 * torch.rand(num_tokens, 1, device=device)
    hidden = torch.randn(num_tokens, hidden_size, device=device)
    hidden = hidden + lift * target / target.pow(2).sum(1, keepdim=True)
    return hidden.to(dtype), weight, labels


def plain_head(hidden: Tensor, weight: Tensor) -> Operands:
    """One pair of operands and no options."""
    return Operands([hidden], [weight], None, None, 1.0, None)


def mean_gradients(operands: Operands, labels: Tensor, schedule: Schedule, smoothing: bool = False):
    """Statistics, and the gradients of hidden states and weight, of the mean loss."""
    nll_weight = torch.full(labels.shape, 1 / labels.shape[0], device=labels.device)
    weights = RowWeights(nll_weight, 0.1 * nll_weight if smoothing else None)
    rest = (all_needs(operands), Wanted(smooth=smoothing), schedule)
    stats, grads = triton_engine.stats_and_grads(operands, labels, weights, *rest)
    return stats, grads[:2]


def exact_gradients(operands: Operands, labels: Tensor):
    """What `mean_gradients` returns, by the reference in float64."""
    nll_weight = torch.full(labels.shape, 1 / labels.shape[0], device=labels.device).double()
    rest = (RowWeights(nll_weight), all_needs(operands), Wanted())
    stats, grads = reference.stats_and_grads(in_float64(operands), labels, *rest)
    return stats, grads[:2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_every_option_under_every_schedule(name, sizes, dtype, monkeypatch):
    operands, labels = operands_of(CASES[name], *SIZES[sizes], dtype, "cuda")
    for schedule in SCHEDULES.values():
        check_forward_backward(triton_engine, CASES[name], operands, labels, schedule)
        check_backward(triton_engine, CASES[name], operands, labels, schedule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", ["PORTABLE", "HOPPER"])
def test_kernels_of_other_cards_and_older_tritons(tile, dtype, monkeypatch):
    """Without tensor descriptors, within 99 KiB of shared memory; and Hopper's without Gluon."""
    tuning = pytest.importorskip("hf_fused_head.kernels.tuning", reason="needs triton")
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    config = getattr(tuning, tile)._replace(num_programs=programs if tile == "HOPPER" else 0)
    monkeypatch.setattr(triton_engine, "tile_config", lambda device, dtype, by_library: config)
    operands, labels = operands_of(CASES["everything"], *SIZES["aligned"], dtype, "cuda")
    for schedule in _EPILOGUE.values():
        check_forward_backward(triton_engine, CASES["everything"], operands, labels, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_nearer_to_float64_than_stock(schedule, monkeypatch):
    hidden, weight, labels = trained_head(1024, 512, 8000)
    _, grads = mean_gradients(plain_head(hidden, weight), labels, SCHEDULES[schedule])
    _, truth = exact_gradients(plain_head(hidden, weight), labels)
    parameters = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logits = torch.nn.functional.linear(*parameters)
    torch.nn.functional.cross_entropy(logits.float(), labels).backward()
    for ours, stock, exact in zip(grads, parameters, truth, strict=True):
        assert relative_error(ours, exact) <= relative_error(stock.grad, exact)


@pytest.mark.parametrize("product_bytes", [0, 2**22], ids=["epilogue", "tile"])
@pytest.mark.parametrize("late", [False, True], ids=["in_the_last_product", "late"])
def test_error_does_not_grow_with_the_number_of_chunks(late, product_bytes):
    hidden, weight, labels = trained_head(4096, 512, 8000)
    operands = plain_head(hidden, weight)
    _, truth = exact_gradients(operands, labels)
    errors = []
    for chunk in (4096, 1024, 256):
        options = {"late_rounding": late, "product_bytes": product_bytes}
        schedule = fixed_schedule("gradient_in_forward", chunk, **options)
        _, grads = mean_gradients(operands, labels, schedule)
        errors.append([relative_error(*pair) for pair in zip(grads, truth, strict=True)])
    for several in errors[1:]:
        for error, one in zip(several, errors[0], strict=True):
            assert error <= 1.1 * one


def test_confident_tokens_keep_their_digits(monkeypatch):
    """At p = 1 - 1e-6 loss and gradients are within 1 % of float64."""
    hidden, weight, labels = trained_head(512, 256, 4000)
    logits = hidden.double() @ weight.double().T
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    lift = others - math.log(1e-6) - logits.gather(1, labels[:, None])[:, 0]
    target = weight[labels].double()
    hidden = hidden + lift[:, None] * target / target.pow(2).sum(1, keepdim=True)
    operands = plain_head(hidden.to(torch.bfloat16), weight)
    stats, grads = mean_gradients(operands, labels, SCHEDULES["one_chunk"])
    exact_stats, exact = exact_gradients(operands, labels)
    assert exact_stats.nll.median() < 1e-4
    assert ((stats.nll - exact_stats.nll).abs() <= 0.01 * exact_stats.nll).all()
    for ours, truth in zip(grads, exact, strict=True):
        assert relative_error(ours, truth) <= 0.01


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_bits_from_run_to_run(schedule, monkeypatch):
    hidden, weight, labels = trained_head(700, 320, 5000)
    first = mean_gradients(plain_head(hidden, weight), labels, SCHEDULES[schedule])
    for _ in range(3):
        again = mean_gradients(plain_head(hidden, weight), labels, SCHEDULES[schedule])
        assert torch.equal(first[0].nll, again[0].nll)
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_host_synchronisation(schedule, monkeypatch):
    case, schedule = CASES["everything"], SCHEDULES[schedule]
    operands, labels = operands_of(case, *SIZES["aligned"], torch.bfloat16, "cuda")
    weights = row_weights(case, labels.shape[0], "cuda")
    rest = (weights, all_needs(operands), Wanted(True, True, True), schedule)
    upstream = Upstream(*(torch.randn(labels.shape[0], device="cuda") for _ in range(4)))
    triton_engine.stats_and_grads(operands, labels, *rest)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats, grads = triton_engine.stats_and_grads(operands, labels, *rest)
        needs, windows = all_needs(operands), windows_of(schedule)
        triton_engine.row_grads(operands, labels, stats, upstream, needs, windows)
        triton_engine.multiply_(grads[0], upstream.nll[:1])
        # The one wait of the default path is for an event behind the first product.
        launch = triton_engine.speculate(labels, -100, SIZES["aligned"][2], pytest.fail)
        triton_engine.stats_and_grads(operands, launch.labels, *rest, launch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_65535_rows(monkeypatch):
    case, schedule = CASES["everything"], SCHEDULES["one_chunk"]
    operands, labels = operands_of(case, 70_001, 64, 500, torch.bfloat16, "cuda")
    check_forward_backward(triton_engine, case, operands, labels, schedule)
    check_backward(triton_engine, case, operands, labels, schedule)


@pytest.mark.parametrize("product_bytes", [0, 2**26], ids=["epilogue", "tile"])
@pytest.mark.parametrize("hidden_size", [64, 60])
def test_tiles_past_two_to_the_31(hidden_size, product_bytes):
    """A stored tile of more than 2**31 elements agrees with small ones, in every kernel."""
    hidden, weight, labels = trained_head(17_000, hidden_size, 131_072)
    operands = plain_head(hidden, weight)
    whole = fixed_schedule("gradient_in_forward", product_bytes=product_bytes)
    stats, grads = mean_gradients(operands, labels, whole)
    chunks = replace(whole, chunk_tokens=2048)
    small_stats, small = mean_gradients(operands, labels, chunks)
    if product_bytes:
        # The library takes other kernels for other numbers of rows.
        torch.testing.assert_close(stats.nll, small_stats.nll)
    else:
        assert torch.equal(stats.nll, small_stats.nll)
    assert relative_error(grads[0], small[0]) <= torch.finfo(torch.bfloat16).eps
    assert relative_error(grads[1], small[1]) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("num_tokens", "vocab_size", "hidden_size"),
    [(64, 8, 256), (200, 1000, 264), (1000, 3001, 640), (8200, 2000, 2304), (65, 40_000, 1024)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_last_product_of_a_sum_is_rounded_once(num_tokens, vocab_size, hidden_size, dtype):
    """Into poisoned memory, from operands with poison behind every row, twice the same bits."""
    device = torch.device("cuda")
    pitch = -(-vocab_size // 64) * 64 + 64
    padded = torch.full((num_tokens, pitch), float("nan"), dtype=dtype, device=device)
    tile = padded[:, :vocab_size].copy_(torch.randn(num_tokens, vocab_size, device=device))
    hidden = torch.randn(num_tokens, hidden_size, device=device).to(dtype)
    total = 30 * torch.randn(vocab_size, hidden_size, device=device)
    exact = total.double() + tile.double().t() @ hidden.double()
    config = tuning.tile_config(device, dtype, by_library=False)
    rounded = []
    for _ in range(2):
        poisoned = torch.full((vocab_size + 1, hidden_size), float("nan"), dtype=dtype).to(device)
        products.last_product(tile.t(), hidden, total.clone(), poisoned[:-1], config)
        assert poisoned[-1].isnan().all()
        rounded.append(poisoned[:-1])
    assert torch.equal(*rounded)
    best = relative_error(exact.to(dtype), exact)
    assert relative_error(rounded[0], exact) <= 1.02 * best


@products_by
@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "budget_mib", "chunks"),
    [(4096, 64, 1), (4096, 128, 1), (4096, 512, 1), (16_384, 384, 4), (16_384, 800, 2)],
)
def test_memory_stays_within_the_plan(num_tokens, budget_mib, chunks, smoothing, product):
    hidden, weight, labels = trained_head(num_tokens, 1024, 32_000)
    operands = plain_head(hidden, weight)
    needs, wanted = all_needs(operands), Wanted(smooth=smoothing)
    schedule = planned(operands, f"triton:{product}", budget_mib, needs=needs, wanted=wanted)
    mean_gradients(operands, labels, schedule, smoothing)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = mean_gradients(operands, labels, schedule, smoothing)
    peak = torch.cuda.max_memory_allocated() - before
    assert product == "tile" or num_tokens == chunks * schedule.chunk_tokens
    assert peak <= schedule.workspace_bytes + schedule.gradient_bytes + 2**21
    del kept


@pytest.mark.parametrize("every", [3, 100], ids=["left_out", "ride_along"])
def test_public_function_with_ignored_labels_and_upstream_scale(every):
    """Ignored rows, a tensor `num_items` and a loss scale, against torch in float64."""
    hidden, weight, labels = trained_head(500, 128, 3000)
    labels[::every] = -100
    items = torch.tensor(77, device="cuda")
    results = []
    for dtype in (torch.bfloat16, torch.float64, None):
        used = torch.bfloat16 if dtype is None else dtype
        h, w = (t.detach().to(used).requires_grad_() for t in (hidden, weight))
        if dtype is None:
            loss = linear_cross_entropy(h, w, labels, num_items=items, impl="triton")
        else:
            logits = torch.nn.functional.linear(h, w)
            logits = logits if dtype == torch.float64 else logits.float()
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / 77
        (3.0 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for name, torch_result, truth, ours in zip(("loss", "input", "weight"), *results, strict=True):
        assert_close_as_torch(name, ours, torch_result, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_backward_gives_the_same_gradients(dtype):
    hidden, weight, labels = trained_head(300, 128, 2000, dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, impl="triton")
    first = torch.autograd.grad(0.5 * loss, (hidden, weight), retain_graph=True)
    first = [grad.clone() for grad in first]
    second = torch.autograd.grad(0.5 * loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole_with_changing_lengths(reduction):
    def step(hidden, weight, labels):
        loss = linear_cross_entropy(
            2 * hidden, weight, labels, softcap=20.0, reduction=reduction, impl="triton"
        )
        return loss.sum()

    compiled_step = torch.compile(step, fullgraph=True)
    for num_tokens in (64, 130, 201):
        hidden, weight, labels = trained_head(num_tokens, 128, 1000)
        labels[: num_tokens // 4] = -100
        grads = []
        for function in (compiled_step, step):
            h, w = (t.detach().clone().requires_grad_() for t in (hidden, weight))
            function(h, w, labels).backward()
            grads.append((h.grad, w.grad))
        for compiled, eager in zip(*grads, strict=True):
            assert relative_error(compiled, eager) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_cuda_graph_replays_other_labels(schedule, monkeypatch):
    """A graph cannot ask the host: however many labels are ignored, and wrong ones give NaN."""
    monkeypatch.setattr(ops, "plan", lambda problem: SCHEDULES[schedule])
    hidden, weight, labels = trained_head(600, 128, 2000)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step():
        loss = linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1, impl="triton")
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for ignored in (0, 5, 400):
        labels.random_(2000)
        labels[:ignored] = -100
        graph.replay()
        for captured, eager in zip(results, step(), strict=True):
            assert relative_error(captured, eager) <= torch.finfo(torch.bfloat16).eps
    labels[-1] = 2000
    graph.replay()
    assert results[0].isnan()
    with pytest.raises(ValueError, match="2000 at position"):
        step()


def test_an_engine_that_asks_the_host_is_refused_in_a_cuda_graph():
    hidden, weight, labels = trained_head(64, 128, 500)
    linear_cross_entropy(hidden, weight, labels, impl="torch")
    refused = pytest.raises(NotImplementedError, match="CUDA graph")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        linear_cross_entropy(hidden, weight, labels, impl="torch")


def test_reduced_launch_overhead_of_the_compiler():
    """Under mode="reduce-overhead", which records CUDA graphs by itself."""

    def step(hidden, weight, labels):
        return linear_cross_entropy(2 * hidden, weight, labels, impl="triton")

    compiled_step = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        torch.manual_seed(seed)
        hidden, weight, labels = trained_head(256, 128, 1000)
        labels[: 7 * seed] = -100
        grads = []
        for function in (compiled_step, step):
            h, w = (t.detach().clone().requires_grad_() for t in (hidden, weight))
            function(h, w, labels).backward()
            grads.append((h.grad.clone(), w.grad.clone()))
        for compiled, eager in zip(*grads, strict=True):
            assert relative_error(compiled, eager) <= torch.finfo(torch.bfloat16).eps


def test_statistics_of_the_public_function():
    hidden, weight, labels = trained_head(300, 128, 2000)
    stats = linear_cross_entropy_with_stats(hidden, weight, labels, impl="triton")
    exact = linear_cross_entropy_with_stats(
        hidden.double(), weight.double(), labels, impl="reference"
    )
    plain = linear_cross_entropy_with_stats(hidden, weight, labels, impl="reference")
    for name in ("loss", "nll", "lse", "entropy"):
        tensors = (getattr(result, name) for result in (stats, plain, exact))
        assert_close_as_torch(name, *tensors)
    assert torch.equal(stats.correct, exact.correct)


def test_frozen_parts_cost_no_gradient():
    hidden, weight, labels = trained_head(300, 128, 2000)
    operands = plain_head(hidden, weight)
    nll_weight = torch.ones(labels.shape, device="cuda")
    for needs in (Needs([True], [False], False), Needs([False], [True], False)):
        rest = (needs, Wanted(), SCHEDULES["one_chunk"])
        _, grads = triton_engine.stats_and_grads(operands, labels, RowWeights(nll_weight), *rest)
        wanted = [*needs.inputs, *needs.weights, needs.bias]
        assert [grad.numel() > 0 for grad in grads] == wanted


@pytest.mark.multigpu
def test_runs_on_the_device_of_its_tensors():
    hidden, weight, labels = (t.to("cuda:1") for t in trained_head(300, 128, 2000))
    stats, grads = mean_gradients(plain_head(hidden, weight), labels, SCHEDULES["one_chunk"])
    assert torch.isfinite(stats.nll).all()
    assert all(torch.isfinite(grad).all() for grad in grads)
