"""`linear_cross_entropy` equals its definition, for every option, dtype and engine."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_as_torch
from plain_head import (
    Problem,
    by_ours,
    by_plain,
    check,
    loss_of_logits,
    plain_logits,
    results,
    shaped_logits,
    widened,
)
from torch import Tensor

from hf_fused_head import linear_cross_entropy, linear_cross_entropy_with_stats
from hf_fused_head.functional import operand_cross_entropy
from hf_fused_head.options import LossOptions

IMPLS = ("torch", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One small enough to be one tile, one whose tiles are cut in both directions by a tiny budget.
SMALL = Problem()
CUT = Problem(shape=(2, 60), hidden_size=16, vocab_size=1031, ignored=11)
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"logit_scale": 0.25},
    {"softcap": 2.0},
    {"z_loss": 0.01},
    {"ignore_index": 3},
    {"ignore_index": -1},
    {
        "label_smoothing": 0.2,
        "logit_scale": -1.5,
        "softcap": 3.0,
        "z_loss": 0.02,
    },
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("class_weight", [False, True], ids=["", "class-weight"])
def test_loss_and_gradients_are_as_near_to_the_truth_as_torch(
    impl: str, reduction: str, options: dict, class_weight: bool
) -> None:
    problem = Problem(class_weight=class_weight, options={**options, "reduction": reduction})
    check(problem, by_ours(problem, impl))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=["plain", "all"])
@pytest.mark.parametrize(
    ("impl", "mib"), [("torch", None), ("torch", 0.01), ("torch", 1.0), ("reference", None)]
)
def test_every_dtype_and_every_cut(
    impl: str, mib: float | None, dtype: torch.dtype, reduction: str, options: dict
) -> None:
    problem = CUT.with_options(**options, reduction=reduction)
    if dtype == torch.float64:
        # The truth is of the same precision here: torch's own comparison, with its own tolerance.
        upstream = torch.randn(problem.shape if reduction == "none" else (), dtype=dtype)
        tensors = problem.tensors(dtype)
        torch.testing.assert_close(
            results(by_ours(problem, impl, mib), tensors, upstream),
            results(by_plain(problem), tensors, upstream),
        )
    else:
        check(problem, by_ours(problem, impl, mib), dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(1,), (5,), (2, 3), (2, 1, 4), ()], ids=lambda shape: "x".join(map(str, shape))
)
def test_any_leading_shape(impl: str, bias: bool, shape: tuple[int, ...]) -> None:
    for reduction in ("mean", "none"):
        problem = Problem(shape=shape, bias=bias, ignored=0, options={"reduction": reduction})
        tensors = problem.tensors(torch.float32)
        upstream = torch.randn(shape if reduction == "none" else ())
        ours = results(by_ours(problem, impl), tensors, upstream)
        # F.cross_entropy takes no batch of no dimension; one token without it is the same.
        flat = Problem(shape=shape or (1,), bias=bias, options=problem.options)
        tensors["target"] = tensors["target"].reshape(flat.shape)
        tensors["hidden"] = tensors["hidden"].reshape(*flat.shape, -1)
        upstream = upstream.reshape(flat.shape) if reduction == "none" else upstream
        plain = results(by_plain(flat), tensors, upstream)
        truth = results(by_plain(flat), widened(tensors), upstream.double())
        for name, value in ours.items():
            expected = truth[name].reshape(value.shape)
            assert_close_as_torch(name, value, plain[name].reshape(value.shape), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}])
@pytest.mark.parametrize("class_weight", [False, True])
@pytest.mark.parametrize(
    "num_items", [1, 9, torch.tensor(9), torch.tensor([9.0]), torch.tensor([[9]])], ids=repr
)
def test_num_items_replaces_the_valid_count(
    impl: str, options: dict, class_weight: bool, num_items: int | Tensor
) -> None:
    problem = Problem(class_weight=class_weight, options={**options, "num_items": int(num_items)})
    ours = by_ours(problem.with_options(num_items=num_items), impl)
    assert ours(problem.tensors(torch.float32)).shape == ()
    check(problem, ours)


@pytest.mark.parametrize("num_items", [np.int64(7), np.array(7), np.array([7.0]), np.float32(7)])
def test_num_items_may_be_a_number_of_numpy(num_items: Any) -> None:
    tensors = SMALL.tensors(torch.float32)
    ours = by_ours(SMALL.with_options(num_items=num_items), "torch")(tensors)
    assert torch.equal(ours, by_ours(SMALL.with_options(num_items=7), "torch")(tensors))


@pytest.mark.parametrize("impl", IMPLS)
def test_ids_of_one_byte_are_taken(impl: str) -> None:
    tensors = SMALL.with_options(ignore_index=3).tensors(torch.float32)
    ours = by_ours(SMALL.with_options(ignore_index=3), impl)
    narrow = {**tensors, "target": tensors["target"].to(torch.uint8)}
    assert torch.equal(ours(narrow), ours(tensors))


def test_num_items_is_for_the_mean_only() -> None:
    problem = Problem(options={"reduction": "sum"})
    tensors = problem.tensors(torch.float32)
    with_items = by_ours(problem.with_options(num_items=3), "torch")(tensors)
    assert torch.equal(with_items, by_ours(problem, "torch")(tensors))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "subset", list(itertools.product((False, True), repeat=3))[1:], ids=lambda s: f"{s}"
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_subset_of_trainable_tensors(
    impl: str, subset: tuple[bool, bool, bool], reduction: str
) -> None:
    problem = Problem(options={"reduction": reduction})
    tensors = problem.tensors(torch.float32)
    whole = results(by_ours(problem, impl), tensors, upstream := upstream_for(problem))
    for name, wanted in zip(("hidden", "weight", "bias"), subset, strict=True):
        tensors[name].requires_grad_(wanted)
    loss = by_ours(problem, impl)(tensors)
    loss.backward(upstream)
    for name, wanted in zip(("hidden", "weight", "bias"), subset, strict=True):
        grad = tensors[name].grad
        assert (grad is not None) == wanted, name
        if grad is not None:
            assert_close_as_torch(name, grad, whole[name], whole[name].double())


def upstream_for(problem: Problem) -> Tensor:
    return torch.randn(problem.shape if problem.options.get("reduction") == "none" else ())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("no_grad", ["no_grad", "inference_mode", "frozen"])
def test_without_gradients_the_loss_is_the_same(impl: str, no_grad: str) -> None:
    tensors = SMALL.tensors(torch.float32)
    plain = by_plain(SMALL)(tensors)
    truth = by_plain(SMALL)(widened(tensors))
    context = torch.enable_grad() if no_grad == "frozen" else getattr(torch, no_grad)()
    for name in ("hidden", "weight", "bias"):
        tensors[name].requires_grad_(no_grad != "frozen")
    with context:
        loss = by_ours(SMALL, impl)(tensors)
    assert not loss.requires_grad
    assert_close_as_torch("loss", loss, plain, truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mib", [None, 0.01])
def test_statistics_of_every_token(impl: str, mib: float | None) -> None:
    tensors = CUT.tensors(torch.float32)
    hidden = tensors["hidden"].requires_grad_()
    found = linear_cross_entropy_with_stats(
        hidden,
        tensors["weight"],
        tensors["target"],
        linear_bias=tensors["bias"],
        softcap=5.0,
        impl=impl,
        memory_budget_mib=mib,
    )
    target = tensors["target"]
    valid = target != -100
    truth, plain = (plain_stats(t, target, valid) for t in (widened(tensors), tensors))
    for name in ("nll", "lse", "entropy"):
        value = getattr(found, name)
        assert not value.requires_grad
        assert value.shape == target.shape
        assert torch.equal(value[~valid], torch.zeros_like(value[~valid]))
        assert_close_as_torch(name, value, plain[name], truth[name])
    assert torch.equal(found.correct, truth["correct"])
    assert found.num_valid == valid.sum()
    assert found.num_valid.shape == ()
    assert found.loss.requires_grad


def plain_stats(tensors: dict[str, Tensor], target: Tensor, valid: Tensor) -> dict[str, Tensor]:
    logits = plain_logits(tensors["hidden"], tensors["weight"], tensors["bias"], 1.0, 5.0).detach()
    log_probs = logits.log_softmax(dim=-1)
    nll = -log_probs.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return {
        "nll": nll * valid,
        "lse": logits.logsumexp(dim=-1) * valid,
        "entropy": -(log_probs.exp() * log_probs).sum(dim=-1) * valid,
        "correct": (logits.argmax(dim=-1) == target) & valid,
    }


@pytest.mark.parametrize("stats", [(), ("accuracy",), ("entropy",), ("entropy", "accuracy")])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_statistics_asked_for_are_made(stats: tuple, grad: bool, reduction: str) -> None:
    tensors = SMALL.tensors(torch.float32)
    pair = (tensors["hidden"].requires_grad_(grad), tensors["weight"])
    options = LossOptions(reduction=reduction)
    found = operand_cross_entropy([pair], tensors["target"], options, stats=stats)
    assert (found.entropy is not None) == ("entropy" in stats)
    assert (found.correct is not None) == ("accuracy" in stats)


def low_rank(dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden states, a head, and the two sides of an adapter of rank 3."""
    tensors = CUT.tensors(dtype)
    return {
        "hidden": tensors["hidden"],
        "weight": tensors["weight"],
        "low": torch.randn(*CUT.shape, 3).to(dtype),
        "up": (torch.randn(CUT.vocab_size, 3) * 0.5).to(dtype),
        "bias": tensors["bias"],
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mib", [None, 0.01])
def test_a_sum_of_two_products(
    impl: str, dtype: torch.dtype, reduction: str, mib: float | None
) -> None:
    problem = CUT.with_options(reduction=reduction, softcap=4.0, logit_scale=0.5)
    target = problem.tensors(dtype)["target"]
    leaves, upstream = low_rank(dtype), upstream_for(problem)

    def plain_pair(t: dict[str, Tensor]) -> Tensor:
        product = F.linear(t["hidden"], t["weight"], t["bias"]) + F.linear(t["low"], t["up"])
        return loss_of_logits(shaped_logits(product, 0.5, 4.0), target, reduction=reduction)

    def paired(t: dict[str, Tensor]) -> Tensor:
        return operand_cross_entropy(
            [(t["hidden"], t["weight"]), (t["low"], t["up"])],
            target,
            LossOptions(**problem.options),
            linear_bias=t["bias"],
            impl=impl,
            memory_budget_mib=mib,
        ).loss

    def run(loss, kind: torch.dtype) -> list[Tensor]:
        t = {name: value.to(kind).clone().requires_grad_() for name, value in leaves.items()}
        value = loss(t)
        grads = torch.autograd.grad(value, list(t.values()), upstream.to(value.dtype))
        return [value.detach(), *grads]

    ours, plain = run(paired, dtype), run(plain_pair, dtype)
    truth = run(plain_pair, torch.float64)
    for name, *values in zip(("loss", *leaves), ours, plain, truth, strict=True):
        assert_close_as_torch(name, *values)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_adapter_is_a_merged_head(impl: str, reduction: str) -> None:
    problem = CUT.with_options(reduction=reduction)
    target = problem.tensors(torch.float64)["target"]
    leaves = low_rank(torch.float64)
    leaves["low"] = torch.randn(3, problem.hidden_size).double()
    leaves = {name: value.requires_grad_() for name, value in leaves.items()}
    hidden, weight, down, up, bias = leaves.values()
    merged = by_plain(problem)(
        {"hidden": hidden, "weight": weight + up @ down, "bias": bias, "target": target}
    )
    paired = operand_cross_entropy(
        [(hidden, weight), (hidden @ down.T, up)],
        target,
        LossOptions(reduction=reduction),
        linear_bias=bias,
        impl=impl,
    ).loss
    upstream = upstream_for(problem).double()
    grads = [
        torch.autograd.grad(loss, list(leaves.values()), upstream) for loss in (paired, merged)
    ]
    torch.testing.assert_close(paired, merged)
    torch.testing.assert_close(*grads)


def test_a_frozen_head_with_a_trainable_adapter_gets_only_its_gradients() -> None:
    tensors = SMALL.tensors(torch.float32)
    down = torch.randn(3, 8).requires_grad_()
    up = torch.zeros(37, 3).requires_grad_()
    low = tensors["hidden"] @ down.T
    pairs = [(tensors["hidden"], tensors["weight"]), (low, up)]
    operand_cross_entropy(pairs, tensors["target"], LossOptions(), impl="torch").loss.backward()
    assert tensors["weight"].grad is None
    assert up.grad is not None
    assert up.grad.abs().sum() > 0
    assert down.grad is not None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(impl: str, reduction: str, inner: torch.dtype) -> None:
    problem = Problem(options={"reduction": reduction})
    tensors = problem.tensors(torch.float32)
    upstream = upstream_for(problem)

    def under(loss):
        def run(leaves: dict[str, Tensor]) -> Tensor:
            with torch.autocast("cpu", dtype=inner):
                return loss(leaves)

        return run

    ours = results(under(by_ours(problem, impl)), tensors, upstream)
    plain = results(under(by_plain(problem)), tensors, upstream)
    cast = {n: t.to(inner) if t.is_floating_point() else t for n, t in tensors.items()}
    truth = results(by_plain(problem), widened(cast), upstream.double())
    for name, value in ours.items():
        assert value.dtype == torch.float32
        budget_dtype = value if name == "loss" else value.to(inner)
        assert_close_as_torch(name, budget_dtype, plain[name], truth[name])


def test_autocast_around_the_call_does_not_round_inside() -> None:
    tensors = CUT.tensors(torch.bfloat16)
    outside = by_ours(CUT, "torch")(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = by_ours(CUT, "torch")(tensors)
    assert torch.equal(outside, inside)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["hidden", "weight", "both", "expanded"])
def test_strided_tensors(impl: str, layout: str) -> None:
    problem = Problem(shape=(21,))
    tensors = problem.tensors(torch.float32)
    if layout in ("hidden", "both"):
        tensors["hidden"] = torch.randn(21, 16)[:, ::2]
    if layout in ("weight", "both"):
        tensors["weight"] = torch.randn(16, 37)[::2].T
    if layout == "expanded":
        tensors["hidden"] = torch.randn(1, 8).expand(21, 8)
    inputs = {name: t for name, t in tensors.items() if name != "target"}
    before = {name: t.clone() for name, t in inputs.items()}
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    loss = by_ours(problem, impl)({**leaves, "target": tensors["target"]})
    loss.backward()
    plain = results(by_plain(problem), tensors, torch.tensor(1.0))
    truth = results(by_plain(problem), widened(tensors), torch.tensor(1.0).double())
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert_close_as_torch(name, leaf.grad, plain[name], truth[name])
        assert torch.equal(leaf.detach(), before[name]), f"{name} was written to"


FORGOTTEN = [
    ({"softcap": 2.0}, {}),
    ({"logit_scale": 0.5}, {}),
    ({"label_smoothing": 0.1}, {}),
    ({"z_loss": 0.01}, {}),
    ({"ignore_index": 3}, {"ignore_index": 4}),
    ({"num_items": 9}, {}),
    ({"reduction": "sum"}, {}),
]


@pytest.mark.parametrize(("options", "wrong"), FORGOTTEN, ids=lambda o: "+".join(o) or "forgotten")
def test_the_comparison_notices_a_forgotten_option(options: dict, wrong: dict) -> None:
    problem = Problem(options=options)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        check(problem, by_ours(Problem(options=wrong), "torch"))


@pytest.mark.parametrize("missing", ["bias", "class_weight"])
def test_the_comparison_notices_a_forgotten_tensor(missing: str) -> None:
    problem = Problem(class_weight=True)
    ours = by_ours(problem, "torch")

    def forgetful(tensors: dict[str, Tensor]) -> Tensor:
        kept = {name: t for name, t in tensors.items() if name != missing}
        zero = 0.0 * tensors["bias"].sum()
        return ours(kept) + zero

    with pytest.raises(AssertionError, match="exceeds the budget"):
        check(problem, forgetful)


X, W, Y = torch.zeros(4, 8), torch.zeros(5, 8), torch.zeros(4, dtype=torch.int64)
REFUSED = [
    ({"input": X[:, :7]}, ValueError, r"`input` must have shape \(..., 8\).*got \(4, 7\)"),
    ({"input": X[0, 0]}, ValueError, r"`input` must have shape .*got \(\)"),
    ({"input": X.long()}, TypeError, "`input` must be float16.*got torch.int64"),
    ({"input": X.bfloat16()}, TypeError, "`linear_weight` must have the dtype of `input`"),
    ({"linear_weight": W[0]}, ValueError, r"`linear_weight` must have shape .*got \(8,\)"),
    ({"linear_weight": W[:0]}, ValueError, r"at least one, got \(0, 8\)"),
    ({"input": X[:, :0], "linear_weight": W[:, :0]}, ValueError, "hidden size of at least one"),
    ({"target": Y[:3]}, ValueError, r"`target` must have shape \(4,\), got \(3,\)"),
    ({"target": Y.int()}, TypeError, r"`target` must be int64.*got torch.int32.*target.long\(\)"),
    ({"target": Y.float()}, TypeError, r"`target` must be int64 .*\(4,\): class ids are made as"),
    ({"target": torch.rand(4, 5)}, NotImplementedError, r"class probabilities, .*\(4, 5\): use F."),
    ({"linear_weight": torch.zeros(5, 2, 8)}, NotImplementedError, "for the heads of a K-dim"),
    ({"options": object()}, NotImplementedError, "`options` must be None.* memory_budget_mib"),
    ({"num_items": np.array([1, 2])}, TypeError, r"`num_items` must be .*got array\(\[1, 2\]\)"),
    ({"num_items": np.bool_(True)}, TypeError, "`num_items` must be an int .*got True"),
    ({"target": Y.to("meta")}, ValueError, "`target` must be on cpu, got meta"),
    ({"linear_bias": torch.zeros(4)}, ValueError, r"`linear_bias` must have shape \(5,\), got"),
    ({"linear_bias": torch.zeros(5).half()}, TypeError, "`linear_bias` must have the dtype"),
    ({"weight": torch.zeros(5, 1)}, ValueError, r"`weight` must have shape \(5,\), got \(5, 1\)"),
    ({"weight": torch.zeros(5).to("meta")}, ValueError, "`weight` must be on cpu, got meta"),
    ({"weight": torch.ones(5).requires_grad_()}, NotImplementedError, "must not require grad"),
    ({"weight": torch.ones(5).long()}, TypeError, "`weight` must be floating point"),
    ({"num_items": torch.ones(2)}, ValueError, r"`num_items` must be .*got shape \(2,\)"),
    ({"num_items": "9"}, TypeError, "`num_items` must be an int .*got '9'"),
    ({"num_items": -1}, ValueError, "`num_items` must be at least 0, got -1"),
    ({"memory_budget_mib": 0}, ValueError, "`memory_budget_mib` must be positive or None, got 0"),
    ({"memory_budget_mib": "1"}, ValueError, "`memory_budget_mib` must be positive .* got '1'"),
    ({"reduction": "max"}, ValueError, "`reduction` must be one of"),
    ({"impl": "cuda"}, ValueError, "`impl` must be one of"),
    ({"target": torch.tensor([0, 5, 1, 2])}, ValueError, r"got 5 at position \(1,\)"),
    ({"target": torch.tensor([0, 1, 1, -2])}, ValueError, r"got -2 at position \(3,\)"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    REFUSED,
    # Values of random tensors and addresses differ from process to process.
    ids=[f"{index} {next(iter(changes))}" for index, (changes, *_) in enumerate(REFUSED)],
)
def test_wrong_arguments_are_named_with_the_remedy(
    changes: dict, error: type[Exception], message: str
) -> None:
    arguments = {"input": X, "linear_weight": W, "target": Y, **changes}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


def test_an_unknown_statistic_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`stats` must name some of .* got 'perplexity'"):
        operand_cross_entropy([(X, W)], Y, LossOptions(), stats=("perplexity",))


def test_no_operand_is_refused() -> None:
    with pytest.raises(ValueError, match="`operands` must hold at least one pair"):
        operand_cross_entropy([], Y, LossOptions())
