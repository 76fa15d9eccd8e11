"""The loss as a function of row statistics: what each row counts, the reduction, the gradient.

An engine knows rows: for each it makes `nll`, `lse`, and, where asked for, `smooth`, `entropy`,
`correct` and `log_sum_sq`. Everything that turns rows into the loss that was asked for, and the
loss's gradient into a gradient of each row's logits, stands here. For one row, with z its logits, y
its target, w the class weights (ones without), p = softmax(z) and W the sum of w,

    nll     = lse - z_y                      lse = logsumexp(z)
    smooth  = sum_j w_j (lse - z_j) / V      entropy = lse - sum_j p_j z_j

and the gradient of `a nll + b lse + c smooth + d entropy` with respect to z is

    p_j (alpha - d (log p_j + entropy)) - gamma w_j,      alpha = a + b + gamma W,  gamma = c / V

off the target. At the target the first term is `(alpha - a) p_y + a (p_y - 1)` less entropy's, with
`p_y - 1 = expm1(-nll)`: a confident row keeps its digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_fused_head.options import LossOptions


class Wanted(NamedTuple):
    """Which statistics of a row are made beside `nll` and `lse`; fields as in `RowStats`."""

    smooth: bool = False
    entropy: bool = False
    correct: bool = False
    log_sum_sq: bool = False


class RowStats(NamedTuple):
    """Per row, float32 (float64 for float64 inputs); [0] where not asked for.

    Those with a gradient come first, in the order of `Upstream`; `correction` is the last.
    """

    nll: Tensor  # [T], minus the log-probability of the target
    lse: Tensor  # [T], log-sum-exp of the logits
    smooth: Tensor  # [T] or [0], mean over the vocabulary of w_j * -log p_j
    entropy: Tensor  # [T] or [0], in nats
    correct: Tensor  # [T] or [0], bool: whether the target has the largest logit
    log_sum_sq: Tensor  # [T] or [0], log of sum_j p_j^2
    # [T], p_j = correction * exp(z_j - lse): what rounding took from lse, for a later backward.
    correction: Tensor | None = None


DTYPES = {"correct": torch.bool}
"""Dtypes of the statistics that are not of the dtype of the others."""


class RowWeights(NamedTuple):
    """The scalar objective `sum_t nll nll_t + smooth smooth_t + z lse_t^2`, [T] each."""

    nll: Tensor
    smooth: Tensor | None = None
    z: Tensor | None = None

    def rows(self, rows: slice) -> RowWeights:
        """The same vectors over some of the rows."""
        return RowWeights(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]

    def without(self, ignored: Tensor) -> RowWeights:
        """The same vectors, zero where `ignored`, [T] bool."""
        return RowWeights(*(None if t is None else t.masked_fill(ignored, 0.0) for t in self))  # type: ignore[arg-type]

    def upstream(self, lse: Tensor) -> Upstream:
        """The gradient of the objective with respect to each statistic."""
        g_lse = None if self.z is None else 2 * self.z * lse
        return Upstream(self.nll, g_lse, self.smooth)


class Upstream(NamedTuple):
    """The gradient of a loss with respect to each statistic of a row, [T] each; None for zero."""

    nll: Tensor
    lse: Tensor | None = None
    smooth: Tensor | None = None
    entropy: Tensor | None = None


class RowGradient(NamedTuple):
    """Per row, [T] each, what the gradient of its logits is made of; None for an absent term.

    `dz_j = p_j (alpha - eta (log p_j + entropy)) - gamma w_j`, and `target - gamma w_y` at the
    target.
    """

    alpha: Tensor
    target: Tensor
    gamma: Tensor | None
    eta: Tensor | None

    def rows(self, rows: slice) -> RowGradient:
        """The same vectors over some of the rows."""
        return RowGradient(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]

    def scaled(self, factor: float | Tensor) -> RowGradient:
        """The gradient times a number, or a vector of one number for each row."""
        return RowGradient(*(None if t is None else t * factor for t in self))  # type: ignore[arg-type]


def row_gradient(
    stats: RowStats, upstream: Upstream, vocab_size: int, class_weight: Tensor | None
) -> RowGradient:
    """The factors of a row's gradient, without the logit scale and the softcap's slope.

    Args:
        stats: Of the rows; `entropy` is needed where it has an upstream gradient. A `correction`
            is applied to whatever multiplies p.
        upstream: The gradient with respect to each statistic.
        vocab_size: Rows of the whole head.
        class_weight: [vocab_size], or None.
    """
    alpha, gamma = upstream.nll, None
    if upstream.lse is not None:
        alpha = alpha + upstream.lse
    if upstream.smooth is not None:
        gamma = upstream.smooth / vocab_size
        alpha = alpha + gamma * class_total(class_weight, vocab_size)
    prob = torch.exp(-stats.nll)
    target = (alpha - upstream.nll) * prob + upstream.nll * torch.expm1(-stats.nll)
    eta = upstream.entropy
    if eta is not None:
        # A target without mass has no entropy gradient, although its loss is infinite.
        surprise = torch.where(prob > 0, prob * (stats.nll - stats.entropy), 0.0)
        target = target + eta * surprise
    if stats.correction is not None:
        alpha = alpha * stats.correction
        eta = None if eta is None else eta * stats.correction
    return RowGradient(alpha, target, gamma, eta)


def class_total(class_weight: Tensor | None, vocab_size: int) -> Tensor | int:
    """The sum of the class weights, or of as many ones."""
    return vocab_size if class_weight is None else class_weight.sum()


class Objective(NamedTuple):
    """A loss over tokens: what each counts, and what the sums are divided by.

    Attributes:
        options: The loss.
        target_weight: [T], the class weight of every token's target; 0 where ignored.
        items: What the sum of the cross-entropy is divided by.
        z_items: What the sum of the z-loss is divided by.
        num_valid: 0-d int64, tokens that count.
    """

    options: LossOptions
    target_weight: Tensor
    items: int | Tensor
    z_items: int | Tensor
    num_valid: Tensor

    @classmethod
    def of(
        cls,
        options: LossOptions,
        labels: Tensor,
        class_weight: Tensor | None,
        num_items: int | Tensor | None,
        dtype: torch.dtype,
    ) -> Objective:
        """The objective of one batch.

        Args:
            options: The loss.
            labels: [T] int64.
            class_weight: [V] of `dtype`, or None.
            num_items: With "mean", what both sums are divided by in the place of their own counts.
            dtype: Of the statistics.
        """
        valid = labels != options.ignore_index
        num_valid = valid.sum()
        if class_weight is None:
            target_weight = valid.to(dtype)
        else:
            # A label out of range must reach the operator, which names it.
            known = labels.clamp(0, class_weight.shape[0] - 1)
            target_weight = torch.where(valid, class_weight[known], 0.0)
        if options.reduction != "mean":
            items = z_items = 1
        elif isinstance(num_items, Tensor):
            items = z_items = num_items.detach().reshape(()).to(labels.device)
        elif num_items is not None:
            items = z_items = num_items
        else:
            items = num_valid if class_weight is None else target_weight.sum()
            z_items = num_valid
        return cls(options, target_weight, items, z_items, num_valid)

    def row_weights(self) -> RowWeights:
        """What the statistics of each token count in the scalar loss, [T] each."""
        eps, z_loss = self.options.label_smoothing, self.options.z_loss
        ones = torch.ones_like(self.target_weight)
        return RowWeights(
            (1 - eps) * self.target_weight / self.items,
            eps * ones / self.items if eps > 0 else None,
            z_loss * ones / self.z_items if z_loss > 0 else None,
        )

    def reduce(self, nll: Tensor, lse: Tensor, smooth: Tensor) -> Tensor:
        """The loss from the statistics of its rows: 0-d, or [T] with reduction "none"."""
        eps, z_loss = self.options.label_smoothing, self.options.z_loss
        per_token = (1 - eps) * self.target_weight * nll
        if eps > 0:
            per_token = per_token + eps * smooth
        squared = z_loss * lse * lse
        if self.options.reduction == "none":
            return per_token + squared if z_loss > 0 else per_token
        loss = per_token.sum() / self.items
        return loss + squared.sum() / self.z_items if z_loss > 0 else loss
