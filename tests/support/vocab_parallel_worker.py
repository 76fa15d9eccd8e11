"""Run by test_vocab_parallel.py, one process a rank: a head cut along the vocabulary against torch.

Every rank makes the whole problem and gives the loss its own rows; `CASES` names what is held.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import vocab_parallel_contract
from head_cases import fixed_schedule, windows_of, with_library
from oracle import assert_close_as_torch
from plain_head import NAMES, Problem, by_plain, plain_logits, results, widened
from ranks import run_cases
from torch import Tensor
from vocab_parallel_checks import (
    IMPLS,
    by_shard,
    check,
    compare,
    gradients,
    halves_of,
    rows_of,
    sizes_of,
    whole,
)

from hf_fused_head import linear_cross_entropy_with_stats, ops
from hf_fused_head.functional import operand_cross_entropy
from hf_fused_head.options import LossOptions
from hf_fused_head.planning import problem as planning
from hf_fused_head.planning.schedule import Schedule

# Rows and columns that kernels cut in: tiles of a GPU are larger than those of the interpreter.
UNIT = 256 if torch.cuda.is_available() else 32
_EPILOGUE = {
    "chunks": fixed_schedule("gradient_in_forward", chunk_tokens=UNIT),
    "windows": fixed_schedule("recompute", vocab_window=UNIT),
    "hybrid": fixed_schedule("hybrid", vocab_window=UNIT, kept_share=0.5),
}
SCHEDULES = with_library(_EPILOGUE, 4 * 32 * UNIT)


def planned_as(name: str) -> Callable[[planning.Problem], Schedule]:
    """A planner that takes this schedule wherever it is allowed."""
    schedule = SCHEDULES[name]
    return lambda problem: windows_of(schedule) if problem.windows_only else schedule


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
    "surprised_per_token": Problem(surprised=True).with_options(reduction="none"),
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

CASES: dict[str, Callable[[], None]] = dict(vocab_parallel_contract.CASES)


def each_problem(impl: str, name: str) -> None:
    problem = PROBLEMS[name]
    # The interpreter takes its time.
    shards = [sizes_of] if impl.startswith("triton") else [sizes_of, halves_of]
    for sizes in shards:
        check(problem, sizes(problem.vocab_size), impl)


def each_schedule(name: str) -> None:
    """The Triton engine with chunks, windows, and a kept share, which ranks round differently."""
    from hf_fused_head.engines.triton_engine import passes

    rows, columns = UNIT + 8, 5 * UNIT - 10
    problem = Problem(shape=(rows,), vocab_size=columns, class_weight=True).with_options(
        label_smoothing=0.1, z_loss=0.01, logit_scale=1.3
    )
    with (
        mock.patch.object(ops, "plan", planned_as(name)),
        mock.patch.object(passes, "MULTIPLE", UNIT),
    ):
        others = [UNIT - 2] * (dist.get_world_size() - 1)
        check(problem, [columns - sum(others), *others], "triton")


def parts_of_the_hidden_gradient(impl: str) -> None:
    """Where the caller sums it, every rank keeps its part; nothing else changes."""
    problem = Problem(shape=(40,), vocab_size=150)
    for reduction in ("mean", "none"):
        in_parts(problem.with_options(reduction=reduction, logit_scale=1.3), impl)


def parts_by_schedule(name: str) -> None:
    from hf_fused_head.engines.triton_engine import passes

    with (
        mock.patch.object(ops, "plan", planned_as(name)),
        mock.patch.object(passes, "MULTIPLE", UNIT),
    ):
        in_parts(Problem(shape=(UNIT + 8,), vocab_size=5 * UNIT - 10), "triton")


def in_parts(problem: Problem, impl: str) -> None:
    rows = rows_of(halves_of(problem.vocab_size))

    def grads(complete: bool) -> tuple[Tensor, ...]:
        tensors = problem.tensors(torch.float32)
        hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
        loss = operand_cross_entropy(
            [(hidden, weight[rows])],
            tensors["target"],
            LossOptions(**problem.options),
            linear_bias=tensors["bias"][rows],
            impl=impl,
            process_group=dist.group.WORLD,
            complete_hidden=complete,
        ).loss
        return torch.autograd.grad(loss.sum(), (hidden, weight))

    (all_hidden, all_weight), (part, weight) = grads(True), grads(False)
    if torch.allclose(part, all_hidden):
        raise AssertionError("the gradient of the hidden states was summed")
    dist.all_reduce(part)
    torch.testing.assert_close(part, all_hidden)
    torch.testing.assert_close(weight, all_weight)


def each_cut(impl: str, name: str) -> None:
    problem = CUTS[name]
    for sizes in (sizes_of(1300), halves_of(1300), halves_of(1300)[::-1]):
        check(problem, sizes, impl, memory_budget_mib=0.01)


for _impl in IMPLS:
    for _name in PROBLEMS:
        CASES[f"{_impl}-{_name}"] = lambda impl=_impl, name=_name: each_problem(impl, name)
for _name in SCHEDULES if "triton" in IMPLS else ():
    CASES[f"triton-schedule-{_name}"] = lambda name=_name: each_schedule(name)
    CASES[f"triton-parts-{_name}"] = lambda name=_name: parts_by_schedule(name)
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
        parts_of_the_hidden_gradient,
        mean_of_nothing,
        autocast,
    ):
        CASES[f"{_impl}-{_check.__name__}"] = lambda impl=_impl, run=_check: run(impl)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_cases(CASES, int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
