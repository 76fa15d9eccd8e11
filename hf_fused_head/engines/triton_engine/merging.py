"""Row sums of a vocabulary-parallel head, merged over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fused_head.distributed.vocab_parallel import VocabShard
from hf_fused_head.kernels.epilogue import LOWEST
from hf_fused_head.kernels.operands import RowSums


def merged_sums(shard: VocabShard, sums: RowSums) -> RowSums:
    """The sums of all tiles of all ranks, in the form of one tile's; see `RowSums`."""
    wide = sums.total.double()
    own = wide.sum(dim=0)
    total = shard.sum(own.float())
    parts = []
    best = None if sums.best is None else shard.max(sums.best.amax(dim=0))
    if sums.entropy is not None and sums.best is not None and best is not None:
        inside = (sums.entropy + _level(sums.best) * wide).sum(dim=0)
        parts.append((inside - _level(best) * own).float())
    if sums.smooth is not None:
        parts.append(sums.smooth.double().sum(dim=0).float())
    if sums.target is not None:
        parts.append(sums.target)
    more = iter(shard.sum(torch.stack(parts)) if parts else ())
    return RowSums(
        total[None],
        None if sums.entropy is None else next(more)[None],
        None if sums.smooth is None else next(more)[None],
        None if best is None else best[None],
        None if sums.target is None else next(more),
    )


def _level(best: Tensor) -> Tensor:
    """What the entropy's terms are counted from, in float64, as in the kernels."""
    return best.double().clamp_min(LOWEST.value)
