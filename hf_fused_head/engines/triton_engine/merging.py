"""Row sums of a vocabulary-parallel head, merged over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fused_head.engines.triton_engine.call import HeadCall
from hf_fused_head.kernels.epilogue import LOWEST
from hf_fused_head.kernels.operands import RowSums


def merged_sums(call: HeadCall, sums: RowSums) -> RowSums:
    """The sums of all tiles of all ranks, in the form of one tile's; see `RowSums`."""
    shard, target = call.shard, sums.target
    if target is not None and sums.row_max is not None:
        target = shard.sum(target.clone())
        sums = sums._replace(row_max=_above_ties(call, sums.row_max, target))
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
    if sums.squares is not None and sums.row_max is not None and row_max is not None:
        factors = (2 * (_level(sums.row_max) - _level(row_max))).exp()
        parts.append((sums.squares * factors).sum(dim=0).float())
    more = iter(shard.sum(torch.stack(parts)) if parts else ())
    return RowSums(
        sum_exp[None],
        None if sums.entropy is None else next(more)[None],
        None if sums.smooth is None else next(more)[None],
        None if row_max is None else row_max[None],
        None if sums.squares is None else next(more)[None],
        target,
    )


def _above_ties(call: HeadCall, row_max: Tensor, target: Tensor) -> Tensor:
    """Of equal logits the first is the largest: tiles before the label's are raised above it."""
    classes = call.shard.classes_of(call.labels, call.local_vocab_size)
    ends = torch.arange(1, row_max.shape[0] + 1, device=row_max.device) * call.config.block_v
    ends = ends.clamp_max(call.local_vocab_size) + call.shard.first
    tied = (ends[:, None] <= classes) & (row_max == target)
    return torch.where(tied, torch.nextafter(row_max, torch.full_like(row_max, torch.inf)), row_max)


def _level(row_max: Tensor) -> Tensor:
    """What the entropy's terms are counted from, in float64, as in the kernels."""
    return row_max.double().clamp_min(LOWEST.value)
