"""One rank's share of a step: by hand for small numbers, and whole again in sum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from places import SUPPORT
from ranks import assert_passed, run_ranks

from hf_fused_head.benchmark.estimate import HeadShape
from hf_fused_head.benchmark.scaling import Layout, per_rank

SHAPE = HeadShape("small", hidden_size=10, vocab_size=96, dtype=torch.bfloat16)
HEAD_BYTES = 96 * 10 * 2


def test_one_rank_has_everything_and_sends_nothing() -> None:
    rank = per_rank(SHAPE, 64, Layout(), frozen_head=False)
    assert (rank.ranks, rank.tokens, rank.rows) == (1, 64, 96)
    assert rank.held_weight_bytes == rank.held_gradient_bytes == HEAD_BYTES
    assert rank.gathered_weight_bytes == 0
    assert rank.sent_vocabulary_bytes == rank.sent_weight_bytes == rank.sent_gradient_bytes == 0


def test_a_ring_of_every_kind_by_hand() -> None:
    tensor = per_rank(SHAPE, 64, Layout(tensor=4), frozen_head=False)
    assert (tensor.rows, tensor.held_weight_bytes) == (24, HEAD_BYTES // 4)
    # 64 tokens: 8 bytes forward and 10 float32 columns backward, each sent 2 * 3/4 times.
    assert tensor.sent_vocabulary_bytes == 64 * (8 + 40) * 2 * 3 // 4
    sharded = per_rank(SHAPE, 64, Layout(sharded=2), frozen_head=False)
    assert sharded.held_weight_bytes == HEAD_BYTES // 2
    assert sharded.gathered_weight_bytes == HEAD_BYTES
    # Half of it gathered twice, half of its gradient scattered.
    assert sharded.sent_weight_bytes == 3 * HEAD_BYTES // 2
    sequence = per_rank(SHAPE, 64, Layout(sequence=2), frozen_head=False)
    assert (sequence.tokens, sequence.rows) == (32, 96)
    assert sequence.sent_gradient_bytes == HEAD_BYTES and sequence.sent_weight_bytes == 0


@pytest.mark.parametrize("ranks", [8, 64, 512])
def test_what_is_held_is_shared_out_over_all_ranks(ranks: int) -> None:
    shape = HeadShape("llama", 4096, 128256, torch.bfloat16)
    layout = Layout(tensor=8, sharded=ranks // 8, sequence=1)
    rank = per_rank(shape, 8192, layout, frozen_head=False)
    assert rank.ranks == ranks
    assert rank.held_weight_bytes * ranks == 128256 * 4096 * 2
    assert rank.gathered_weight_bytes in (0, 128256 * 4096 * 2 // 8)
    longer = Layout(tensor=8, sharded=2, sequence=ranks // 8)
    assert per_rank(shape, 8192, longer, False).tokens * longer.sequence == 8192


def test_a_frozen_head_sends_its_weights_only() -> None:
    layout = Layout(sharded=4)
    frozen = per_rank(SHAPE, 64, layout, frozen_head=True)
    assert frozen.held_gradient_bytes == 0
    trained = per_rank(SHAPE, 64, layout, False)
    assert 3 * frozen.sent_weight_bytes == 2 * trained.sent_weight_bytes


def test_more_ranks_than_rows_or_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="`--tp` must be at most 96, the rows of the head, got 97"):
        per_rank(SHAPE, 64, Layout(tensor=97), frozen_head=False)
    with pytest.raises(ValueError, match="`--sp` must be at most 64, the tokens of a step, got 65"):
        per_rank(SHAPE, 64, Layout(sequence=65), frozen_head=False)
    with pytest.raises(ValueError, match="`sharded` must be at least 1"):
        Layout(sharded=0)


def test_what_ranks_send_is_what_the_formulae_say(tmp_path: Path) -> None:
    """Three processes count the bytes that they give to collectives: see the worker."""
    assert_passed(run_ranks(SUPPORT / "scaling_worker.py", 3, tmp_path))
