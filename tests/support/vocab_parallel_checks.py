"""A head cut along the vocabulary against torch: what the cases of several ranks are made of."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import assert_close_as_torch
from places import generator
from plain_head import (
    NAMES,
    Loss,
    Problem,
    by_plain,
    exact,
    loss_of_logits,
    results,
    shaped_logits,
    widened,
)
from torch import Tensor

from hf_fused_head import linear_cross_entropy as fused_loss

IMPLS = ("reference", "torch", *(["triton", "triton:tile"] if find_spec("triton") else []))


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


def compare(problem: Problem, tensors: dict[str, Tensor], sizes: list[int], impl: str) -> None:
    """As `check`, of tensors that are given."""
    ours = results(by_shard(problem, sizes, impl), tensors, None)
    plain = results(by_parts(problem, sizes), tensors, None)
    truth = results(by_plain(problem), widened(tensors), None)
    for name, value in ours.items():
        assert_close_as_torch(name, whole(name, value), plain[name], truth[name])


def gradients(loss: Loss, tensors: dict[str, Tensor], wanted: tuple[str, ...]) -> dict[str, Tensor]:
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in tensors.items() if n in NAMES}
    value = loss({**tensors, **leaves}).sum()
    if value.requires_grad:
        value.backward()
    return {name: leaves[name].grad for name in wanted}
