"""Faults that were measured in other fused heads: each is a property that this one has."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_as_torch, relative_error
from plain_head import NAMES, Problem, by_ours, by_plain, check, results, widened
from torch import Tensor

from hf_fused_head import linear_cross_entropy, linear_cross_entropy_with_stats

IMPLS = ("torch", "reference")
REDUCTIONS = ("mean", "none")
BUDGETS_MIB = (None, 0.01)

every_impl = pytest.mark.parametrize("impl", IMPLS)
every_cut = pytest.mark.parametrize(
    ("impl", "mib"), [("torch", None), ("torch", 0.01), ("reference", None)]
)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


# Numerics


@every_cut
@every_reduction
@pytest.mark.parametrize("vocab_size", [1, 2, 3, 127, 129, 257, 1031, 1300])
def test_no_phantom_columns(impl: str, mib: float | None, reduction: str, vocab_size: int) -> None:
    problem = Problem(shape=(40,), vocab_size=vocab_size, options={"reduction": reduction})
    check(problem, by_ours(problem, impl, mib))


@every_cut
@every_reduction
@pytest.mark.parametrize("shift", [-120.0, 200.0, -1000.0])
def test_shifted_logits(impl: str, mib: float | None, reduction: str, shift: float) -> None:
    problem = Problem(shape=(40,), vocab_size=517, shift=shift, options={"reduction": reduction})
    check(problem, by_ours(problem, impl, mib))
    stats = stats_of(problem.tensors(torch.float32), impl=impl, memory_budget_mib=mib)
    assert torch.isfinite(stats.nll).all()
    assert torch.isfinite(stats.lse).all()


@every_cut
@every_reduction
@pytest.mark.parametrize("gap", [80.0, 95.0, 500.0, 30000.0])
def test_losses_above_ninety_nats(impl: str, mib: float | None, reduction: str, gap: float) -> None:
    problem = Problem(shape=(40,), vocab_size=517, ignored=0, options={"reduction": reduction})

    def far(loss):
        def value(tensors: dict[str, Tensor]) -> Tensor:
            target = tensors["target"]
            bias = tensors["bias"]
            hard = torch.zeros_like(bias).index_fill_(0, target[::3], -gap)
            return loss({**tensors, "bias": bias + hard})

        return value

    tensors = problem.tensors(torch.float32)
    upstream = torch.rand(40) if reduction == "none" else torch.tensor(1.0)
    ours = results(far(by_ours(problem, impl, mib)), tensors, upstream)
    plain = results(far(by_plain(problem)), tensors, upstream)
    truth = results(far(by_plain(problem)), widened(tensors), upstream.double())
    assert truth["loss"].max() > gap / 3
    for name, value in ours.items():
        assert_close_as_torch(name, value, plain[name], truth[name])


@every_impl
@every_reduction
@pytest.mark.parametrize(
    ("label", "place"), [(37, (0, 0)), (-1, (1, 2)), (10**9, (2, 6)), (-101, (0, 5))]
)
@pytest.mark.parametrize("grad", [False, True])
def test_a_label_out_of_range_is_named(
    impl: str, reduction: str, label: int, place: tuple[int, int], grad: bool
) -> None:
    problem = Problem(class_weight=True, options={"reduction": reduction})
    tensors = problem.tensors(torch.float32)
    tensors["target"][place] = label
    tensors["hidden"].requires_grad_(grad)
    message = rf"`target` must hold class ids in \[0, 37\).*got {label} at position \({place[0]}, "
    with pytest.raises(ValueError, match=message):
        by_ours(problem, impl)(tensors)


@every_cut
@every_reduction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_run_in_float32(
    impl: str, mib: float | None, reduction: str, dtype: torch.dtype
) -> None:
    problem = Problem(shape=(192,), vocab_size=1031, options={"reduction": reduction})
    tensors = problem.tensors(dtype)
    upstream = torch.ones(192) if reduction == "none" else torch.tensor(1.0)
    ours = results(by_ours(problem, impl, mib), tensors, upstream)
    truth = results(by_plain(problem), widened(tensors), upstream.double())
    for name in NAMES:
        # What rounding the exact result to this dtype costs, and next to nothing on top.
        floor = relative_error(truth[name].to(dtype), truth[name])
        assert relative_error(ours[name], truth[name]) < 1.1 * floor


@every_cut
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_not_rounded_before_the_softmax(
    impl: str, mib: float | None, dtype: torch.dtype
) -> None:
    problem = Problem(shape=(64,), vocab_size=517, options={"reduction": "none"})
    tensors = problem.tensors(dtype)
    exact = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    ours = by_ours(problem, impl, mib)(tensors)
    in_float32 = by_plain(problem)(exact)
    assert_close_as_torch("loss", ours, in_float32, by_plain(problem)(widened(tensors)))


@every_cut
@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_confident_tokens_keep_their_digits(
    impl: str, mib: float | None, reduction: str, dtype: torch.dtype
) -> None:
    problem = Problem(
        shape=(40,),
        hidden_size=64,
        vocab_size=517,
        ignored=0,
        confident=True,
        options={"reduction": reduction},
    )
    tensors = problem.tensors(dtype)
    per_token = problem.with_options(reduction="none")
    upstream = torch.ones(by_shape(problem))

    def careful(loss, turned: bool = False):
        # float32 logits, float64 after them: what no engine with float32 logits can beat. Their
        # sums may run in either direction.
        def value(t: dict[str, Tensor]) -> Tensor:
            hidden, weight = t["hidden"].float(), t["weight"].float()
            if turned:
                hidden, weight = hidden.flip(-1), weight.flip(-1)
            logits = F.linear(hidden, weight, t["bias"].float())
            eye = torch.eye(517, dtype=torch.float64)
            return loss({"hidden": logits.double(), "weight": eye, "target": t["target"]})

        return value

    # F.cross_entropy loses these digits in float64 too, so the truth is the reference's.
    exact, exact_tokens = by_ours(problem, "reference"), by_ours(per_token, "reference")
    nll = exact_tokens(widened(tensors))
    assert (nll < 1e-7).sum() > 5, "the problem is not confident"
    stats = stats_of(tensors, impl=impl, memory_budget_mib=mib)
    possible = careful(exact_tokens)(tensors) / nll
    assert_close_as_torch("nll", (stats.nll / nll).float(), possible, torch.ones_like(nll))
    # Token by token: a maximum over all would hide what happens to the confident ones.
    ours = results(by_ours(problem, impl, mib), tensors, upstream)["hidden"]
    truth = results(exact, widened(tensors), upstream.double())["hidden"]
    best, turned = (
        results(careful(exact, order), tensors, upstream.double())["hidden"]
        for order in (False, True)
    )
    for row in range(40):
        possible = max(best[row], turned[row], key=lambda grad: (grad - truth[row]).abs().max())
        assert_close_as_torch(f"hidden of token {row}", ours[row], possible, truth[row])


@every_impl
def test_no_gradient_is_filtered_away(impl: str) -> None:
    problem = Problem(shape=(30,), vocab_size=517, ignored=0, options={"logit_scale": 4.0})
    tensors = problem.tensors(torch.float32)
    tensors["target"] = tensors["target"] % 100
    ours = results(by_ours(problem, impl), tensors, None)["bias"][100:]
    truth = results(by_plain(problem), widened(tensors), None)["bias"][100:]
    plain = results(by_plain(problem), tensors, None)["bias"][100:]
    assert truth.min() < 1e-7
    ones = torch.ones_like(truth)
    assert_close_as_torch("ratio", (ours / truth).float(), (plain / truth).float(), ones)


@every_impl
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_loss_is_float32(impl: str, reduction: str, dtype: torch.dtype) -> None:
    problem = Problem(options={"reduction": reduction})
    tensors = problem.tensors(dtype)
    assert by_ours(problem, impl)(tensors).dtype == torch.float32
    grads = results(by_ours(problem, impl), tensors, torch.ones(by_shape(problem)))
    assert all(grads[name].dtype == dtype for name in NAMES)


def by_shape(problem: Problem) -> tuple[int, ...]:
    return problem.shape if problem.options["reduction"] == "none" else ()


@every_cut
@every_reduction
def test_every_run_gives_the_same_bits(impl: str, mib: float | None, reduction: str) -> None:
    problem = Problem(shape=(64,), vocab_size=517, options={"reduction": reduction})
    tensors = problem.tensors(torch.bfloat16)
    upstream = torch.ones(by_shape(problem))
    first, second = (results(by_ours(problem, impl, mib), tensors, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_impl
@every_reduction
def test_more_rows_than_sixteen_bits_count(impl: str, reduction: str) -> None:
    problem = Problem(
        shape=(65_539,), hidden_size=2, vocab_size=5, options={"reduction": reduction}
    )
    check(problem, by_ours(problem, impl))


@pytest.mark.slow
def test_more_logits_than_thirty_one_bits_count() -> None:
    num_tokens, vocab_size = 65_537, 32_771
    hidden = torch.randn(num_tokens, 1).requires_grad_()
    weight = torch.randn(vocab_size, 1)
    target = torch.randint(0, vocab_size, (num_tokens,))
    loss = linear_cross_entropy(hidden, weight, target, reduction="sum", impl="torch")
    loss.backward()
    tail = slice(num_tokens - 64, None)
    last = hidden.detach()[tail].double().requires_grad_()
    F.cross_entropy(last @ weight.double().T, target[tail], reduction="sum").backward()
    plain = hidden.detach()[tail].clone().requires_grad_()
    F.cross_entropy(plain @ weight.T, target[tail], reduction="sum").backward()
    assert_close_as_torch("hidden", hidden.grad[tail], plain.grad, last.grad)


# Ignored and missing tokens


@every_impl
@pytest.mark.parametrize("shape", [(3, 7), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, math.nan),
        ({"z_loss": 0.1, "label_smoothing": 0.1}, math.nan),
        ({"num_items": 5}, 0.0),
        ({"num_items": torch.tensor(5)}, 0.0),
        ({"reduction": "sum"}, 0.0),
        ({"reduction": "none"}, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("class_weight", [False, True])
def test_no_valid_token(
    impl: str, shape: tuple[int, ...], options: dict, expected: float, class_weight: bool
) -> None:
    num_tokens = math.prod(shape)
    problem = Problem(shape=shape, ignored=num_tokens, class_weight=class_weight, options=options)
    tensors = problem.tensors(torch.float32)
    leaves = {name: tensors[name].requires_grad_() for name in NAMES}
    loss = by_ours(problem, impl)(tensors)
    assert loss.shape == (shape if options.get("reduction") == "none" else ())
    assert loss.requires_grad
    same = torch.full_like(loss, expected)
    torch.testing.assert_close(loss.detach(), same, equal_nan=True)
    loss.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} is not connected"
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


@every_cut
@every_reduction
def test_what_ignored_rows_hold_changes_nothing(
    impl: str, mib: float | None, reduction: str
) -> None:
    problem = Problem(shape=(64,), vocab_size=517, ignored=30, options={"reduction": reduction})
    tensors = problem.tensors(torch.float32)
    upstream = torch.ones(by_shape(problem))
    clean = results(by_ours(problem, impl, mib), tensors, upstream)
    ignored = tensors["target"] == -100
    tensors["hidden"][ignored] = float("nan")
    dirty = results(by_ours(problem, impl, mib), tensors, upstream)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
    assert not dirty["hidden"][ignored].any()


@every_impl
@every_reduction
def test_few_valid_tokens_among_many(impl: str, reduction: str) -> None:
    problem = Problem(shape=(90,), vocab_size=517, ignored=80, options={"reduction": reduction})
    check(problem, by_ours(problem, impl))


# Autograd


@every_cut
def test_every_token_has_its_own_upstream(impl: str, mib: float | None) -> None:
    problem = Problem(shape=(64,), vocab_size=517, options={"reduction": "none"})
    check(problem, by_ours(problem, impl, mib))


@every_impl
@every_reduction
def test_a_frozen_trunk_still_trains_the_head(impl: str, reduction: str) -> None:
    problem = Problem(options={"reduction": reduction})
    tensors = problem.tensors(torch.float32)
    tensors["weight"].requires_grad_()
    by_ours(problem, impl)(tensors).sum().backward()
    assert tensors["weight"].grad is not None
    assert tensors["weight"].grad.abs().sum() > 0
    assert tensors["hidden"].grad is None


@every_impl
@every_reduction
def test_a_second_backward_is_not_scaled_twice(impl: str, reduction: str) -> None:
    problem = Problem(options={"reduction": reduction})
    tensors = problem.tensors(torch.float32)
    tensors["hidden"].requires_grad_()
    loss = by_ours(problem, impl)(tensors).sum() * 0.5
    loss.backward(retain_graph=True)
    once = tensors["hidden"].grad.clone()
    loss.backward()
    assert torch.equal(tensors["hidden"].grad, 2 * once)


@pytest.mark.gpu
@every_reduction
def test_one_wait_for_the_device_in_a_step(reduction: str) -> None:
    problem = Problem(shape=(64,), vocab_size=517, ignored=0, options={"reduction": reduction})
    tensors = {name: t.cuda() for name, t in problem.tensors(torch.bfloat16).items()}
    tensors["hidden"].requires_grad_()
    by_ours(problem, "torch")(tensors).sum().backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as record:
            by_ours(problem, "torch")(tensors).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [entry for entry in record if "synchroniz" in str(entry.message)]
    assert len(waits) == (1 if reduction == "mean" else 2)


# Options that others drop


@every_cut
@every_reduction
@pytest.mark.parametrize(
    "options", [{"softcap": 3.0}, {"logit_scale": 0.0625}, {"label_smoothing": 0.1}], ids=str
)
def test_no_option_is_dropped(impl: str, mib: float | None, reduction: str, options: dict) -> None:
    problem = Problem(shape=(64,), vocab_size=517, options={**options, "reduction": reduction})
    check(problem, by_ours(problem, impl, mib))
    with pytest.raises(AssertionError, match="exceeds the budget"):
        check(problem, by_ours(Problem(options={"reduction": reduction}), impl, mib))


@every_impl
def test_losses_are_summed_over_micro_batches_by_the_whole_count(impl: str) -> None:
    problem = Problem(shape=(4, 9), ignored=7, options={"num_items": 29})
    tensors = problem.tensors(torch.float32)
    whole = results(by_ours(problem, impl), tensors, None)
    parts = [
        results(by_ours(problem, impl), {**tensors, "hidden": h, "target": t}, None)
        for h, t in zip(tensors["hidden"].split(1), tensors["target"].split(1), strict=True)
    ]
    truth = results(by_plain(problem), widened(tensors), None)
    for name in ("loss", "weight", "bias"):
        assert_close_as_torch(name, sum(p[name] for p in parts), whole[name], truth[name])


def stats_of(tensors: dict[str, Tensor], **options: object):
    return linear_cross_entropy_with_stats(
        tensors["hidden"],
        tensors["weight"],
        tensors["target"],
        linear_bias=tensors["bias"],
        **options,
    )
