"""What the kernels read and write, by name: sliced by rows and by windows of the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hf_fused_head.kernels.tuning import TileConfig


class Head(NamedTuple):
    """What every tile of logits is made from; a window of the vocabulary is a slice of it.

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + low @ low_weight.T + bias) / softcap)
    """

    hidden: Tensor  # [T, H], unit stride along H
    weight: Tensor  # [V, H], unit stride along H
    low: Tensor | None  # [T, R]
    low_weight: Tensor | None  # [V, R]
    bias: Tensor | None  # [V]
    class_weight: Tensor | None  # [V], of the rows that are here
    logit_scale: float
    softcap: float | None

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
            hidden=self.hidden[rows], low=None if self.low is None else self.low[rows]
        )

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """What is multiplied: [T, H] with [V, H], and maybe [T, R] with [V, R]."""
        first = (self.hidden, self.weight)
        if self.low is None or self.low_weight is None:
            return [first]
        return [first, (self.low, self.low_weight)]


class RowSums(NamedTuple):
    """Sums over one vocabulary tile each, [tiles of V, T] float32; None where not asked for.

    With z the logits, a the row's anchor and y its label; a later kernel adds them up in a fixed
    order, which makes the result the same from run to run.
    """

    total: Tensor  # sum of exp(z - a) over j != y
    entropy: Tensor | None  # sum of exp(z - a) (z - a - best) over j != y; needs `best`
    smooth: Tensor | None  # sum of class_weight (z - a) over all j
    best: Tensor | None  # max of z - a over j != y
    target: Tensor | None  # [T]: z - a at y, of the same product as `best`

    def tiles(self, tiles: slice) -> RowSums:
        """The part of some vocabulary tiles."""
        parts = [None if t is None else t[tiles] for t in self[:4]]
        return RowSums(*parts, target=self.target)


class RowGradient(NamedTuple):
    """Row factors of the logits' gradient, [T] float32; None where the term is absent.

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
    """What is known of a row once its sums are complete, [T]; None where not asked for."""

    nll: Tensor  # float32
    lse: Tensor  # float32
    smooth: Tensor | None  # float32
    entropy: Tensor | None  # float32
    correct: Tensor | None  # bool
    factor: Tensor | None  # float32: gradient of the logits / stored exponents
    correction: Tensor | None  # float32: p_j = correction exp(z_j - lse), as rounding left lse
    overflowed: Tensor  # int32: exp overflowed; the row has to be made around its maximum

    @property
    def need_best(self) -> bool:
        """Whether the largest logit of every tile is needed: accuracy and entropy start from it."""
        return self.correct is not None or self.entropy is not None

    def rows(self, rows: slice) -> RowOutputs:
        """The same vectors over some of the rows."""
        return RowOutputs(*(None if t is None else t[rows] for t in self))


class Rounding(NamedTuple):
    """Where the last product of the head's gradient leaves its float32 sum, rounded."""

    weight: list[Tensor | None]  # [V, H_i] a pair
    config: TileConfig


class Totals(NamedTuple):
    """Where gradients accumulate; an entry is None where nobody wants it.

    float32 when more than one product adds to it, else the gradient itself.
    """

    hidden: list[Tensor | None]  # [T, H_i] a pair
    weight: list[Tensor | None]  # [V, H_i] a pair
    bias: Tensor | None  # [V]

    def only_hidden(self) -> Totals:
        """Nothing but the hidden states'."""
        return Totals(self.hidden, [None] * len(self.weight), None)

    def without_hidden(self) -> Totals:
        """All but the hidden states'."""
        return self._replace(hidden=[None] * len(self.hidden))

    def rows(self, rows: slice) -> Totals:
        """The part of a chunk of tokens."""
        return self._replace(hidden=[None if t is None else t[rows] for t in self.hidden])

    def window(self, window: slice) -> Totals:
        """The part of a window of the vocabulary."""
        weight = [None if t is None else t[window] for t in self.weight]
        return self._replace(weight=weight, bias=None if self.bias is None else self.bias[window])
