"""`sparse_kl_div` against float64: renormalised or with a tail, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import assert_close_as_torch, farthest
from plain_divergence import plain_divergence, plain_reduction
from torch import Tensor

from hf_fused_head import linear_kl_div, sparse_kl_div

BETAS = (0.0, 0.3, 0.5, 1.0)
SHAPE = (3, 7)


def log_probs(num_classes: int = 5, vocab_size: int = 11) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's at the teacher's top classes, float32."""
    student, teacher = (torch.randn(*SHAPE, vocab_size).log_softmax(dim=-1) for _ in range(2))
    top = teacher.topk(num_classes).indices
    return student.gather(-1, top), teacher.gather(-1, top)


def plain(student: Tensor, teacher: Tensor, beta: float, tail: bool, by_sum: bool) -> Tensor:
    """With the mass outside from a sum of probabilities, or from their logarithm."""

    def whole(values: Tensor) -> Tensor:
        inside = values.logsumexp(dim=-1, keepdim=True)
        if not tail:
            return values - inside
        sum_inside = values.exp().sum(dim=-1, keepdim=True)
        outside = torch.log1p(-sum_inside) if by_sum else torch.log(-torch.expm1(inside))
        return torch.cat((values, outside), dim=-1)

    return plain_divergence(whole(student), whole(teacher), beta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient(beta: float, tail: bool, reduction: str, masked: bool) -> None:
    student, teacher = log_probs()
    mask = torch.rand(SHAPE) < 0.7 if masked else None
    upstream = torch.randn(SHAPE) if reduction == "none" else torch.tensor(0.75)
    found = {}
    for name in ("ours", "by_sum", "by_log", "truth"):
        dtype = torch.float64 if name == "truth" else torch.float32
        leaf, constant = student.to(dtype).requires_grad_(), teacher.to(dtype)
        if name == "ours":
            loss = sparse_kl_div(
                leaf, constant, beta=beta, tail=tail, mask=mask, reduction=reduction
            )
        else:
            options = {"reduction": reduction}
            per_token = plain(leaf, constant, beta, tail, name == "by_sum")
            loss = plain_reduction(per_token, mask, options)
        found[name] = loss, torch.autograd.grad(loss, leaf, upstream.to(dtype))[0]
    for name, ours, *others, truth in zip(("loss", "gradient"), *found.values(), strict=True):
        assert_close_as_torch(name, ours, farthest(others, truth), truth)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", [False, True])
def test_all_classes_are_the_divergence_of_the_heads(beta: float, tail: bool) -> None:
    student, teacher = torch.randn(4, 8).double(), torch.randn(4, 6).double()
    weights = torch.randn(9, 8).double(), torch.randn(9, 6).double()
    whole = linear_kl_div(student, weights[0], teacher, weights[1], beta=beta)
    log_p = (student @ weights[0].T).log_softmax(dim=-1)
    log_q = (teacher @ weights[1].T).log_softmax(dim=-1)
    if tail:
        # A pair of classes merged into the tail loses what these two differ in.
        assert sparse_kl_div(log_p[:, 2:], log_q[:, 2:], beta=beta, tail=True) < whole
    else:
        torch.testing.assert_close(sparse_kl_div(log_p, log_q, beta=beta), whole)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", [False, True])
def test_nearly_equal_predictions_keep_their_digits(beta: float, tail: bool) -> None:
    student, _ = log_probs()
    # Multiples of a power of two: their difference is exact.
    student = (student * 1024).round() / 1024 - 0.25
    teacher = student - torch.randint(0, 2, student.shape) / 1024
    ours = sparse_kl_div(student, teacher, beta=beta, tail=tail)
    truth = sparse_kl_div(student.double(), teacher.double(), beta=beta, tail=tail)
    digits_of_difference = 1024 * torch.finfo(torch.float32).eps
    assert truth > 0
    assert (ours - truth).abs() < digits_of_difference * truth


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(beta: float, tail: bool, reduction: str) -> None:
    student, teacher = (values.double() for values in log_probs())

    def loss(leaf: Tensor) -> Tensor:
        return sparse_kl_div(leaf, teacher, beta=beta, tail=tail, reduction=reduction)

    assert torch.autograd.gradcheck(loss, [student.requires_grad_()])


def test_masked_tokens_may_hold_no_numbers() -> None:
    student, teacher = log_probs()
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[1] = False
    student[1], teacher[1] = math.nan, math.nan
    loss = sparse_kl_div(student.requires_grad_(), teacher, mask=mask)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and grad.isfinite().all() and not grad[1].any()


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_places_that_pad_the_teachers_list(beta: float, tail: bool) -> None:
    student, teacher = log_probs()
    shorter = sparse_kl_div(student[..., :3], teacher[..., :3], beta=beta, tail=tail)
    student[..., 3:], teacher[..., 3:] = -math.inf, -math.inf
    torch.testing.assert_close(sparse_kl_div(student, teacher, beta=beta, tail=tail), shorter)


def test_all_mass_inside_leaves_a_tail_of_rounding() -> None:
    student, teacher = log_probs(11)
    loss = sparse_kl_div(student.requires_grad_(), teacher, tail=True)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    student, teacher = (values.to(dtype) for values in log_probs())
    loss = sparse_kl_div(student.requires_grad_(), teacher.requires_grad_())
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    assert student.grad is not None and student.grad.dtype == dtype
    assert teacher.grad is None


def test_num_items_and_no_token() -> None:
    student, teacher = log_probs()
    nothing = torch.zeros(SHAPE, dtype=torch.bool)
    assert sparse_kl_div(student, teacher, mask=nothing).isnan()
    assert sparse_kl_div(student, teacher, mask=nothing, num_items=3) == 0
    total = sparse_kl_div(student, teacher, reduction="sum")
    for num_items in (3, torch.tensor([3])):
        assert torch.equal(sparse_kl_div(student, teacher, num_items=num_items), total / 3)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_compiler_takes_it(backend: str) -> None:
    student, teacher = log_probs()
    mask = torch.rand(SHAPE) < 0.7

    def loss(leaf: Tensor) -> Tensor:
        return sparse_kl_div(leaf, teacher, beta=0.3, tail=True, mask=mask)

    leaf = student.requires_grad_()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)(leaf)
    torch.testing.assert_close(compiled, loss(leaf))
    grads = [torch.autograd.grad(value, leaf) for value in (compiled, loss(leaf))]
    torch.testing.assert_close(*grads)


def test_a_second_derivative_is_refused() -> None:
    student, teacher = log_probs()
    loss = sparse_kl_div(student.requires_grad_(), teacher)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"must be differentiated once.*F\.kl_div"):
        grad.square().sum().backward()


def test_transforms_are_refused() -> None:
    student, teacher = log_probs()
    with pytest.raises(NotImplementedError, match="`sparse_kl_div` must be called outside of"):
        torch.func.grad(lambda x: sparse_kl_div(x, teacher))(student)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"log_probs": torch.ones(4, 5).int()}, TypeError, "`log_probs` must be float16"),
    ({"log_probs": torch.zeros(4, 0)}, ValueError, "`log_probs` must have shape .* at least one c"),
    ({"teacher_log_probs": torch.zeros(4, 3)}, ValueError, r"must have shape \(4, 5\), got \(4, 3"),
    ({"teacher_log_probs": torch.zeros(4, 5, device="meta")}, ValueError, "must be on cpu, got me"),
    ({"mask": torch.ones(3).bool()}, ValueError, r"`mask` must have shape \(4,\), got \(3,\)"),
    ({"mask": torch.ones(4)}, TypeError, "`mask` must be bool, got torch.float32"),
    ({"tail": 1}, TypeError, "`tail` must be a bool, got 1"),
    ({"beta": -0.1}, ValueError, r"`beta` must lie in \[0, 1\], got -0.1"),
    ({"reduction": "batchmean"}, ValueError, "`reduction` must be one of"),
    ({"num_items": -1}, ValueError, "`num_items` must be at least 0, got -1"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_wrong_arguments_are_refused_by_name(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    values = {"log_probs": torch.zeros(4, 5), "teacher_log_probs": torch.zeros(4, 5), **change}
    with pytest.raises(error, match=message):
        sparse_kl_div(**values)
