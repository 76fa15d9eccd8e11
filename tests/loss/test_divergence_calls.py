"""`linear_kl_div` and its callers: autograd, statistics, autocast, compiler, wrong arguments."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from oracle import assert_close_as_torch
from plain_divergence import (
    NAMES,
    TEACHER,
    Pair,
    by_ours,
    by_plain,
    plain_log_probs,
    results,
    upstream_of,
    widened,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hf_fused_head import linear_kl_div, linear_kl_div_with_stats
from hf_fused_head.run_record import recording

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
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("subset", list(itertools.product((False, True), repeat=3)))
def test_frozen_parts(impl: str, reduction: str, subset: tuple[bool, ...]) -> None:
    pair = Pair(options={"reduction": reduction})
    tensors = pair.tensors(torch.float32)
    every = results(by_ours(pair, impl), tensors, upstream := upstream_of(pair, torch.float32))
    wanted = [name for name, want in zip(NAMES, subset, strict=True) if want]
    leaves = {name: tensors[name].clone().requires_grad_() for name in wanted}
    loss = by_ours(pair, impl)({**tensors, **leaves})
    assert loss.requires_grad == bool(wanted)
    assert torch.equal(loss, every["loss"])
    if wanted:
        grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
        for name, grad in zip(wanted, grads, strict=True):
            assert_close_as_torch(name, grad, every[name], every[name].double())


def test_no_grad_makes_no_gradient() -> None:
    tensors = Pair().tensors(torch.float32)
    for name in NAMES:
        tensors[name].requires_grad_()
    with torch.no_grad(), recording() as record:
        loss = by_ours(Pair(), "torch")(tensors)
    assert not loss.requires_grad
    assert record.schedule is not None and record.schedule.name == "loss_only"


def test_the_teacher_gets_no_gradient() -> None:
    tensors = Pair().tensors(torch.float32)
    for name in (*NAMES, *TEACHER):
        tensors[name].requires_grad_()
    by_ours(Pair(), "torch")(tensors).backward()
    assert all(tensors[name].grad is not None for name in NAMES)
    assert all(tensors[name].grad is None for name in TEACHER)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_retained_graph_gives_the_same_gradients(
    impl: str, reduction: str, dtype: torch.dtype
) -> None:
    pair = Pair(options={"reduction": reduction, "beta": 0.3})
    tensors = pair.tensors(dtype)
    before = {name: (t.clone(), t._version) for name, t in tensors.items()}
    leaves = [tensors[name].requires_grad_() for name in NAMES]
    loss, upstream = by_ours(pair, impl)(tensors), upstream_of(pair, torch.float32)
    first, second = (
        [grad.clone() for grad in torch.autograd.grad(loss, leaves, upstream, retain_graph=True)]
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    for name, (value, version) in before.items():
        assert torch.equal(tensors[name].detach(), value)
        assert tensors[name]._version == version


def test_float16_gradients_survive_a_loss_scale() -> None:
    pair = Pair(options={"num_items": 10**9})
    tensors = pair.tensors(torch.float16)
    scale = torch.tensor(1e9)
    ours = results(by_ours(pair, "torch"), tensors, scale)
    plain = results(by_plain(Pair(options={"reduction": "sum"})), tensors)
    truth = results(by_plain(pair), widened(tensors), scale.double())
    for name in NAMES:
        assert ours[name].abs().max() > 0
        assert_close_as_torch(name, ours[name], plain[name], truth[name])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(impl: str, beta: float, reduction: str) -> None:
    options = {**SHAPED, "beta": beta, "reduction": reduction}
    pair = Pair((5,), (3, 4), 7, masked=1, options=options)
    tensors = pair.tensors(torch.float64)

    def loss(*leaves: Tensor) -> Tensor:
        return by_ours(pair, impl)({**tensors, **dict(zip(NAMES, leaves, strict=True))})

    assert torch.autograd.gradcheck(loss, [tensors[name].requires_grad_() for name in NAMES])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics(reduction: str) -> None:
    pair = Pair(options={**SHAPED, "beta": 0.3, "reduction": reduction})
    tensors = pair.tensors(torch.float32)
    for impl in IMPLS:
        found = linear_kl_div_with_stats(
            **{name: tensors[name] for name in (*NAMES, *TEACHER)},
            mask=tensors["mask"],
            impl=impl,  # type: ignore[arg-type]
            **pair.options,
        )
        assert torch.equal(found.loss, by_ours(pair, impl)(tensors))
        values = {}
        for kind, of in (("plain", tensors), ("truth", widened(tensors))):
            log_p = plain_log_probs(of, pair.options, "student")
            values[kind] = {
                "kl": by_plain(pair.with_options(reduction="none"))(of),
                "student_entropy": -(log_p.exp() * log_p).sum(dim=-1) * of["mask"],
            }
        for name, plain in values["plain"].items():
            value = getattr(found, name)
            assert not value.requires_grad
            assert_close_as_torch(name, value, plain, values["truth"][name])


def test_only_the_loss_of_the_statistics_is_differentiable() -> None:
    tensors = Pair().tensors(torch.float32)
    tensors["student"].requires_grad_()
    for reduction in ("mean", "none"):
        found = linear_kl_div_with_stats(
            **{name: tensors[name] for name in (*NAMES, *TEACHER)}, reduction=reduction
        )
        assert [value.requires_grad for value in found] == [True, False, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl: str) -> None:
    pair = Pair()
    tensors = pair.tensors(torch.float32)
    narrow = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = results(by_ours(pair, impl), tensors)
    expected = results(by_ours(pair, impl), narrow)
    assert torch.equal(ours["loss"], expected["loss"])
    for name in NAMES:
        assert torch.equal(ours[name], expected[name].float())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_for_every_length_and_mask(reduction: str, beta: float, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    options = {"reduction": reduction, "beta": beta}
    divergence = by_ours(Pair(options=options), "auto")
    compiled = torch.compile(divergence, backend=counter, fullgraph=True, dynamic=True)
    compilations = set()
    for num_tokens, masked in ((9, 1), (14, 3), (30, 29), (6, 6)):
        pair = Pair((num_tokens,), masked=masked, options=options)
        tensors, upstream = pair.tensors(torch.float32), upstream_of(pair, torch.float32)
        ours = results(compiled, tensors, upstream)
        for name, value in results(divergence, tensors, upstream).items():
            torch.testing.assert_close(ours[name], value, equal_nan=True, msg=name)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(impl: str, reduction: str) -> None:
    pair = Pair(options={"reduction": reduction})
    tensors = pair.tensors(torch.float32)
    leaves = [tensors[name].requires_grad_() for name in NAMES]
    loss = by_ours(pair, impl)(tensors).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(map(torch.equal, first, again))
    with pytest.raises(NotImplementedError, match=r"must be differentiated once.*F\.kl_div"):
        (loss + again[0].square().sum()).backward()


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap"])
def test_transforms_are_refused(name: str) -> None:
    tensors = Pair().tensors(torch.float32)

    def loss(student: Tensor) -> Tensor:
        return by_ours(Pair(), "torch")({**tensors, "student": student})

    calls = {
        "grad": lambda x: torch.func.grad(loss)(x),
        "jvp": lambda x: torch.func.jvp(loss, (x,), (x,)),
        "vmap": lambda x: torch.func.vmap(loss)(x[None]),
    }
    with pytest.raises(NotImplementedError, match="`linear_kl_div` must be called outside of"):
        calls[name](tensors["student"])


def test_a_batch_of_upstream_gradients() -> None:
    tensors = Pair().tensors(torch.float32)
    leaf = tensors["student"].requires_grad_()
    loss = by_ours(Pair(), "torch")(tensors)
    upstreams = torch.tensor([1.0, 2.0])
    (batch,) = torch.autograd.grad(loss, leaf, upstreams, retain_graph=True, is_grads_batched=True)
    (one,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(batch, torch.stack((one, 2 * one)))


def test_without_values() -> None:
    tensors = {name: value.to("meta") for name, value in Pair().tensors(torch.float32).items()}
    leaves = [tensors[name].requires_grad_() for name in NAMES]
    loss = by_ours(Pair(), "torch")(tensors)
    grads = torch.autograd.grad(loss, leaves)
    assert loss.is_meta and [g.shape for g in grads] == [leaf.shape for leaf in leaves]


HEADS = {
    "student": torch.randn(4, 8),
    "student_weight": torch.randn(5, 8),
    "teacher": torch.randn(4, 6),
    "teacher_weight": torch.randn(5, 6),
}
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": torch.ones(4, 8).int()}, TypeError, "`student` must be float16"),
    (
        {"student": torch.randn(4, 7)},
        ValueError,
        r"`student` must have shape \(..., 8\), got \(4, 7\)",
    ),
    (
        {"student_weight": torch.randn(5)},
        ValueError,
        r"`student_weight` must have shape \(vocab, h",
    ),
    (
        {"teacher": torch.randn(3, 6)},
        ValueError,
        r"`teacher` must have shape \(4, 6\), got \(3, 6\)",
    ),
    (
        {"teacher_weight": torch.randn(7, 6)},
        ValueError,
        "must have the 5 rows of `student_weight`, got 7",
    ),
    (
        {"student_bias": torch.randn(4)},
        ValueError,
        r"`student_bias` must have shape \(5,\), got \(4,\)",
    ),
    (
        {"teacher_bias": torch.randn(4)},
        ValueError,
        r"`teacher_bias` must have shape \(5,\), got \(4,\)",
    ),
    (
        {"teacher": torch.randn(4, 6).double()},
        TypeError,
        "`teacher_weight` must have the dtype of `t",
    ),
    (
        {"teacher": torch.empty(4, 6, device="meta")},
        ValueError,
        "`teacher` must be on cpu, got meta",
    ),
    ({"mask": torch.ones(3).bool()}, ValueError, r"`mask` must have shape \(4,\), got \(3,\)"),
    ({"mask": torch.ones(4)}, TypeError, "`mask` must be bool, got torch.float32"),
    ({"temperature": 0.0}, ValueError, "`temperature` must be positive and finite, got 0.0"),
    ({"temperature": torch.ones(4)}, TypeError, "`temperature` must be a number"),
    ({"beta": 1.5}, ValueError, r"`beta` must lie in \[0, 1\], got 1.5"),
    ({"beta": "0"}, TypeError, "`beta` must be a number, got '0'"),
    ({"reduction": "batchmean"}, ValueError, "`reduction` must be one of"),
    (
        {"student_softcap": 0.0},
        ValueError,
        "`student_softcap` must be positive and finite, got 0.0",
    ),
    ({"teacher_softcap": -1}, ValueError, "`teacher_softcap` must be positive and finite, got -1"),
    (
        {"student_logit_scale": math.inf},
        ValueError,
        "`student_logit_scale` must be finite, got inf",
    ),
    ({"teacher_logit_scale": None}, TypeError, "`teacher_logit_scale` must be a number, got None"),
    ({"num_items": -1}, ValueError, "`num_items` must be at least 0, got -1"),
    ({"memory_budget_mib": 0}, ValueError, "`memory_budget_mib` must be positive or None, got 0"),
    ({"impl": "cuda"}, ValueError, "`impl` must be one of .* got 'cuda'"),
    ({"impl": "triton"}, NotImplementedError, "`impl` must be 'auto', 'torch' or 'reference'"),
    ({"process_group": "world"}, TypeError, "`process_group` must be a torch.distributed.Pr"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    REFUSED,
    # Random values would give the test another name in every process.
    ids=[f"{number} {' '.join(change)}" for number, (change, _, _) in enumerate(REFUSED)],
)
def test_wrong_arguments_are_refused_by_name(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        linear_kl_div(**{**HEADS, **change})
