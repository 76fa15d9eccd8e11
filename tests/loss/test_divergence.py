"""`linear_kl_div` against float64: every divergence, option, dtype, mask and cut."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_as_torch, assert_norm_as_torch
from plain_divergence import (
    NAMES,
    TEACHER,
    Pair,
    by_ours,
    by_plain,
    check,
    plain_divergence,
    results,
    upstream_of,
    widened,
)
from torch import Tensor

IMPLS = ("reference", "torch")
BETAS = (0.0, 0.3, 0.5, 1.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
SHAPED = {
    "temperature": 1.7,
    "student_logit_scale": 0.7,
    "student_softcap": 3.0,
    "teacher_logit_scale": 1.2,
    "teacher_softcap": 2.0,
}
LARGE = Pair(shape=(200,), vocab_size=1031, masked=9)
SMALLEST_MIB = 0.001


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, SHAPED], ids=["plain", "shaped"])
def test_loss_and_gradients(
    impl: str, beta: float, reduction: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    pair = Pair(options={"beta": beta, "reduction": reduction, **options})
    check(pair, by_ours(pair, impl), pair.tensors(dtype))


@pytest.mark.parametrize("name", [*SHAPED, "beta"])
def test_every_option_moves_the_loss(name: str) -> None:
    """A comparison in which an option changes nothing would not notice that it is forgotten."""
    pair = Pair(options={**SHAPED, "beta": 0.3})
    tensors = pair.tensors(torch.float32)
    options = {key: value for key, value in pair.options.items() if key != name}
    with pytest.raises(AssertionError, match="exceeds the budget"):
        check(pair, by_ours(Pair(options=options), "torch"), tensors)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mib", [SMALLEST_MIB, 1.0, 1024.0])
def test_chunks(beta: float, reduction: str, dtype: torch.dtype, mib: float) -> None:
    pair = LARGE.with_options(beta=beta, reduction=reduction, student_softcap=5.0)
    check(pair, by_ours(pair, "torch", mib), pair.tensors(dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "dtypes",
    [pair for pair in itertools.product(DTYPES, DTYPES) if pair[0] != pair[1]],
    ids=str,
)
def test_student_and_teacher_of_different_dtypes(
    impl: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    pair = LARGE.with_options(beta=0.3)
    check(pair, by_ours(pair, impl, SMALLEST_MIB), pair.tensors(*dtypes))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_nearly_equal_heads_keep_their_digits(beta: float, distance: float) -> None:
    """As good as float64 formulas on float32 logits: only the products have lost digits."""
    pair = Pair((64,), (32, 32), 2053, masked=0, options={"beta": beta})
    tensors = pair.tensors(torch.float32)
    tensors["teacher"] = tensors["student"]
    for student, teacher in zip(NAMES[1:], TEACHER[1:], strict=True):
        noise = distance * torch.randn_like(tensors[student])
        tensors[teacher] = tensors[student] + noise
    ours = results(by_ours(pair, "torch"), tensors)
    truth = results(by_plain(pair), widened(tensors))

    def from_rounded_logits(tensors: dict[str, Tensor]) -> Tensor:
        log_probs = [
            F.linear(tensors[names[0]], *(tensors[name] for name in names[1:]))
            .double()
            .log_softmax(dim=-1)
            for names in (NAMES, TEACHER)
        ]
        return plain_divergence(*log_probs, beta).mean()

    plain = results(from_rounded_logits, tensors)
    for name, value in ours.items():
        # Every class has an error of its own in the products: the sum is one that luck decides.
        if name == "loss":
            relative = (value.double() - truth[name]).abs() / truth[name]
            assert relative < torch.finfo(torch.float32).eps / distance
        else:
            assert_norm_as_torch(name, value, plain[name], truth[name])


@pytest.mark.parametrize("beta", BETAS)
def test_equal_heads_have_no_divergence(beta: float) -> None:
    pair = Pair(sizes=(8, 8), options={"beta": beta})
    tensors = pair.tensors(torch.float32)
    for student, teacher in zip(NAMES, TEACHER, strict=True):
        tensors[teacher] = tensors[student]
    for value in results(by_ours(pair, "torch"), tensors).values():
        assert not value.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_confident_tokens(impl: str, beta: float, reduction: str) -> None:
    pair = Pair(confident=True, options={"beta": beta, "reduction": reduction})
    check(pair, by_ours(pair, impl), pair.tensors(torch.float32))


@pytest.mark.parametrize("beta", BETAS)
def test_confident_tokens_keep_the_digits_of_small_divergences(beta: float) -> None:
    """In float32 a log-probability of -1e-8 is 0; the sum over the other classes is not."""
    pair = Pair((16,), confident=True, masked=0, options={"beta": beta, "reduction": "none"})
    tensors = pair.tensors(torch.float32)
    upstream = upstream_of(pair, torch.float32)
    ours = results(by_ours(pair, "torch"), tensors, upstream)["loss"]
    truth = results(by_ours(pair, "reference"), widened(tensors), upstream.double())["loss"]
    assert truth.min() < torch.finfo(torch.float32).eps
    # A logit near 60 has lost so many digits, which an exponential makes relative.
    lost = 60 * torch.finfo(torch.float32).eps
    assert ((ours - truth).abs() <= lost * truth).all()


@pytest.mark.parametrize("beta", BETAS)
def test_confident_tokens_of_different_classes(beta: float) -> None:
    pair = Pair(scale=60.0, options={"beta": beta})
    check(pair, by_ours(pair, "torch"), pair.tensors(torch.float32))


@pytest.mark.parametrize("beta", BETAS)
def test_a_saturated_softcap(beta: float) -> None:
    options = {"beta": beta, "student_softcap": 2.0, "teacher_softcap": 3.0}
    pair = Pair(scale=20.0, options=options)
    tensors = pair.tensors(torch.float32)
    ours = results(by_ours(pair, "torch"), tensors)
    check(pair, by_ours(pair, "torch"), tensors)
    assert all(value.isfinite().all() for value in ours.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beta", BETAS)
def test_a_class_that_both_biases_mask_changes_nothing(impl: str, beta: float) -> None:
    pair = Pair(options={"beta": beta})
    tensors = pair.tensors(torch.float32)
    kept = {n: t if n in ("student", "teacher", "mask") else t[5:] for n, t in tensors.items()}
    for bias in ("student_bias", "teacher_bias"):
        tensors[bias][:5] = -torch.inf
    ours, plain = results(by_ours(pair, impl), tensors), results(by_plain(pair), kept)
    truth = results(by_plain(pair), widened(kept))
    for name, value in ours.items():
        if name in ("student_weight", "student_bias"):
            assert not value[:5].any()
            value = value[5:]
        assert_close_as_torch(name, value, plain[name], truth[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_class_that_only_one_head_has(impl: str) -> None:
    """KL(q || p) is finite where the teacher has no mass, infinite where the student has none."""
    for bias, beta, infinite in (
        ("teacher_bias", 0.0, False),
        ("student_bias", 0.0, True),
        ("teacher_bias", 1.0, True),
        ("student_bias", 1.0, False),
        ("teacher_bias", 0.3, False),
        ("student_bias", 0.3, False),
    ):
        pair = Pair(masked=0, options={"beta": beta})
        tensors = pair.tensors(torch.float32)
        tensors[bias][:5] = -torch.inf
        found = results(by_ours(pair, impl), tensors)
        assert bool(found["loss"].isinf()) == infinite
        if not infinite:
            assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beta", BETAS)
def test_probabilities_below_the_smallest_float(impl: str, beta: float) -> None:
    pair = Pair(scale=200.0, options={"beta": beta})
    found = results(by_ours(pair, impl), pair.tensors(torch.float32))
    truth = results(by_plain(pair), widened(pair.tensors(torch.float32)))
    plain = results(by_ours(pair, "reference"), pair.tensors(torch.float32))
    for name, value in found.items():
        assert_close_as_torch(name, value, plain[name], truth[name])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_items", [11, torch.tensor(11), torch.tensor([11.0])], ids=repr)
def test_num_items(impl: str, num_items: int | Tensor) -> None:
    pair = Pair(options={"num_items": num_items})
    plain = Pair(options={"num_items": 11})
    tensors = pair.tensors(torch.float32)
    ours = by_ours(pair, impl)(tensors)
    assert ours.shape == ()
    assert_close_as_torch("loss", ours, by_plain(plain)(tensors), by_plain(plain)(widened(tensors)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0,), (3, 7)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token_that_counts(impl: str, shape: tuple[int, ...], reduction: str) -> None:
    pair = Pair(shape=shape, masked=math.prod(shape), options={"reduction": reduction})
    found = results(
        by_ours(pair, impl), pair.tensors(torch.float32), upstream_of(pair, torch.float32)
    )
    loss = found.pop("loss")
    assert loss.isnan().all() if reduction == "mean" else not loss.any()
    assert not any(grad.any() for grad in found.values())
    if reduction == "mean":
        counted = results(
            by_ours(pair.with_options(num_items=5), impl), pair.tensors(torch.float32)
        )
        assert not any(value.any() for value in counted.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("shape", "vocab_size"), [((1,), 1), ((1,), 2), ((67,), 131), ((), 5)])
def test_sizes(impl: str, shape: tuple[int, ...], vocab_size: int) -> None:
    pair = Pair(shape=shape, vocab_size=vocab_size, masked=0)
    check(pair, by_ours(pair, impl), pair.tensors(torch.float32))


def test_tensors_that_are_not_contiguous() -> None:
    pair = Pair()
    tensors = pair.tensors(torch.float32)
    for name in ("student_weight", "teacher_weight"):
        tensors[name] = tensors[name].t().contiguous().t()
    for name in ("student", "teacher"):
        tensors[name] = tensors[name].transpose(0, 1).contiguous().transpose(0, 1)
    check(pair, by_ours(pair, "torch"), tensors)
