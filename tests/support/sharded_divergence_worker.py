"""Run by test_sharded_divergence.py, one process a rank: two heads sharded along the vocabulary."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from oracle import assert_close_as_torch, farthest
from plain_divergence import NAMES, TEACHER, Pair, by_plain, results, upstream_of, widened
from ranks import refused, run_cases
from torch import Tensor
from vocab_parallel_checks import halves_of, rows_of, sizes_of

from hf_fused_head import linear_kl_div, linear_kl_div_with_stats

OPTIONS = {"temperature": 1.7, "student_softcap": 3.0, "teacher_logit_scale": 1.2}
PAIRS = {
    "plain": Pair(),
    "options": Pair(options=OPTIONS),
    "per_token": Pair(options={**OPTIONS, "reduction": "none"}),
    "confident": Pair(confident=True),
    "far": Pair(scale=60.0),
    "chunks": Pair((200,), vocab_size=331, masked=9, options={"reduction": "none"}),
}


def by_shard(pair: Pair, sizes: list[int], impl: str, **options: Any) -> Callable[..., Any]:
    rows = rows_of(sizes)

    def divergence(tensors: dict[str, Tensor]) -> Tensor:
        of_rows = {*NAMES[1:], *TEACHER[1:]}
        given = {name: t[rows] if name in of_rows else t for name, t in tensors.items()}
        return linear_kl_div(
            **given,
            impl=impl,  # type: ignore[arg-type]
            memory_budget_mib=0.001,
            process_group=dist.group.WORLD,
            **{**pair.options, **options},
        )

    return divergence


def a_shard_is_the_whole(impl: str, name: str, beta: float) -> None:
    pair = PAIRS[name].with_options(beta=beta)
    tensors = pair.tensors(torch.float32)
    upstream = upstream_of(pair, torch.float32)
    for sizes in (sizes_of(pair.vocab_size), halves_of(pair.vocab_size)):
        ours = results(by_shard(pair, sizes, impl), tensors, upstream)
        plain = [results(by_plain(pair, as_sum), tensors, upstream) for as_sum in (False, True)]
        truth = results(by_plain(pair), widened(tensors), upstream.double())
        for key, value in ours.items():
            if key in NAMES[1:]:
                dist.all_reduce(value)
            worst = farthest([each[key] for each in plain], truth[key])
            assert_close_as_torch(key, value, worst, truth[key])


def statistics(impl: str) -> None:
    pair = Pair()
    tensors = pair.tensors(torch.float32)
    rows = rows_of(sizes_of(pair.vocab_size))
    of_rows = {*NAMES[1:], *TEACHER[1:]}
    shard = {name: t[rows] if name in of_rows else t for name, t in tensors.items()}
    options: dict[str, Any] = {"impl": impl, "process_group": dist.group.WORLD}
    ours = linear_kl_div_with_stats(**shard, **options)
    plain = linear_kl_div_with_stats(**tensors, impl="reference")
    truth = linear_kl_div_with_stats(**widened(tensors), impl="reference")
    for name in ours._fields:
        assert_close_as_torch(name, *(getattr(each, name) for each in (ours, plain, truth)))


def what_ranks_must_agree_on() -> None:
    pair, rank = Pair(), dist.get_rank()
    sizes, tensors = halves_of(pair.vocab_size), pair.tensors(torch.float32)
    other = {**tensors, "mask": tensors["mask"] ^ (rank == 1)}
    with refused(RuntimeError, "`mask` must be the same on every rank"):
        by_shard(pair, sizes, "torch")(other)
    with refused(RuntimeError, "options of the divergence must be the same"):
        by_shard(pair, sizes, "torch", temperature=1.0 + rank)(tensors)
    frozen = {**tensors, "student": tensors["student"].requires_grad_(rank == 1)}
    with refused(RuntimeError, "tensors that require grad"):
        by_shard(pair, sizes, "torch")(frozen)


def an_error_on_one_rank_is_one_on_every_rank() -> None:
    pair, rank = Pair(), dist.get_rank()
    sizes, tensors = halves_of(pair.vocab_size), pair.tensors(torch.float32)
    for options in ({"beta": 2.0}, {"impl": "triton"}):
        mine = options if rank == 0 else {}
        error = (ValueError if "beta" in options else NotImplementedError) if mine else RuntimeError
        with refused(error, "must be valid on every rank" if rank else "`"):
            by_shard(
                pair,
                sizes,
                mine.get("impl", "torch"),
                **{key: value for key, value in mine.items() if key != "impl"},
            )(tensors)


CASES: dict[str, Callable[[], None]] = {
    **{
        f"{impl}-{name}-{beta}": partial(a_shard_is_the_whole, impl, name, beta)
        for impl in ("reference", "torch")
        for name in PAIRS
        for beta in (0.0, 0.3, 1.0)
    },
    **{f"{impl}-statistics": partial(statistics, impl) for impl in ("reference", "torch")},
    "what_ranks_must_agree_on": what_ranks_must_agree_on,
    "an_error_on_one_rank_is_one_on_every_rank": an_error_on_one_rank_is_one_on_every_rank,
}

if __name__ == "__main__":
    run_cases(CASES, int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
