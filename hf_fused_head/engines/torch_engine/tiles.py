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
from hf_fused_head.objective import RowGradient, RowStats, Wanted, class_total

# A common factor of a whole row does not average out, so it is worth more digits.
WIDEST = torch.float64


class Scratch:
    """Two reusable blocks of memory beside the tile, made when first asked for."""

    def __init__(self, elements: int, like: Tensor) -> None:
        self.elements = elements
        self.like = like
        self.blocks: dict[int, Tensor] = {}

    def block(self, index: int, rows: int, columns: int) -> Tensor:
        """Block `index` as [rows, columns], with whatever it held before."""
        if index not in self.blocks:
            self.blocks[index] = self.like.new_empty(self.elements)
        return self.blocks[index][: rows * columns].view(rows, columns)


class RowStatistics:
    """Online statistics of some rows, updated window by window of their columns."""

    def __init__(self, operands: Operands, labels: Tensor, like: Tensor, wanted: Wanted) -> None:
        """Starts without any column.

        Args:
            operands: The head; softcap, class weights and shard are read here.
            labels: [rows] int64, columns of this rank's logits or beyond them.
            like: Any tensor of the dtype and device of the tiles.
            wanted: Which statistics to make beside nll and lse.
        """
        num_rows = labels.shape[0]
        self.labels = labels
        self.wanted = wanted
        self.softcap = operands.softcap
        self.class_weight = operands.local_class_weight
        self.operands = operands
        # The lowest finite number: -inf minus -inf would be nan for columns that a bias masks.
        self.row_max = like.new_full((num_rows,), torch.finfo(like.dtype).min)
        self.target_logit = like.new_full((num_rows,), float("-inf"))
        self.sum_exp = like.new_zeros(num_rows)  # over the columns off the target
        self.best = torch.zeros_like(labels)
        self.first_max = like.new_zeros(num_rows) if wanted.smooth else None
        self.weighted = like.new_zeros(num_rows) if wanted.smooth else None
        self.spread = like.new_zeros(num_rows) if wanted.entropy else None

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
        logits = block
        if self.softcap is not None:
            logits = softcapped(block, self.softcap, scratch)
        column, inside = locate(self.labels[rows], first, block.shape[1])
        here = logits.gather(1, column[:, None])[:, 0]
        self._rescale(logits, first, rows)
        self.target_logit[rows] = torch.where(inside, here, self.target_logit[rows])
        exps = logits.sub_(self.row_max[rows, None])
        self._add_weighted(exps, first, rows)
        exps.exp_()
        if self.spread is not None:
            # entr(e) = -e log e, and log e is the logit below the maximum.
            entr = torch.special.entr(exps, out=scratch.block(1, *block.shape))
            self.spread[rows] -= entr.sum(dim=1)
        write_target(exps, column, inside, torch.zeros_like(here))
        self.sum_exp[rows] += exps.sum(dim=1)
        return exps

    def _rescale(self, logits: Tensor, first: int, rows: slice) -> None:
        """Brings the sums over earlier columns to the new maximum."""
        old = self.row_max[rows]
        if self.wanted.correct:
            largest, index = logits.max(dim=1)
            self.best[rows] = torch.where(largest > old, index + first, self.best[rows])
        else:
            largest = logits.amax(dim=1)
        row_max = torch.maximum(old, largest)
        # exp of the bound is 0, so it changes no sum; it keeps the product with an empty sum at 0.
        drop = (old - row_max).clamp_(min=-1e4)
        if self.spread is not None:
            seen = self.sum_exp[rows] + (self.target_logit[rows] - old).exp()
            self.spread[rows] = (self.spread[rows] + drop * seen) * drop.exp()
        self.sum_exp[rows] *= drop.exp()
        self.row_max[rows] = row_max

    def _add_weighted(self, below_max: Tensor, first: int, rows: slice) -> None:
        if self.weighted is None or self.first_max is None:
            return
        if first == 0:
            self.first_max[rows] = self.row_max[rows]
        columns = below_max.shape[1]
        if self.class_weight is None:
            total, part = columns, below_max.sum(dim=1)
        else:
            weight = self.class_weight[first : first + columns]
            total, part = weight.sum(), below_max @ weight
        # Relative to one number per row, near its maximum: a common shift of the logits drops out.
        self.weighted[rows] += part + (self.row_max[rows] - self.first_max[rows]) * total

    def finish(self) -> tuple[RowStats, Tensor]:
        """Merges the ranks' statistics once every column was added.

        Returns:
            The statistics, and the factor by which `p_j` exceeds what `update` returned, [rows].
        """
        shard, columns, dtype = (
            self.operands.shard,
            self.operands.local_vocab_size,
            self.row_max.dtype,
        )
        here = self.labels < columns
        target = shard.sum(torch.where(here, self.target_logit, 0.0))
        merged = shard.merged(self.row_max, self.sum_exp, target)
        reference, others = (tensor.to(WIDEST) for tensor in merged)
        own_max = self.row_max.to(WIDEST)
        gap = reference - target
        total = others + (-gap).exp()
        near = torch.log1p(others * gap.exp())
        nll = torch.where(gap < 1.0, near, gap + total.log())
        log_total = torch.log1p(others + torch.expm1(-gap))
        share = (own_max - reference).exp() / total
        # lse - row_max of this rank: from sums around the maximum, without cancellation.
        above = log_total + (reference - own_max)
        sums = {}
        if self.weighted is not None and self.first_max is not None:
            above_first = above + (own_max - self.first_max)
            part = above_first * class_total(self.class_weight, columns) - self.weighted
            sums["smooth"] = part / self.operands.vocab_size
        if self.spread is not None:
            seen = self.sum_exp + (self.target_logit - self.row_max).exp()
            sums["entropy"] = share * (above * seen - self.spread)
        if self.wanted.correct:
            # Of equal logits the first one counts as the prediction.
            later = shard.classes_of(self.labels, columns) >= shard.first + columns
            ahead = (self.row_max > target) | ((self.row_max == target) & later)
            sums["wrong"] = torch.where(here, self.best != self.labels, ahead)
        if sums:
            values = shard.sum(torch.stack([value.to(dtype) for value in sums.values()]))
            sums = dict(zip(sums, values, strict=True))
        lse = (reference + log_total).to(dtype)
        stats = RowStats(
            nll.to(dtype),
            lse,
            sums.get("smooth", target.new_empty(0)),
            sums.get("entropy", target.new_empty(0)),
            sums["wrong"] == 0 if self.wanted.correct else target.new_empty(0).bool(),
            ((lse - reference).exp() / total).to(dtype),
        )
        return stats, share.to(dtype)


def exponentials(block: Tensor, lse: Tensor, softcap: float | None, scratch: Scratch) -> Tensor:
    """`exp(z - lse)`: in place, or with softcap in scratch block 0, where `block` stays."""
    logits = block if softcap is None else softcapped(block, softcap, scratch)
    return logits.sub_(lse[:, None]).exp_()


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
        gradient: Of these rows, times the logit scale.
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
