"""Run by test_sharded_log_probs.py, one process a rank: a head sharded along the vocabulary."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from oracle import assert_close_as_torch, farthest
from places import generator
from plain_head import NAMES, Problem, exact, widened
from plain_token_log_probs import ours, plain, upstreams, with_gradients
from ranks import refused, run_cases
from torch import Tensor
from vocab_parallel_checks import halves_of, rows_of, sizes_of

TEMPERATURES = torch.linspace(0.5, 2.0, 21).view(3, 7)
PROBLEMS = {
    "plain": Problem(),
    "shaped": Problem(options={"temperature": 0.7, "softcap": 3.0, "logit_scale": 1.4}),
    "own_temperatures": Problem(options={"temperature": TEMPERATURES}),
    "confident": Problem(confident=True),
    "far": Problem(surprised=True, options={"temperature": 0.25}),
}
IMPLS = ("reference", "torch", "triton:epilogue", "triton:tile")


def shard_of(tensors: dict[str, Tensor], sizes: list[int]) -> dict[str, Tensor]:
    rows = rows_of(sizes)
    return {name: t[rows] if name in NAMES[1:] else t for name, t in tensors.items()}


def a_shard_is_the_whole(impl: str, name: str, candidates: int = 0) -> None:
    problem = PROBLEMS[name]
    tensors = exact(problem.tensors(torch.float32))
    if candidates:
        shape = (*problem.shape, candidates)
        tensors["target"] = torch.randint(-1, problem.vocab_size, shape, generator=generator(7))
        tensors["target"][tensors["target"] < 0] = -100
    upstream = upstreams(tensors, torch.float32)
    options: dict[str, Any] = problem.options
    stock = [
        with_gradients(lambda leaves, by=by: plain(leaves, options, by), tensors, upstream)
        for by in (False, True)
    ]
    truth = with_gradients(
        lambda leaves: plain(leaves, options), widened(tensors), widened(upstream)
    )
    for sizes in (sizes_of(problem.vocab_size), halves_of(problem.vocab_size)):
        found = with_gradients(
            lambda leaves: ours(leaves, options, impl, process_group=dist.group.WORLD),
            shard_of(tensors, sizes),
            upstream,
        )
        for key, value in found.items():
            if key == "is_top1":
                if not torch.equal(value, truth[key]):
                    raise AssertionError(key)
                continue
            expected = truth[key][rows_of(sizes)] if key in NAMES[1:] else truth[key]
            plain_values = [
                each[key][rows_of(sizes)] if key in NAMES[1:] else each[key] for each in stock
            ]
            results = value, farthest(plain_values, expected), expected
            if key == "mean_logits":
                results = tuple(t + truth["lse"].to(t.dtype) for t in results)
            assert_close_as_torch(key, *results)


def of_equal_logits_the_first_is_the_largest(impl: str) -> None:
    """On one rank, on two, before and behind the target."""
    vocab_size, hidden = 70, torch.ones(1, 8)
    sizes = halves_of(vocab_size)
    for first, second in ((3, 9), (3, 69), (60, 61)):
        weight = torch.zeros(vocab_size, 8)
        weight[[first, second]] = 0.5
        for target, expected in ((first, True), (second, False), (1, False)):
            tensors = {"hidden": hidden, "weight": weight, "target": torch.tensor([target])}
            options: dict[str, Any] = {"process_group": dist.group.WORLD, "outputs": ("is_top1",)}
            found = ours(shard_of(tensors, sizes), {}, impl, **options).is_top1
            if found is None or found.item() is not expected:
                raise AssertionError(f"{first}, {second}, {target}: {found}")


def what_ranks_must_agree_on() -> None:
    rank, tensors = dist.get_rank(), Problem().tensors(torch.float32)
    shard = shard_of(tensors, halves_of(37))
    for options in ({"temperature": 1.0 + rank}, {"temperature": TEMPERATURES + rank}):
        with refused(RuntimeError, "must be the same on every rank"):
            ours(shard, options, "torch", process_group=dist.group.WORLD)
    wrong = {"outputs": ("logits",)} if rank == 0 else {}
    error = ValueError if rank == 0 else RuntimeError
    with refused(error, "`outputs`" if rank == 0 else "must be valid on every rank"):
        ours(shard, wrong, "torch", process_group=dist.group.WORLD)


CASES: dict[str, Callable[[], None]] = {
    **{
        f"{impl}-{name}": partial(a_shard_is_the_whole, impl, name)
        for impl in IMPLS
        for name in PROBLEMS
    },
    **{f"{impl}-ties": partial(of_equal_logits_the_first_is_the_largest, impl) for impl in IMPLS},
    "what_ranks_must_agree_on": what_ranks_must_agree_on,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_cases(CASES, int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
