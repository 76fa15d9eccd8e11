"""What the kernels read and write, by name, and slices of it by rows and by vocabulary windows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hf_fused_head.kernels.tuning import TileConfig


class Head(NamedTuple):
    """What the logits are computed from, on one rank.

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + low @ low_weight.T + bias) / softcap)
    times `row_scale`, row by row.
    """

    hidden: Tensor  # [T, H], unit stride along H
    weight: Tensor  # [V, H], unit stride along H
    low: Tensor | None  # [T, R]
    low_weight: Tensor | None  # [V, R]
    bias: Tensor | None  # [V]
    class_weight: Tensor | None  # [V], of this rank's rows
    logit_scale: float
    softcap: float | None
    row_scale: Tensor | None = None  # [T] float32, contiguous

    def window(self, window: slice) -> Head:
        """The same head over some rows of the vocabulary."""
        return self._replace(
            weight=self.weight[window],
            low_weight=None if self.low_weight is None else self.low_weight[window],
            bias=None if self.bias is None else self.bias[window],
            class_weight=None if self.class_weight is None else self.class_weight[window],
        )

    def rows(self, rows: slice) -> Head:
        """The same head over some of the tokens."""
        return self._replace(
            hidden=self.hidden[rows],
            low=None if self.low is None else self.low[rows],
            row_scale=None if self.row_scale is None else self.row_scale[rows],
        )

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The operands of the products: [T, H] with [V, H], and [T, R] with [V, R] if low-rank."""
        first = (self.hidden, self.weight)
        if self.low is None or self.low_weight is None:
            return [first]
        return [first, (self.low, self.low_weight)]


class RowSums(NamedTuple):
    """A row's statistics over each vocabulary tile, [tiles of V, T] float32; None where not needed.

    With z the logits, a the row's anchor and y its label. A later kernel adds them up in a fixed
    order, so that the result is the same from run to run.
    """

    sum_exp: Tensor  # sum of exp(z - a) over j != y
    entropy: Tensor | None  # sum of exp(z - a) (z - a - row_max) over j != y; needs `row_max`
    smooth: Tensor | None  # sum of class_weight (z - a) over all j
    row_max: Tensor | None  # max of z - a over j != y
    squares: Tensor | None  # sum of exp(2 (z - a - row_max)) over j != y; needs `row_max`
    target: Tensor | None  # [T]: z - a at y, of the product of `row_max`; less behind its equal

    def tiles(self, tiles: slice) -> RowSums:
        """The sums of some vocabulary tiles."""
        parts = [None if t is None else t[tiles] for t in self[:-1]]
        return RowSums(*parts, target=self.target)


class RowFactors(NamedTuple):
    """Factors of a row in the gradient of its logits, [T] float32; None where a term is absent.

    `dz_j = p_j (alpha - eta (log p_j + entropy)) - gamma w_j` for j != y, with p = exp(z - lse);
    at the label the first term is `target` instead.
    """

    lse: Tensor
    alpha: Tensor
    target: Tensor
    gamma: Tensor | None
    eta: Tensor | None
    entropy: Tensor | None


class RowOutputs(NamedTuple):
    """What is computed from a row's sums, [T]; None where not needed."""

    nll: Tensor  # float32
    lse: Tensor  # float32
    smooth: Tensor | None  # float32
    entropy: Tensor | None  # float32
    correct: Tensor | None  # bool
    log_sum_sq: Tensor | None  # float32
    factor: Tensor | None  # float32: gradient of the logits / stored exponents
    correction: Tensor | None  # float32: p_j = correction exp(z_j - lse), with the rounded lse
    overflowed: Tensor  # int32: not 0 where the row has to be computed around its maximum

    @property
    def needs_row_max(self) -> bool:
        """Whether the largest logit of every tile is needed."""
        return any(t is not None for t in (self.correct, self.entropy, self.log_sum_sq))

    def rows(self, rows: slice) -> RowOutputs:
        """The same vectors over some of the rows."""
        return RowOutputs(*(None if t is None else t[rows] for t in self))


class Rounding(NamedTuple):
    """Where the last product of the head's gradient writes its float32 sum, rounded."""

    weight: list[Tensor | None]  # [V, H_i] for each pair
    config: TileConfig


class Totals(NamedTuple):
    """Where gradients are summed; None for a gradient that is not needed.

    float32 where more than one product adds to it, else the gradient itself.
    """

    hidden: list[Tensor | None]  # [T, H_i] for each pair
    weight: list[Tensor | None]  # [V, H_i] for each pair
    bias: Tensor | None  # [V]

    def only_hidden(self) -> Totals:
        """The sums of the hidden states alone."""
        return Totals(self.hidden, [None] * len(self.weight), None)

    def without_hidden(self) -> Totals:
        """The sums without those of the hidden states."""
        return self._replace(hidden=[None] * len(self.hidden))

    def rows(self, rows: slice) -> Totals:
        """The sums of a chunk of tokens."""
        return self._replace(hidden=[None if t is None else t[rows] for t in self.hidden])

    def window(self, window: slice) -> Totals:
        """The sums of a window of the vocabulary."""
        weight = [None if t is None else t[window] for t in self.weight]
        return self._replace(weight=weight, bias=None if self.bias is None else self.bias[window])
