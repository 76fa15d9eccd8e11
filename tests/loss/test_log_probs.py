"""`token_log_probs` against float64: every field, option, dtype and engine, and who calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_close_as_torch
from places import generator
from plain_head import Problem, exact, widened
from plain_token_log_probs import FIELDS, check, ours, plain, upstreams, with_gradients
from torch import Tensor

from hf_fused_head import token_log_probs

TRITON = ("triton:epilogue", "triton:tile")
BIT_EQUAL = ("torch", *TRITON)
IMPLS = ("reference", *BIT_EQUAL)
HALVES = (torch.bfloat16, torch.float16)
SHAPED = {"temperature": 1.7, "logit_scale": 0.7, "softcap": 3.0}
SMALLEST_MIB = 0.001


def per_token(problem: Problem, **options: Any) -> Problem:
    """The problem with a temperature for each token."""
    source = generator(3)
    return problem.with_options(temperature=torch.rand(problem.shape, generator=source) + 0.5)


PROBLEMS = {
    "plain": Problem(),
    "no_bias": Problem(bias=False, ignored=0),
    "shaped": Problem(options=SHAPED),
    "own_temperatures": per_token(Problem()),
    "own_temperatures_capped": per_token(Problem(options={"softcap": 3.0, "logit_scale": 1.5})),
    "confident": Problem(confident=True),
    "confident_cold": Problem(confident=True, options={"temperature": 0.1}),
    "surprised": Problem(surprised=True, options={"temperature": 0.3}),
    "own_index": Problem(options={"ignore_index": 5}),
    "large": Problem((45,), 24, 170, ignored=9, options={"temperature": 0.8}),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
def test_fields_and_gradients(impl: str, name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and impl in TRITON:
        pytest.skip("the Triton kernels take no float64")
    check(PROBLEMS[name], impl, dtype)


@pytest.mark.parametrize("impl", BIT_EQUAL)
@pytest.mark.parametrize("mib", [SMALLEST_MIB, 1.0])
def test_pieces(impl: str, mib: float) -> None:
    check(PROBLEMS["large"], impl, torch.float32, mib)


@pytest.mark.parametrize("name", [*SHAPED])
def test_every_option_moves_the_result(name: str) -> None:
    """A comparison in which an option changes nothing would not notice that it is forgotten."""
    tensors = PROBLEMS["shaped"].tensors(torch.float32)
    without = {key: value for key, value in SHAPED.items() if key != name}
    here, there = ours(tensors, SHAPED, "torch"), ours(tensors, without, "torch")
    assert not torch.allclose(here.log_probs, there.log_probs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("field", FIELDS)
def test_fields_alone(impl: str, field: str) -> None:
    tensors = PROBLEMS["plain"].tensors(torch.float32)
    every = ours(tensors, {}, impl)
    alone = ours(tensors, {}, impl, outputs=(field,))
    assert [name for name in FIELDS if getattr(alone, name) is not None] == [field]
    assert torch.equal(getattr(alone, field), getattr(every, field))


def test_defaults() -> None:
    tensors = PROBLEMS["plain"].tensors(torch.float32)
    found = token_log_probs(tensors["hidden"], tensors["weight"], tensors["target"])
    assert found.log_probs is not None
    assert found.entropy is not None
    assert (found.is_top1, found.mean_logits, found.log_sum_sq_probs) == (None, None, None)


@pytest.mark.parametrize("impl", BIT_EQUAL)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_row_has_the_same_bits_in_every_batch(
    impl: str, dtype: torch.dtype, softcap: float | None
) -> None:
    # More than one tile for plain torch; the interpreter takes its time.
    length, vocab_size = (531, 307) if impl == "torch" else (45, 70)
    options = {"softcap": softcap}
    check_bits(impl, dtype, Problem((length,), 40, vocab_size, ignored=0, options=options))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", BIT_EQUAL)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_on_a_gpu(impl: str, dtype: torch.dtype) -> None:
    """In more than one tile of the library, with rows that are padded to one."""
    with torch.device("cuda"):
        problem = Problem((1300,), 64, 5003, ignored=9, options={"temperature": 0.8})
        check(problem, impl, dtype)
        check(per_token(problem), impl, dtype)
        check_bits(impl, dtype, Problem((1300,), 64, 5003, ignored=0))
        check_bits(impl, dtype, Problem((1300,), 1024, 5003, ignored=0))


def check_bits(impl: str, dtype: torch.dtype, problem: Problem) -> None:
    """With and without gradients, alone, in parts, and among tokens that do not count."""
    tensors = problem.tensors(dtype)
    whole = ours(tensors, problem.options, impl)
    leaf = {**tensors, "hidden": tensors["hidden"].clone().requires_grad_()}
    assert_same(ours(leaf, problem.options, impl), whole)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 36), slice(20, None), slice(-1, None)):
        part = {**tensors, "hidden": tensors["hidden"][rows], "target": tensors["target"][rows]}
        found = ours(part, problem.options, impl)
        assert_same(found, [field[rows] for field in whole])
    sparse = tensors["target"].clone()
    sparse[::3] = -100
    found = ours({**tensors, "target": sparse}, problem.options, impl)
    assert_same([t[sparse != -100] for t in found], [t[sparse != -100] for t in whole])


def assert_same(found: Any, expected: Any) -> None:
    for name, left, right in zip(FIELDS, found, expected, strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("impl", BIT_EQUAL)
def test_confident_tokens_keep_their_digits(impl: str) -> None:
    """A log-probability of -1e-7 and its gradient, relative to themselves."""
    weight = torch.zeros(5, 4)
    weight[0, 0] = 1.0
    hidden = torch.zeros(3, 4)
    hidden[:, 0] = torch.tensor([17.0, 20.0, 30.0])
    tensors = {"hidden": hidden, "weight": weight, "target": torch.zeros(3, dtype=torch.long)}
    upstream = {"log_probs": torch.ones(3), "entropy": torch.zeros(3)}
    found = with_gradients(lambda leaves: ours(leaves, {}, impl), tensors, upstream)
    expected = -torch.log1p(4 * (-hidden[:, 0].double()).exp())
    one = torch.ones(3, dtype=torch.float64)
    rounded = one + torch.finfo(torch.float32).eps
    assert_close_as_torch("log_probs", found["log_probs"] / expected, rounded, one)
    gradient = -torch.expm1(expected)
    assert_close_as_torch("hidden", found["hidden"][:, 0] / gradient, rounded, one)


@pytest.mark.parametrize("impl", IMPLS)
def test_of_equal_logits_the_first_is_the_largest(impl: str) -> None:
    """In one tile, in two, before and behind the target."""
    vocab_size, hidden = 331, torch.ones(1, 8)
    weight = torch.zeros(vocab_size, 8)
    for first, second in ((3, 9), (3, 300), (200, 201), (0, 330)):
        weight.zero_()
        weight[[first, second]] = 0.5
        for target, expected in ((first, True), (second, False), (1, False)):
            tensors = {"hidden": hidden, "weight": weight, "target": torch.tensor([target])}
            found = ours(tensors, {}, impl, outputs=("is_top1",)).is_top1
            assert found.item() is expected, (first, second, target)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_counts(impl: str) -> None:
    tensors = PROBLEMS["plain"].tensors(torch.float32)
    tensors = {**tensors, "target": torch.full_like(tensors["target"], -100)}
    upstream = upstreams(tensors, torch.float32)
    found = with_gradients(lambda leaves: ours(leaves, {}, impl), tensors, upstream)
    for name, value in found.items():
        assert not value.any(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_no_token(impl: str) -> None:
    tensors = Problem((0,), ignored=0).tensors(torch.float32)
    assert all(field.shape == (0,) for field in ours(tensors, {}, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_columns(impl: str) -> None:
    """A bias of minus infinity takes a class out; the mean of the logits says so."""
    tensors = exact(Problem(ignored=0).tensors(torch.float32))
    tensors["target"] = tensors["target"].clamp_max(35)
    tensors["bias"][-1] = -torch.inf
    found = ours(tensors, {}, impl)
    truth, stock = plain(widened(tensors), {}), plain(tensors, {})
    for name in ("log_probs", "entropy", "log_sum_sq_probs"):
        assert_close_as_torch(name, getattr(found, name), stock[name], truth[name])
    assert torch.equal(found.mean_logits, torch.full_like(found.mean_logits, -torch.inf))


def candidates_of(problem: Problem, count: int) -> Tensor:
    """Classes of every token: repeated ones, ignored ones, and a token with none that counts."""
    source = generator(7)
    candidates = torch.randint(0, problem.vocab_size, (*problem.shape, count), generator=source)
    ignored = problem.options.get("ignore_index", -100)
    flat = candidates.view(-1, count)
    flat[0] = problem.tensors(torch.float32)["target"].flatten()[0].clamp_min(0)
    flat[1, 0], flat[2, -1] = ignored, ignored
    flat[3] = ignored
    return candidates


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["plain", "no_bias", "own_temperatures_capped", "confident"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
def test_candidates(impl: str, name: str, count: int, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and impl in TRITON:
        pytest.skip("the Triton kernels take no float64")
    problem = PROBLEMS[name]
    check(problem, impl, dtype, target=candidates_of(problem, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates_in_pieces(dtype: torch.dtype) -> None:
    problem = PROBLEMS["large"]
    check(problem, "torch", dtype, SMALLEST_MIB, target=candidates_of(problem, 5))


@pytest.mark.parametrize("impl", BIT_EQUAL)
def test_candidates_have_the_same_bits_in_every_batch(impl: str) -> None:
    problem = Problem((45,), 40, 70, ignored=0)
    tensors = {**problem.tensors(torch.float32), "target": candidates_of(problem, 3)}
    whole = ours(tensors, {}, impl)
    leaf = {**tensors, "hidden": tensors["hidden"].clone().requires_grad_()}
    assert_same(ours(leaf, {}, impl), whole)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 36)):
        part = {name: tensors[name][rows] for name in ("hidden", "target")}
        assert_same(ours({**tensors, **part}, {}, impl), [field[rows] for field in whole])


def test_candidates_compiled_and_refused() -> None:
    problem = Problem()
    tensors = {**exact(problem.tensors(torch.float32)), "target": candidates_of(problem, 3)}

    def loss(hidden: Tensor) -> Tensor:
        fields = ours({**tensors, "hidden": hidden}, {}, "torch", outputs=("log_probs",))
        return fields.log_probs.square().sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = tensors["hidden"].clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf), leaf)
        grads.append(grad)
    assert_close_as_torch("hidden", grads[1], grads[0], grads[0].double())
    with pytest.raises(NotImplementedError, match="one class a token in transforms"):
        torch.func.grad(loss)(tensors["hidden"])
    leaf = tensors["hidden"].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="must be differentiated once"):
        torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    none = {**tensors, "target": tensors["target"][..., :0]}
    with pytest.raises(ValueError, match="at least one candidate"):
        ours(none, {}, "torch")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_backward_is_the_first(impl: str) -> None:
    tensors = PROBLEMS["plain"].tensors(torch.float32)
    hidden = tensors["hidden"].requires_grad_()
    loss = ours(tensors, {}, impl).log_probs.exp().sum()
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, again)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled(impl: str, dynamic: bool | None) -> None:
    """As an importance-weighted loss, by the default backend, in one graph."""

    def loss(tensors: dict[str, Tensor], scale: Tensor) -> Tensor:
        fields = ours(tensors, {"temperature": scale}, impl)
        ratio = (fields.log_probs - fields.log_probs.detach()).exp()
        return (ratio * fields.log_sum_sq_probs).sum() + 0.1 * fields.entropy.sum()

    torch.compiler.reset()  # the limit of compilations is that of all engines together
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for length in (7, 9, 12):
        tensors = exact(Problem((2, length)).tensors(torch.float32))
        scale = torch.rand(2, length) + 0.5
        results = []
        for function in (loss, compiled):
            leaf = tensors["hidden"].clone().requires_grad_()
            value = function({**tensors, "hidden": leaf}, scale)
            (grad,) = torch.autograd.grad(value, leaf)
            results.append((value.detach(), grad))
        for name, eager, found in zip(("loss", "hidden"), *results, strict=True):
            assert_close_as_torch(name, found, eager, eager.double())


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl: str) -> None:
    tensors = PROBLEMS["plain"].tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(tensors, {}, impl)
    rounded = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    assert_same(found, ours(rounded, {}, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_mode(impl: str) -> None:
    tensors = exact(Problem().tensors(torch.float32))
    direction = torch.randn(tensors["hidden"].shape, generator=torch.Generator().manual_seed(2))

    def log_probs(fields: Any, values: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        def of_hidden(hidden: Tensor) -> Tensor:
            return fields({**values, "hidden": hidden})

        return torch.func.jvp(of_hidden, (values["hidden"],), (direction.to(dtype),))[1]

    found = log_probs(lambda t: ours(t, {}, impl).log_probs, tensors, torch.float32)
    stock = log_probs(lambda t: plain(t, {})["log_probs"], tensors, torch.float32)
    truth = log_probs(lambda t: plain(t, {})["log_probs"], widened(tensors), torch.float64)
    assert_close_as_torch("tangent", found, stock, truth)


def test_a_second_derivative_is_refused() -> None:
    tensors = PROBLEMS["plain"].tensors(torch.float32)
    hidden = tensors["hidden"].requires_grad_()
    loss = ours(tensors, {}, "torch").log_probs.sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="must be differentiated once"):
        grad.sum().backward()


WRONG = {
    "temperature_zero": ({"temperature": 0.0}, ValueError, "`temperature` must be positive"),
    "temperature_text": ({"temperature": "hot"}, TypeError, "`temperature` must be a number"),
    "temperatures_shape": ({"temperature": torch.ones(4)}, ValueError, "`temperature` must have"),
    "temperatures_whole": ({"temperature": torch.ones(3, 7).int()}, TypeError, "`temperature`"),
    "temperatures_zero": ({"temperature": torch.zeros(3, 7)}, ValueError, "positive and finite"),
    "temperatures_grad": (
        {"temperature": torch.ones(3, 7, requires_grad=True)},
        NotImplementedError,
        "pass temperature.detach",
    ),
    "outputs_unknown": ({"outputs": ("logits",)}, ValueError, "`outputs` must name some of"),
    "outputs_none": ({"outputs": ()}, ValueError, "`outputs` must name some of"),
    "outputs_text": ({"outputs": "entropy"}, TypeError, "`outputs` must be a tuple of names"),
    "softcap": ({"softcap": 0.0}, ValueError, "`softcap` must be positive"),
    "scale": ({"logit_scale": float("nan")}, ValueError, "`logit_scale` must be finite"),
    "impl": ({"impl": "cuda"}, ValueError, "`impl` must be one of"),
    "budget": ({"memory_budget_mib": -1}, ValueError, "`memory_budget_mib` must be positive"),
    "index": ({"ignore_index": 0.5}, TypeError, "`ignore_index` must be an int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    tensors = PROBLEMS["plain"].tensors(torch.float32)
    options, error, text = WRONG[name]
    head = tensors["hidden"], tensors["weight"], tensors["target"]
    with pytest.raises(error, match=text):
        token_log_probs(*head, **options)


def test_a_target_that_is_no_class() -> None:
    tensors = PROBLEMS["plain"].tensors(torch.float32)
    tensors["target"][1, 2] = 99
    with pytest.raises(ValueError, match=r"got 99 at position \(1, 2\)"):
        ours(tensors, {}, "torch")
