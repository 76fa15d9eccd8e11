"""Statistics of a row beside its `nll` and `lse`, each one object: a new one is a class here.

Each states what a window of columns adds, what a new maximum does to its sums, and its value from
the sums of all ranks. Its gradient, where it has one, is a term of `objective.row_gradient`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_fused_head.engines.protocol import Operands
from hf_fused_head.objective import DTYPES, Wanted, class_total


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


class Sums(NamedTuple):
    """The running sums that all statistics share, [rows] each, over the columns seen so far."""

    labels: Tensor  # int64, columns of this rank's logits or beyond them
    row_max: Tensor
    target_logit: Tensor  # -inf until its column is seen
    sum_exp: Tensor  # of exp(z - row_max), off the target

    def of(self, rows: slice) -> Sums:
        """Views of some rows."""
        return Sums(*(values[rows] for values in self))

    def all_exponentials(self) -> Tensor:
        """`sum_exp` with the target's term."""
        return self.sum_exp + (self.target_logit - self.row_max).exp()


class NewMaximum(NamedTuple):
    """A window is about to be added, whose largest logit may be a row's new maximum."""

    rows: slice
    first: int  # vocabulary index of the window's first column
    largest: Tensor  # [n], of the window
    index: Tensor  # [n], its column in the window; [0] where no statistic needs it
    drop: Tensor  # [n], the old maximum minus the new one, bounded: its exponential is 0 there


class Merged(NamedTuple):
    """What the ranks agree on after the last column, [rows] each."""

    target: Tensor  # the target's logit
    row_max: Tensor  # of this rank, in the dtype of the others
    above: Tensor  # lse minus this rank's maximum
    share: Tensor  # p_j over exp(z_j - row_max)


class Statistic:
    """What a statistic may do at each step; by itself nothing."""

    field: str
    """Its name in `Wanted` and in `RowStats`."""
    needs_index = False
    """Whether it reads `NewMaximum.index`."""

    def __init__(self, operands: Operands, sums: Sums) -> None:
        self.operands = operands
        self.sums = sums

    def rescale(self, new: NewMaximum) -> None:
        """Brings sums to the new maximum; those of `Sums` are still the old ones."""

    def add_logits(self, below_max: Tensor, first: int, rows: slice) -> None:
        """Adds a window, as logits minus the maximum, [n, columns]."""

    def add_exponentials(self, exps: Tensor, scratch: Scratch, rows: slice) -> None:
        """Adds a window, as the exponentials of those; block 1 of `scratch` is free."""

    def part(self, merged: Merged) -> Tensor:
        """This rank's summand, [rows]."""
        raise NotImplementedError

    def value(self, total: Tensor) -> Tensor:
        """The statistic from the sum over all ranks."""
        return total


class Smooth(Statistic):
    """Mean over the vocabulary of w_j times minus log p_j."""

    field = "smooth"

    def __init__(self, operands: Operands, sums: Sums) -> None:
        super().__init__(operands, sums)
        self.class_weight = operands.local_class_weight
        self.first_max = torch.zeros_like(sums.row_max)
        self.weighted = torch.zeros_like(sums.row_max)

    def add_logits(self, below_max: Tensor, first: int, rows: slice) -> None:
        row_max = self.sums.row_max[rows]
        if first == 0:
            self.first_max[rows] = row_max
        columns = below_max.shape[1]
        if self.class_weight is None:
            total, part = columns, below_max.sum(dim=1)
        else:
            weight = self.class_weight[first : first + columns]
            total, part = weight.sum(), below_max @ weight
        # Relative to one number per row, near its maximum: a common shift of the logits drops out.
        self.weighted[rows] += part + (row_max - self.first_max[rows]) * total

    def part(self, merged: Merged) -> Tensor:
        above_first = merged.above + (merged.row_max - self.first_max)
        total = class_total(self.class_weight, self.operands.local_vocab_size)
        return (above_first * total - self.weighted) / self.operands.vocab_size


class Entropy(Statistic):
    """Minus the sum of p_j log p_j, in nats."""

    field = "entropy"

    def __init__(self, operands: Operands, sums: Sums) -> None:
        super().__init__(operands, sums)
        self.spread = torch.zeros_like(sums.row_max)  # of e_j log e_j, e_j = exp(z_j - row_max)

    def rescale(self, new: NewMaximum) -> None:
        seen = self.sums.of(new.rows).all_exponentials()
        self.spread[new.rows] = (self.spread[new.rows] + new.drop * seen) * new.drop.exp()

    def add_exponentials(self, exps: Tensor, scratch: Scratch, rows: slice) -> None:
        # entr(e) = -e log e, and log e is the logit below the maximum.
        entr = torch.special.entr(exps, out=scratch.block(1, *exps.shape))
        self.spread[rows] -= entr.sum(dim=1)

    def part(self, merged: Merged) -> Tensor:
        return merged.share * (merged.above * self.sums.all_exponentials() - self.spread)


class Correct(Statistic):
    """Whether the target has the largest logit; of equal ones the first is the prediction."""

    field = "correct"
    needs_index = True

    def __init__(self, operands: Operands, sums: Sums) -> None:
        super().__init__(operands, sums)
        self.best = torch.zeros_like(sums.labels)

    def rescale(self, new: NewMaximum) -> None:
        larger = new.largest > self.sums.row_max[new.rows]
        self.best[new.rows] = torch.where(larger, new.index + new.first, self.best[new.rows])

    def part(self, merged: Merged) -> Tensor:
        labels, row_max = self.sums.labels, self.sums.row_max
        shard, columns = self.operands.shard, self.operands.local_vocab_size
        later = shard.classes_of(labels, columns) >= shard.first + columns
        ahead = (row_max > merged.target) | ((row_max == merged.target) & later)
        return torch.where(labels < columns, self.best != labels, ahead)

    def value(self, total: Tensor) -> Tensor:
        return total == 0


class LogSumSq(Statistic):
    """Logarithm of the sum of p_j squared."""

    field = "log_sum_sq"

    def __init__(self, operands: Operands, sums: Sums) -> None:
        super().__init__(operands, sums)
        self.squares = torch.zeros_like(sums.row_max)  # of exp(z_j - row_max)

    def rescale(self, new: NewMaximum) -> None:
        self.squares[new.rows] *= (2 * new.drop).exp()

    def add_exponentials(self, exps: Tensor, scratch: Scratch, rows: slice) -> None:
        squares = torch.mul(exps, exps, out=scratch.block(1, *exps.shape))
        self.squares[rows] += squares.sum(dim=1)

    def part(self, merged: Merged) -> Tensor:
        return merged.share.square() * self.squares

    def value(self, total: Tensor) -> Tensor:
        return total.log()


STATISTICS = (Smooth, Entropy, Correct, LogSumSq)


def wanted_statistics(operands: Operands, sums: Sums, wanted: Wanted) -> list[Statistic]:
    """The statistics that are asked for, without any column."""
    return [kind(operands, sums) for kind in STATISTICS if getattr(wanted, kind.field)]


def absent_statistics(like: Tensor) -> dict[str, Tensor]:
    """The fields of `RowStats` that are not asked for, [0] each."""
    return {kind.field: like.new_empty(0, dtype=DTYPES.get(kind.field)) for kind in STATISTICS}
