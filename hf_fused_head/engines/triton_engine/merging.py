"""Row sums of a vocabulary-parallel head, merged over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fused_head.distributed.vocab_parallel import VocabShard
from hf_fused_head.kernels.epilogue import LOWEST
from hf_fused_head.kernels.operands import RowSums


def merged_sums(shard: VocabShard, sums: RowSums) -> RowSums:
    """The sums of all tiles of all ranks, in the form of one tile's; see `RowSums`."""
    wide = sums.sum_exp.double()
    own = wide.sum(dim=0)
    sum_exp = shard.sum(own.float())
    parts = []
    row_max = None if sums.row_max is None else shard.max(sums.row_max.amax(dim=0))
    if sums.entropy is not None and sums.row_max is not None and row_max is not None:
        inside = (sums.entropy + _level(sums.row_max) * wide).sum(dim=0)
        parts.append((inside - _level(row_max) * own).float())
    if sums.smooth is not None:
        parts.append(sums.smooth.double().sum(dim=0).float())
    if sums.target is not None:
        parts.append(sums.target)
    more = iter(shard.sum(torch.stack(parts)) if parts else ())
    return RowSums(
        sum_exp[None],
        None if sums.entropy is None else next(more)[None],
        None if sums.smooth is None else next(more)[None],
        None if row_max is None else row_max[None],
        None if sums.target is None else next(more),
    )


def _level(row_max: Tensor) -> Tensor:
    """What the entropy's terms are counted from, in float64, as in the kernels."""
    return row_max.double().clamp_min(LOWEST.value)
