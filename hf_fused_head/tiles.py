"""What happens to a tile of logits between two products: row statistics, and the gradient in place.

A tile is `[rows, columns]` of the logits, float32 (float64 for float64 inputs), and is worked on in
blocks of rows small enough to stay in a cache. With `top` the largest logit of a row so far,

    e_j = exp(z_j - top),  s = sum_{j != y} e_j,  loss = log1p(s * exp(top - z_y))

and the loss of a confident row (top = z_y) keeps its digits: s is small and nothing was subtracted
from it. An anchor at the target itself would save the search for the maximum, but a loss above 88
nats overflows it; on whole rows the search is 0.5 % of a step (2048x576x49152 float32, two cores),
less than finding and repeating such rows is worth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_fused_head.options import Operands, RowStats

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


class Tally:
    """Running statistics of some rows while windows of their columns pass by."""

    def __init__(
        self, operands: Operands, labels: Tensor, like: Tensor, smooth: bool, entropy: bool
    ) -> None:
        """Nothing seen yet.

        Args:
            operands: The head; softcap and class weights matter here.
            labels: [rows] int64, columns of this rank's logits or beyond them.
            like: Any tensor of the dtype and device of the tiles.
            smooth: Whether to sum the logits for label smoothing.
            entropy: Whether to sum what the entropy needs.
        """
        num_rows = labels.shape[0]
        self.labels = labels
        self.softcap = operands.softcap
        self.class_weight = operands.part_weight
        self.operands = operands
        # The lowest finite number: -inf minus -inf would be nan for columns that a bias masks.
        self.top = like.new_full((num_rows,), torch.finfo(like.dtype).min)
        self.target = like.new_full((num_rows,), float("-inf"))
        self.others = like.new_zeros(num_rows)
        self.best = torch.zeros_like(labels)
        self.first_top = like.new_zeros(num_rows) if smooth else None
        self.weighted = like.new_zeros(num_rows) if smooth else None
        self.spread = like.new_zeros(num_rows) if entropy else None

    def absorb(
        self, block: Tensor, first: int, scratch: Scratch, rows: slice, want_best: bool
    ) -> Tensor:
        """Adds columns `first`, `first + 1`, ... of some rows.

        Args:
            block: [n, columns], the logits, overwritten by the result; or with softcap the argument
                of its tanh, which stays.
            first: Vocabulary index of the first column.
            scratch: Memory beside the block.
            rows: Which n of the rows these are.
            want_best: Whether to remember the best column.

        Returns:
            `exp(z - top)`, 0 at the target, [n, columns]; with softcap in scratch block 0.
        """
        logits = block
        if self.softcap is not None:
            logits = softcapped(block, self.softcap, scratch)
        column, inside = locate(self.labels[rows], first, block.shape[1])
        here = logits.gather(1, column[:, None])[:, 0]
        self._raise_top(logits, first, rows, want_best)
        self.target[rows] = torch.where(inside, here, self.target[rows])
        exps = logits.sub_(self.top[rows, None])
        self._add_weighted(exps, first, rows)
        exps.exp_()
        if self.spread is not None:
            # entr(e) = -e log e, and log e is the logit below the top.
            entr = torch.special.entr(exps, out=scratch.block(1, *block.shape))
            self.spread[rows] -= entr.sum(dim=1)
        write_target(exps, column, inside, torch.zeros_like(here))
        self.others[rows] += exps.sum(dim=1)
        return exps

    def _raise_top(self, logits: Tensor, first: int, rows: slice, want_best: bool) -> None:
        """Moves the sums of earlier columns to the new maximum."""
        old = self.top[rows]
        if want_best:
            largest, index = logits.max(dim=1)
            self.best[rows] = torch.where(largest > old, index + first, self.best[rows])
        else:
            largest = logits.amax(dim=1)
        top = torch.maximum(old, largest)
        # exp of the bound is 0, so it changes no sum; it keeps the product with an empty sum at 0.
        drop = (old - top).clamp_(min=-1e4)
        if self.spread is not None:
            seen = self.others[rows] + (self.target[rows] - old).exp()
            self.spread[rows] = (self.spread[rows] + drop * seen) * drop.exp()
        self.others[rows] *= drop.exp()
        self.top[rows] = top

    def _add_weighted(self, below_top: Tensor, first: int, rows: slice) -> None:
        if self.weighted is None or self.first_top is None:
            return
        if first == 0:
            self.first_top[rows] = self.top[rows]
        columns = below_top.shape[1]
        if self.class_weight is None:
            total, part = columns, below_top.sum(dim=1)
        else:
            weight = self.class_weight[first : first + columns]
            total, part = weight.sum(), below_top @ weight
        # Relative to one anchor per row, near its maximum: a common shift of the logits drops out.
        self.weighted[rows] += part + (self.top[rows] - self.first_top[rows]) * total

    def finish(self, want_correct: bool) -> tuple[RowStats, Tensor]:
        """Once every column was seen: statistics, and the p of each of the exponents, [rows].

        `p_j` is that factor times what `absorb` returned.
        """
        shard, columns, dtype = self.operands.shard, self.operands.num_rows, self.top.dtype
        here = self.labels < columns
        target = shard.sum(torch.where(here, self.target, 0.0))
        reference, others = (t.to(WIDEST) for t in shard.merged(self.top, self.others, target))
        own_top = self.top.to(WIDEST)
        gap = reference - target
        total = others + (-gap).exp()
        near = torch.log1p(others * gap.exp())
        nll = torch.where(gap < 1.0, near, gap + total.log())
        log_total = torch.log1p(others + torch.expm1(-gap))
        share = (own_top - reference).exp() / total
        # lse - top of this rank: what follows from sums around the top, without cancellation.
        above = log_total + (reference - own_top)
        sums = {}
        if self.weighted is not None and self.first_top is not None:
            above_first = above + (own_top - self.first_top)
            part = above_first * class_total(self.class_weight, columns) - self.weighted
            sums["smooth"] = part / self.operands.vocab_size
        if self.spread is not None:
            seen = self.others + (self.target - self.top).exp()
            sums["entropy"] = share * (above * seen - self.spread)
        if want_correct:
            # Of equal logits the first one counts as the prediction.
            later = shard.classes_of(self.labels, columns) >= shard.first + columns
            ahead = (self.top > target) | ((self.top == target) & later)
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
            sums["wrong"] == 0 if want_correct else target.new_empty(0).bool(),
            ((lse - reference).exp() / total).to(dtype),
        )
        return stats, share.to(dtype)


class RowGradient(NamedTuple):
    """Per row, what its gradient with respect to `X W^T + bias` is made of; the scale is inside.

    dz_j = factor p_j - gamma w_j + eta entr(p_j) for j != y, and `target` at the label.
    """

    factor: Tensor  # [rows]
    target: Tensor  # [rows]
    gamma: Tensor | None  # [rows]
    eta: Tensor | None  # [rows]

    def rows(self, rows: slice) -> RowGradient:
        """The part of some rows."""
        gamma = None if self.gamma is None else self.gamma[rows]
        eta = None if self.eta is None else self.eta[rows]
        return RowGradient(self.factor[rows], self.target[rows], gamma, eta)


def row_gradient(
    operands: Operands,
    labels: Tensor,
    stats: RowStats,
    g_nll: Tensor,
    g_lse: Tensor | None,
    g_smooth: Tensor | None,
    g_entropy: Tensor | None,
) -> RowGradient:
    """Row factors of `sum g_nll nll + g_lse lse + g_smooth smooth + g_entropy entropy`."""
    vocab_size, scale = operands.vocab_size, operands.logit_scale
    class_weight = operands.class_weight
    alpha = g_nll if g_lse is None else g_nll + g_lse
    gamma = None
    if g_smooth is not None:
        gamma = g_smooth / vocab_size
        alpha = alpha + gamma * class_total(class_weight, vocab_size)
    # (alpha - beta) p + beta (p - 1) with beta = g_nll, and p - 1 from the loss: exact near p = 1.
    prob = (-stats.nll).exp()
    target = (alpha - g_nll) * prob + g_nll * torch.expm1(-stats.nll)
    if gamma is not None:
        classes = operands.shard.classes_of(labels, operands.num_rows)
        target = target - (gamma if class_weight is None else gamma * class_weight[classes])
    if g_entropy is not None:
        surprise = torch.where(prob > 0, prob * (stats.nll - stats.entropy), 0.0)
        target = target + g_entropy * surprise
        alpha = alpha - g_entropy * stats.entropy
    if stats.correction is not None:
        alpha = alpha * stats.correction
    return RowGradient(
        alpha * scale,
        target * scale,
        None if gamma is None else gamma * scale,
        None if g_entropy is None else g_entropy * scale,
    )


def class_total(class_weight: Tensor | None, vocab_size: int) -> Tensor | int:
    """The sum of the class weights, or of as many ones."""
    return vocab_size if class_weight is None else class_weight.sum()


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
        gradient: Of these rows.
        operands: The head.
        labels: [n] int64.
        first: Vocabulary index of the first column.
        scratch: Memory beside the block.
    """
    columns, class_weight = block.shape[1], operands.part_weight
    entr = None
    if gradient.eta is not None:
        entr = torch.special.entr(exps, out=scratch.block(1, *block.shape))
    exps.mul_(gradient.factor[:, None])
    if entr is not None and gradient.eta is not None:
        exps.addcmul_(entr, gradient.eta[:, None])
    if gradient.gamma is not None:
        if class_weight is None:
            exps.sub_(gradient.gamma[:, None])
        else:
            exps.addr_(gradient.gamma, class_weight[first : first + columns], alpha=-1)
    column, inside = locate(labels, first, columns)
    write_target(exps, column, inside, gradient.target)
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
