"""Run by test_scaling.py, one process a rank: what `plan` says of a rank, beside what it sends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import run_cases
from tiny_models import batch, build
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_fused_head import apply_patch, linear_cross_entropy
from hf_fused_head.benchmark.estimate import HeadShape
from hf_fused_head.benchmark.scaling import Layout, per_rank
from hf_fused_head.benchmark.wire import Message, sent

# Rows that the ranks share out evenly; unevenly cut, FSDP2 pads what it gathers.
VOCAB_SIZE = 120
TOKENS = 60
CASES: dict[str, Callable[[], None]] = {}


def vocabulary(impl: str) -> None:
    """Loss and backward of a head that is cut along the vocabulary."""
    ranks, hidden_size = dist.get_world_size(), 16
    hidden = torch.randn(TOKENS, hidden_size, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE // ranks, hidden_size, requires_grad=True)
    target = torch.randint(0, VOCAB_SIZE, (TOKENS,))
    with sent() as messages:
        linear_cross_entropy(
            hidden, weight, target, impl=impl, process_group=dist.group.WORLD
        ).backward()
    # What the ranks agree on comes first, whatever the number of tokens.
    found = sum(message.ring_bytes for message in messages[1:])
    if impl == "torch":
        # Its sums are gathered, where the formula adds them up.
        added = Message("all_reduce", 4 * TOKENS, ranks), Message("all_gather", 4 * TOKENS, ranks)
        found += added[0].ring_bytes - added[1].ring_bytes
    shape = HeadShape("", hidden_size, VOCAB_SIZE, torch.float32)
    expected = per_rank(shape, TOKENS, Layout(tensor=ranks), frozen_head=False)
    assert found == expected.sent_vocabulary_bytes, (messages, expected)
    assert messages[0].kind == "all_gather" and messages[0].given_bytes < 100, messages[0]


for _impl in ("torch", "triton"):
    CASES[f"vocabulary-{_impl}"] = partial(vocabulary, _impl)


def patched() -> tuple[Any, HeadShape]:
    """A model of which the head alone is trained, and the shape of its head."""
    model = build("llama", tie_word_embeddings=False, vocab_size=VOCAB_SIZE)
    model.model.requires_grad_(False)
    shape = HeadShape("", model.config.hidden_size, VOCAB_SIZE, torch.float32)
    return apply_patch(model), shape


def weights(frozen_head: bool, resharded: bool) -> None:
    """A step of a head whose weight FSDP2 shares out."""
    model, shape = patched()
    if frozen_head:
        model.lm_head.requires_grad_(False)
        model.model.norm.requires_grad_(True)
    fully_shard(model.lm_head, reshard_after_forward=resharded)
    inputs = batch(model)
    with sent() as messages:
        model(**inputs).loss.backward()
    layout = Layout(sharded=dist.get_world_size())
    expected = per_rank(shape, inputs["input_ids"].numel(), layout, frozen_head)
    kept = expected.gathered_weight_bytes * (layout.ranks - 1) // layout.ranks
    found = sum(message.ring_bytes for message in messages) + (0 if resharded else kept)
    assert found == expected.sent_weight_bytes, (messages, expected)
    held = model.lm_head.weight.to_local()
    assert held.numel() * held.element_size() == expected.held_weight_bytes


for _frozen in (False, True):
    for _resharded in (False, True):
        _name = f"weights-{'frozen' if _frozen else 'trained'}-{'again' if _resharded else 'once'}"
        CASES[_name] = partial(weights, _frozen, _resharded)


def gradient() -> None:
    """A step of a head whose ranks each have a part of every sequence, and a whole gradient."""
    model, shape = patched()
    inputs = batch(model, length=12 * dist.get_world_size())
    part = {
        name: value.chunk(dist.get_world_size(), 1)[dist.get_rank()]
        for name, value in inputs.items()
    }
    whole: nn.Module = DistributedDataParallel(model)
    whole.register_comm_hook(None, allreduce_hook)
    with sent() as messages:
        whole(**part).loss.backward()
    layout = Layout(sequence=dist.get_world_size())
    expected = per_rank(shape, inputs["input_ids"].numel(), layout, frozen_head=False)
    assert part["input_ids"].numel() == expected.tokens
    assert sum(m.ring_bytes for m in messages) == expected.sent_gradient_bytes, messages


CASES["gradient"] = gradient

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_cases(CASES, int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
