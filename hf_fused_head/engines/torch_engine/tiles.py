"""What happens to a tile of logits between two products: row statistics, and the gradient in place.

A tile is `[rows, columns]` of the logits, float32 (float64 for float64 inputs), and is worked on in
blocks of rows small enough to stay in a cache. With m the largest logit of a row so far,

    e_j = exp(z_j - m),  s = sum_{j != y} e_j,  loss = log1p(s * exp(m - z_y))

and the loss of a confident row (m = z_y) keeps its digits: s is small and nothing was subtracted
from it. An anchor at the target itself would save the search for the maximum, but a loss above 88
nats overflows it; on whole rows the search is 0.5 % of a step (2048x576x49152 float32, two cores),
less than finding and repeating such rows is worth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fused_head.engines.protocol import Operands
from hf_fused_head.engines.torch_engine.statistics import (
    Merged,
    NewMaximum,
    Scratch,
    Sums,
    absent_statistics,
    wanted_statistics,
)
from hf_fused_head.objective import RowGradient, RowStats, Wanted

# A common factor of a whole row does not average out, so it is worth more digits.
WIDEST = torch.float64


class RowStatistics:
    """Online statistics of some rows, updated window by window of their columns."""

    def __init__(self, operands: Operands, labels: Tensor, like: Tensor, wanted: Wanted) -> None:
        """Starts without any column.

        Args:
            operands: The head at these rows; all but the matrices and the bias is read here.
            labels: [rows] int64, columns of this rank's logits or beyond them.
            like: Any tensor of the dtype and device of the tiles.
            wanted: Which statistics to make beside nll and lse.
        """
        num_rows = labels.shape[0]
        self.operands = operands
        # The lowest finite number: -inf minus -inf would be nan for columns that a bias masks.
        lowest = like.new_full((num_rows,), torch.finfo(like.dtype).min)
        unseen = like.new_full((num_rows,), float("-inf"))
        self.sums = Sums(labels, lowest, unseen, like.new_zeros(num_rows))
        self.others = wanted_statistics(operands, self.sums, wanted)
        self.needs_index = any(statistic.needs_index for statistic in self.others)

    def update(self, block: Tensor, first: int, scratch: Scratch, rows: slice) -> Tensor:
        """Adds columns `first`, `first + 1`, ... of some rows.

        Args:
            block: [n, columns], the logits, overwritten by the result; or with softcap the argument
                of its tanh, which stays.
            first: Vocabulary index of the first column.
            scratch: Memory beside the block.
            rows: Which n of the rows these are.

        Returns:
            `exp(z - row_max)`, 0 at the target, [n, columns]; with softcap in scratch block 0.
        """
        logits = finished_logits(block, self.operands, rows, scratch)
        sums = self.sums.of(rows)
        column, inside = locate(sums.labels, first, block.shape[1])
        here = logits.gather(1, column[:, None])[:, 0]
        self._rescale(logits, first, rows)
        sums.target_logit.copy_(torch.where(inside, here, sums.target_logit))
        exps = logits.sub_(sums.row_max[:, None])
        for statistic in self.others:
            statistic.add_logits(exps, first, rows)
        exps.exp_()
        for statistic in self.others:
            statistic.add_exponentials(exps, scratch, rows)
        write_target(exps, column, inside, torch.zeros_like(here))
        sums.sum_exp.add_(exps.sum(dim=1))
        return exps

    def _rescale(self, logits: Tensor, first: int, rows: slice) -> None:
        """Brings the sums over earlier columns to the new maximum."""
        sums = self.sums.of(rows)
        index = sums.labels[:0]
        if self.needs_index:
            largest, index = logits.max(dim=1)
        else:
            largest = logits.amax(dim=1)
        row_max = torch.maximum(sums.row_max, largest)
        # exp of the bound is 0, so it changes no sum; it keeps the product with an empty sum at 0.
        drop = (sums.row_max - row_max).clamp_(min=-1e4)
        for statistic in self.others:
            statistic.rescale(NewMaximum(rows, first, largest, index, drop))
        sums.sum_exp.mul_(drop.exp())
        sums.row_max.copy_(row_max)

    def finish(self) -> tuple[RowStats, Tensor]:
        """Merges the ranks' statistics once every column was added.

        Returns:
            The statistics, and the factor by which `p_j` exceeds what `update` returned, [rows].
        """
        labels, row_max, target_logit, sum_exp = self.sums
        shard, dtype = self.operands.shard, row_max.dtype
        here = labels < self.operands.local_vocab_size
        target = shard.sum(torch.where(here, target_logit, 0.0))
        merged = shard.merged(row_max, sum_exp, target)
        global_max, off_target = (tensor.to(WIDEST) for tensor in merged)
        own_max = row_max.to(WIDEST)
        gap = global_max - target
        total = off_target + (-gap).exp()
        near = torch.log1p(off_target * gap.exp())
        nll = torch.where(gap < 1.0, near, gap + total.log())
        log_total = torch.log1p(off_target + torch.expm1(-gap))
        share = (own_max - global_max).exp() / total
        # lse - row_max of this rank: from sums around the maximum, without cancellation.
        above = log_total + (global_max - own_max)
        lse = (global_max + log_total).to(dtype)
        found = self._merge_others(Merged(target, own_max, above, share))
        correction = ((lse - global_max).exp() / total).to(dtype)
        others = {**absent_statistics(target), **found}
        stats = RowStats(nll.to(dtype), lse, **others, correction=correction)
        return stats, share.to(dtype)

    def _merge_others(self, merged: Merged) -> dict[str, Tensor]:
        """The other statistics by their names, with one sum over the ranks."""
        if not self.others:
            return {}
        dtype = self.sums.row_max.dtype
        parts = [statistic.part(merged).to(dtype) for statistic in self.others]
        totals = self.operands.shard.sum(torch.stack(parts))
        # An operator's results may not share their memory.
        pairs = zip(self.others, map(torch.clone, totals), strict=True)
        return {statistic.field: statistic.value(total) for statistic, total in pairs}


def exponentials(
    block: Tensor, lse: Tensor, operands: Operands, rows: slice, scratch: Scratch
) -> Tensor:
    """`exp(z - lse)` of some rows, where `finished_logits` leaves z."""
    return finished_logits(block, operands, rows, scratch).sub_(lse[:, None]).exp_()


def finished_logits(block: Tensor, operands: Operands, rows: slice, scratch: Scratch) -> Tensor:
    """The logits of some rows: in place, or with softcap in scratch block 0, and `block` stays."""
    softcap, scale = operands.softcap, operands.row_scale
    logits = block if softcap is None else softcapped(block, softcap, scratch)
    return logits if scale is None else logits.mul_(scale[rows, None])


def softcapped(block: Tensor, softcap: float, scratch: Scratch) -> Tensor:
    """The logits, in scratch block 0, of the arguments of a softcap's tanh."""
    return torch.tanh(block, out=scratch.block(0, *block.shape)).mul_(softcap)


def finish_gradient(
    block: Tensor,
    exps: Tensor,
    gradient: RowGradient,
    entropy: Tensor,
    operands: Operands,
    labels: Tensor,
    first: int,
    scratch: Scratch,
) -> None:
    """Turns `block` into the gradient of the logits.

    Args:
        block: [n, columns], the memory of `exps`, or with softcap the argument of its tanh;
            overwritten.
        exps: [n, columns], p up to a factor that is in `gradient`; overwritten.
        gradient: Of these rows, times `Operands.slope`.
        entropy: [n], of these rows, where `gradient` has a term of it.
        operands: The head.
        labels: [n] int64.
        first: Vocabulary index of the first column.
        scratch: Memory beside the block.
    """
    columns, class_weight = block.shape[1], operands.local_class_weight
    alpha, eta = gradient.alpha, gradient.eta
    if eta is None:
        exps.mul_(alpha[:, None])
    else:
        # p (alpha - eta (log p + entropy)), with -p log p from torch, which is 0 at p = 0.
        entr = torch.special.entr(exps, out=scratch.block(1, *block.shape))
        exps.mul_((alpha - eta * entropy)[:, None]).addcmul_(entr, eta[:, None])
    column, inside = locate(labels, first, columns)
    write_target(exps, column, inside, gradient.target)
    if gradient.gamma is not None:
        if class_weight is None:
            exps.sub_(gradient.gamma[:, None])
        else:
            exps.addr_(gradient.gamma, class_weight[first : first + columns], alpha=-1)
    if operands.softcap is not None:
        # The tanh's derivative as 1 / cosh^2: 1 - tanh^2 has no digit left where tanh rounds to 1.
        block.cosh_()
        torch.div(exps.div_(block), block, out=block)


def locate(labels: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """The label's column in a window, clamped into it, and whether it is there; [rows] each."""
    offset = labels - first
    column = offset.clamp(0, columns - 1)
    return column, offset == column


def write_target(block: Tensor, column: Tensor, inside: Tensor, value: Tensor) -> None:
    """Writes `value` at the label of the rows whose label is inside; needs no host sync."""
    index = column[:, None]
    block.scatter_(1, index, torch.where(inside, value, block.gather(1, index)[:, 0])[:, None])
