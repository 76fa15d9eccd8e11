"""Run by test_vocab_parallel.py, one process a rank: a head cut along the vocabulary against torch.

Every rank makes the whole problem and gives the loss its own rows; `CASES` names what is held.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from head_cases import fixed_schedule
from oracle import assert_close_as_torch
from places import generator
from plain_head import (
    NAMES,
    Loss,
    Problem,
    by_ours,
    by_plain,
    loss_of_logits,
    plain_logits,
    results,
    shaped_logits,
    widened,
)
from ranks import refused, run_cases
from torch import Tensor

from hf_fused_head import LinearCrossEntropyLoss, linear_cross_entropy_with_stats
from hf_fused_head import linear_cross_entropy as fused_loss

IMPLS = ("reference", "torch", *(["triton"] if find_spec("triton") else []))
# Rows and columns that kernels cut in: tiles of a GPU are larger than those of the interpreter.
UNIT = 256 if torch.cuda.is_available() else 32
SCHEDULES = {
    "chunks": fixed_schedule("gradient_in_forward", chunk_tokens=UNIT),
    "windows": fixed_schedule("recompute", vocab_window=UNIT),
    "hybrid": fixed_schedule("hybrid", vocab_window=UNIT, kept_share=0.5),
}
EVERYTHING = {
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "logit_scale": 1.3,
    "softcap": 4.0,
}
WEIGHTED = Problem(class_weight=True).with_options(label_smoothing=0.2)
FAR = Problem(hidden_size=8, ignored=3).with_options(logit_scale=60.0)
PROBLEMS = {
    "plain": Problem(),
    "sum": Problem().with_options(reduction="sum", ignore_index=3),
    "everything": Problem().with_options(**EVERYTHING),
    "class_weight": WEIGHTED,
    "class_weight_softcap": WEIGHTED.with_options(softcap=3.0, z_loss=0.02),
    "per_token": Problem().with_options(reduction="none"),
    "per_token_everything": Problem(class_weight=True).with_options(**EVERYTHING, reduction="none"),
    "num_items": Problem().with_options(num_items=50),
    "confident": Problem(confident=True),
    "confident_per_token": Problem(confident=True).with_options(reduction="none"),
    "far": FAR,
    "far_per_token": FAR.with_options(reduction="none"),
    "far_smoothed": FAR.with_options(label_smoothing=0.1, z_loss=1e-3),
    "low": Problem(shift=-300.0),
    "ignored": Problem(ignored=21).with_options(num_items=7),
    "one_token": Problem(shape=(1,), ignored=0),
}
# With the smallest budget, so many tokens and columns take several chunks and windows.
LARGE = Problem(shape=(200,), vocab_size=1300, ignored=9)
CUTS = {
    "plain": LARGE,
    "everything": LARGE.with_options(**EVERYTHING),
    "per_token": LARGE.with_options(reduction="none", softcap=3.0, label_smoothing=0.1),
}

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    """Names a case after its function."""
    CASES[function.__name__] = function
    return function


def sizes_of(vocab_size: int) -> list[int]:
    """Uneven shards, a single row on the last rank."""
    ranks = dist.get_world_size()
    share = (vocab_size - 1) // (ranks - 1)
    sizes = [share] * (ranks - 2)
    return [*sizes, vocab_size - 1 - sum(sizes), 1]


def halves_of(vocab_size: int) -> list[int]:
    """Shards as `torch.chunk` makes them."""
    ranks = dist.get_world_size()
    step = -(-vocab_size // ranks)
    return [min(step, vocab_size - step * rank) for rank in range(ranks)]


def rows_of(sizes: list[int]) -> slice:
    """This rank's rows."""
    first = sum(sizes[: dist.get_rank()])
    return slice(first, first + sizes[dist.get_rank()])


def by_shard(problem: Problem, sizes: list[int], impl: str, **extra: Any) -> Loss:
    """The problem's loss from this rank's rows."""
    rows = rows_of(sizes)

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        bias = tensors.get("bias")
        return fused_loss(
            tensors["hidden"],
            tensors["weight"][rows],
            tensors["target"],
            linear_bias=None if bias is None else bias[rows],
            weight=tensors.get("class_weight"),
            impl=impl,
            process_group=dist.group.WORLD,
            **problem.options,
            **extra,
        )

    return loss


def by_parts(problem: Problem, sizes: list[int]) -> Loss:
    """The problem's loss by plain operations on each rank's rows, as one process would cut them."""
    options = dict(problem.options)
    shape = options.pop("logit_scale", 1.0), options.pop("softcap", None)

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        weights = tensors["weight"].split(sizes)
        biases = tensors["bias"].split(sizes)
        parts = [F.linear(tensors["hidden"], w, b) for w, b in zip(weights, biases, strict=True)]
        logits = shaped_logits(torch.cat(parts, dim=-1), *shape)
        return loss_of_logits(logits, tensors["target"], tensors.get("class_weight"), **options)

    return loss


def whole(name: str, gradient: Tensor) -> Tensor:
    """The gradient of all rows, from those of each rank's; the hidden states' is whole already."""
    if name in ("weight", "bias"):
        dist.all_reduce(gradient)
    return gradient


def exact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiples of 1/16 near these numbers: logits are exact in whatever pieces they are made."""
    return {n: (t * 16).round() / 16 if n in NAMES else t for n, t in tensors.items()}


def check(
    problem: Problem,
    sizes: list[int],
    impl: str,
    dtype: torch.dtype = torch.float32,
    **extra: Any,
) -> None:
    """Loss and every gradient are as near to float64 as torch's own in one process."""
    tensors = exact(problem.tensors(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = torch.tensor(0.75)
    if problem.options.get("reduction") == "none":
        upstream = torch.randn(problem.shape, generator=generator(3))
    ours = results(by_shard(problem, sizes, impl, **extra), tensors, upstream.to(wide))
    plain = results(by_parts(problem, sizes), tensors, upstream.to(wide))
    truth = results(by_plain(problem), widened(tensors), upstream.double())
    for name, value in ours.items():
        value = whole(name, value)
        if value.dtype != (wide if name == "loss" else dtype):
            raise AssertionError(f"{name}: dtype {value.dtype}")
        assert_close_as_torch(name, value, plain[name], truth[name])


def each_problem(impl: str, name: str) -> None:
    problem = PROBLEMS[name]
    if (impl, name) == ("triton", "far_per_token"):
        # Logits around 500 cost its windows digits, on one rank and on several the same.
        as_one_process(problem, sizes_of(problem.vocab_size), impl)
        return
    # The interpreter takes its time.
    shards = [sizes_of] if impl == "triton" else [sizes_of, halves_of]
    for sizes in shards:
        check(problem, sizes(problem.vocab_size), impl)


def as_one_process(problem: Problem, sizes: list[int], impl: str) -> None:
    """Loss and every gradient are the engine's own in one process."""
    tensors = exact(problem.tensors(torch.float32))
    upstream = torch.randn(problem.shape, generator=generator(3))
    ours = results(by_shard(problem, sizes, impl), tensors, upstream)
    for name, alone in results(by_ours(problem, impl), tensors, upstream).items():
        torch.testing.assert_close(whole(name, ours[name]), alone, msg=name)


def each_schedule(name: str) -> None:
    """The Triton engine with chunks, windows, and a kept share, which ranks round differently."""
    from hf_fused_head import fused
    from hf_fused_head.kernels import passes

    rows, columns = UNIT + 8, 5 * UNIT - 10
    problem = Problem(shape=(rows,), vocab_size=columns, class_weight=True).with_options(
        label_smoothing=0.1, z_loss=0.01, logit_scale=1.3
    )
    with (
        mock.patch.object(fused, "plan", SCHEDULES[name]),
        mock.patch.object(passes, "MULTIPLE", UNIT),
    ):
        others = [UNIT - 2] * (dist.get_world_size() - 1)
        check(problem, [columns - sum(others), *others], "triton")


def each_cut(impl: str, name: str) -> None:
    problem = CUTS[name]
    for sizes in (sizes_of(1300), halves_of(1300), halves_of(1300)[::-1]):
        check(problem, sizes, impl, memory_budget_mib=0.01)


for _impl in IMPLS:
    for _name in PROBLEMS:
        CASES[f"{_impl}-{_name}"] = lambda impl=_impl, name=_name: each_problem(impl, name)
for _name in SCHEDULES if "triton" in IMPLS else ():
    CASES[f"triton-schedule-{_name}"] = lambda name=_name: each_schedule(name)
for _name in CUTS:
    CASES[f"torch-cut-{_name}"] = lambda name=_name: each_cut("torch", name)


def float64(impl: str) -> None:
    """Where torch is the truth itself, up to rounding."""
    tensors = Problem().tensors(torch.float64)
    ours = results(by_shard(Problem(), sizes_of(37), impl), tensors, None)
    for name, expected in results(by_plain(Problem()), tensors, None).items():
        torch.testing.assert_close(whole(name, ours[name]), expected)


def each_dtype(impl: str) -> None:
    """Inputs of 16 bits."""
    for dtype in (torch.bfloat16, torch.float16):
        check(Problem(), halves_of(37), impl, dtype)
        check(Problem().with_options(reduction="none"), sizes_of(37), impl, dtype)


def boundary_labels(impl: str) -> None:
    """First and last row of every shard, and labels that are all on one rank."""
    sizes = [5, *halves_of(32)][: dist.get_world_size()]
    sizes[-1] += 37 - sum(sizes)
    ends = [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]
    labels = sorted({label for end in ends for label in (end - 1, end)} & set(range(37)))
    problem = Problem(shape=(len(labels),), ignored=0)
    tensors = problem.tensors(torch.float32)
    for target in (labels, [0] * len(labels), [36] * len(labels)):
        tensors["target"] = torch.tensor(target)
        compare(problem, tensors, sizes, impl)


def compare(problem: Problem, tensors: dict[str, Tensor], sizes: list[int], impl: str) -> None:
    """As `check`, of tensors that are given."""
    ours = results(by_shard(problem, sizes, impl), tensors, None)
    plain = results(by_parts(problem, sizes), tensors, None)
    truth = results(by_plain(problem), widened(tensors), None)
    for name, value in ours.items():
        assert_close_as_torch(name, whole(name, value), plain[name], truth[name])


def statistics(impl: str) -> None:
    """nll, lse, entropy, correct and num_valid are those of the whole head, ignored rows 0."""
    # Far from the labels the reference rounds entropies as float32 log-probabilities are rounded.
    far = [] if impl == "reference" else [FAR]
    for problem in (Problem(), Problem().with_options(softcap=3.0, logit_scale=4.0), *far):
        tensors = problem.tensors(torch.float32)
        for sizes in (sizes_of(37), halves_of(37)):
            rows = rows_of(sizes)
            got = linear_cross_entropy_with_stats(
                tensors["hidden"],
                tensors["weight"][rows],
                tensors["target"],
                linear_bias=tensors["bias"][rows],
                impl=impl,
                process_group=dist.group.WORLD,
                **problem.options,
            )
            truth, plain = stats_of(problem, widened(tensors)), stats_of(problem, tensors)
            for name in ("nll", "lse", "entropy"):
                assert_close_as_torch(name, getattr(got, name), plain[name], truth[name])
            valid = tensors["target"] != -100
            if not torch.equal(got.correct, truth["correct"]) or got.num_valid != valid.sum():
                raise AssertionError(f"correct {got.correct} num_valid {got.num_valid}")


def stats_of(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    scale, cap = problem.options.get("logit_scale", 1.0), problem.options.get("softcap")
    logits = plain_logits(tensors["hidden"], tensors["weight"], tensors["bias"], scale, cap)
    target = tensors["target"]
    valid = target != -100
    log_probs = logits.log_softmax(-1)
    nll = -log_probs.gather(-1, target.clamp_min(0)[..., None])[..., 0]
    return {
        "nll": nll * valid,
        "lse": logits.logsumexp(-1) * valid,
        "entropy": -(log_probs.exp() * log_probs).sum(-1) * valid,
        "correct": (logits.argmax(-1) == target) & valid,
    }


def ties_go_to_the_first_column(impl: str) -> None:
    weight = torch.ones(37, 8)
    rows = rows_of(halves_of(37))
    target = torch.tensor([0, 5, 20, 36])
    stats = linear_cross_entropy_with_stats(
        torch.ones(4, 8), weight[rows], target, impl=impl, process_group=dist.group.WORLD
    )
    if stats.correct.tolist() != [True, False, False, False]:
        raise AssertionError(stats.correct)


def frozen_parts(impl: str) -> None:
    """Each subset of what requires grad gets the gradients it gets with all of them."""
    problem = Problem()
    tensors = problem.tensors(torch.float32)
    for reduction in ("mean", "none"):
        loss = by_shard(problem.with_options(reduction=reduction), halves_of(37), impl)
        full = gradients(loss, tensors, NAMES)
        for count in range(7):
            wanted = tuple(name for bit, name in enumerate(NAMES) if count >> bit & 1)
            for name, gradient in gradients(loss, tensors, wanted).items():
                torch.testing.assert_close(gradient, full[name])


def gradients(loss: Loss, tensors: dict[str, Tensor], wanted: tuple[str, ...]) -> dict[str, Tensor]:
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in tensors.items() if n in NAMES}
    value = loss({**tensors, **leaves}).sum()
    if value.requires_grad:
        value.backward()
    return {name: leaves[name].grad for name in wanted}


def second_backward(impl: str) -> None:
    for reduction in ("mean", "none"):
        tensors = Problem().tensors(torch.float32)
        leaves = {name: tensors[name].requires_grad_() for name in NAMES}
        problem = Problem().with_options(reduction=reduction)
        loss = by_shard(problem, halves_of(37), impl)(tensors).sum() * 3
        first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        again = torch.autograd.grad(loss, list(leaves.values()))
        for left, right in zip(first, again, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)


def mean_of_nothing(impl: str) -> None:
    tensors = Problem(ignored=21).tensors(torch.float32)
    leaves = {name: tensors[name].requires_grad_() for name in NAMES}
    loss = by_shard(Problem(), halves_of(37), impl)(tensors)
    if not loss.isnan():
        raise AssertionError(f"loss {loss}")
    torch.autograd.grad(loss, list(leaves.values()))


def autocast(impl: str) -> None:
    """Under autocast the operands are rounded as `F.linear` would round them."""
    tensors = Problem().tensors(torch.float32)
    rounded = {n: t.bfloat16().float() if n in NAMES else t for n, t in tensors.items()}
    with torch.autocast(tensors["hidden"].device.type, torch.bfloat16):
        loss = by_shard(Problem(), halves_of(37), impl)(tensors)
    torch.testing.assert_close(loss, by_plain(Problem())(rounded))


# What the Triton engine does not do: float64; it counts a tie with the label as correct.
for _impl in ("reference", "torch"):
    for _check in (float64, ties_go_to_the_first_column):
        CASES[f"{_impl}-{_check.__name__}"] = lambda impl=_impl, run=_check: run(impl)
for _impl in IMPLS:
    for _check in (
        each_dtype,
        boundary_labels,
        statistics,
        frozen_parts,
        second_backward,
        mean_of_nothing,
        autocast,
    ):
        CASES[f"{_impl}-{_check.__name__}"] = lambda impl=_impl, run=_check: run(impl)


@case
def a_label_out_of_range_is_an_error_on_every_rank() -> None:
    tensors = Problem().tensors(torch.float32)
    tensors["target"][1, 4] = 37
    for impl in IMPLS:
        with refused(ValueError, "[0, 37) or ignore_index=-100, got 37 at position (1, 4)"):
            by_shard(Problem(), halves_of(37), impl)(tensors)


@case
def a_rank_without_rows_is_an_error_on_every_rank() -> None:
    tensors = Problem().tensors(torch.float32)
    sizes = [37, *[0] * (dist.get_world_size() - 1)]
    with refused(ValueError, "at least one row on every rank of `process_group`, got none on rank"):
        by_shard(Problem(), sizes, "torch")(tensors)


@case
def ranks_that_differ_are_an_error_on_every_rank() -> None:
    rank, loss = dist.get_rank(), by_shard(Problem(), halves_of(37), "torch")
    tensors = Problem().tensors(torch.float32)
    tensors["target"][0, 0] = rank
    with refused(RuntimeError, "`target` must be the same on every rank"):
        loss(tensors)
    tensors = Problem(shape=(3, 7 + rank)).tensors(torch.float32)
    with refused(RuntimeError, "`input` must be the same on every rank"):
        loss(tensors)
    tensors = Problem().tensors(torch.float32)
    tensors["hidden"].requires_grad_(rank == 0)
    tensors["weight"].requires_grad_()
    with refused(RuntimeError, "tensors that require grad"):
        loss(tensors)
    scaled = by_shard(Problem().with_options(logit_scale=1.0 + rank), halves_of(37), "torch")
    with refused(RuntimeError, "options of the loss must be the same on every rank"):
        scaled(Problem().tensors(torch.float32))


@case
def class_weights_of_the_shard_alone_are_refused() -> None:
    tensors = Problem(class_weight=True).tensors(torch.float32)
    tensors["class_weight"] = tensors["class_weight"][:5]
    with refused(ValueError, "`weight` must have shape (37,), got (5,)"):
        by_shard(Problem(), halves_of(37), "torch")(tensors)


@case
def a_group_is_a_process_group() -> None:
    with refused(TypeError, "`process_group` must be a torch.distributed.ProcessGroup or None"):
        fused_loss(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long(), process_group="tp")


@case
def a_group_of_one_rank_is_no_sharding() -> None:
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    tensors = Problem().tensors(torch.float32)
    arguments = tensors["hidden"], tensors["weight"], tensors["target"]
    ours = fused_loss(*arguments, process_group=alone)
    torch.testing.assert_close(ours, fused_loss(*arguments), rtol=0, atol=0)


@case
def the_module_takes_the_group() -> None:
    tensors = Problem(bias=False).tensors(torch.float32)
    module = LinearCrossEntropyLoss(process_group=dist.group.WORLD, softcap=5.0)
    rows = rows_of(halves_of(37))
    ours = module(tensors["hidden"], tensors["weight"][rows], tensors["target"])
    whole_loss = LinearCrossEntropyLoss(softcap=5.0)
    expected = whole_loss(tensors["hidden"], tensors["weight"], tensors["target"])
    torch.testing.assert_close(ours, expected)


@case
def it_compiles_without_a_break() -> None:
    problem = Problem().with_options(z_loss=0.1)
    loss = by_shard(problem, sizes_of(37), "torch")
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    tensors = problem.tensors(torch.float32)
    ours, eager = results(compiled, tensors, None), results(loss, tensors, None)
    for name, value in ours.items():
        torch.testing.assert_close(value, eager[name])


@case
def the_forward_sends_at_most_8_bytes_a_token() -> None:
    for impl in sorted({"torch", *IMPLS} - {"reference"}):
        bytes_sent(impl)


def bytes_sent(impl: str) -> None:
    problem = Problem(shape=(200,), ignored=0)
    tensors = problem.tensors(torch.float32)
    loss = by_shard(problem, halves_of(37), impl)
    with sent() as forward:
        loss(tensors)
    leaves = {name: tensors[name].requires_grad_() for name in NAMES}
    with sent() as both:
        torch.autograd.grad(loss(tensors), list(leaves.values()))
    agreement = forward[0]
    if sum(forward[1:]) > 8 * 200 or agreement > 80:
        raise AssertionError(f"forward sent {forward}")
    if sum(both) != sum(forward) + 200 * problem.hidden_size * 4:
        raise AssertionError(f"forward and backward sent {both}")


@contextmanager
def sent() -> Iterator[list[int]]:
    """The bytes that this rank gives to every collective."""
    sizes: list[int] = []
    reduce, gather = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **kwargs)

    def all_gather(parts: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return gather(parts, tensor, *args, **kwargs)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        yield sizes
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_cases(CASES, int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
