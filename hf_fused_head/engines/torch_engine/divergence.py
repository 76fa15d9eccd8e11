"""The divergence of two heads for impl="torch": bounded memory on any device.

Chunks of tokens with whole rows. The logits of both heads lie beside each other, block by block of
their rows they become probabilities, the divergence and the gradient of the student's logits in the
same memory, and two products follow: 3 with the student's head, 1 with the teacher's.

With y the class of the largest logit of a head, and `s = sum_{j != y} exp(z_j - z_y)`, a row's
log-sum-exp is `z_y + log1p(s)`. The difference of log-probabilities is made from differences, which
are exact where the heads are nearly equal,

    d_j = (z_j - z'_j) - (lse - lse'),      d_y = log1p(s') - log1p(s)  where both heads have one y,

and `p_j - q_j = sign(d_j) max(p_j, q_j) (1 - exp(-|d_j|))`, which neither overflows nor cancels.
The formulas of the divergence and its gradient are in `kl_objective`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_fused_head.engines.protocol import DivergenceNeeds, HeadPair
from hf_fused_head.engines.torch_engine.cuts import blocks_of, scratch_beside, slices, tile_of
from hf_fused_head.engines.torch_engine.products import Gradients, Products
from hf_fused_head.engines.torch_engine.tiles import WIDEST, Scratch, softcapped, write_target
from hf_fused_head.planning.schedule import Schedule

# Blocks beside the tiles; the first one holds a softcap's logits.
_DIFFERENCE, _WORK, _MORE = 1, 2, 3


def divergence(
    heads: HeadPair,
    row_weight: Tensor,
    needs: DivergenceNeeds,
    schedule: Schedule,
    keep_half: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `DivergenceEngine.divergence`."""
    heads = heads._replace(beta=_with_exact_complement(heads.beta, heads.dtype))
    student, teacher = heads.student, heads.teacher
    chunk, window = schedule.chunk_tokens, schedule.vocab_window
    num_tokens, vocab_size = student.inputs[0].shape[0], student.local_vocab_size
    grads = Gradients(student, needs.gradients, schedule, keep_half, heads.dtype)
    factor = None
    if needs.gradients.any():
        (factor,) = grads.into_range(student, row_weight * student.logit_scale)
    products = [Products(head, chunk, window, heads.dtype) for head in (student, teacher)]
    memories = [each.empty(chunk * vocab_size) for each in products]
    scratch = scratch_beside(memories[0], vocab_size)
    windows = list(slices(vocab_size, window))
    parts = []
    for rows in slices(num_tokens, chunk):
        tiles = [tile_of(memory, rows, slice(0, vocab_size)) for memory in memories]
        for each, tile in zip(products, tiles, strict=True):
            for columns in windows:
                each.logits(rows, columns, tile[:, columns])
        for part in blocks_of(tiles[0], student.shard.largest(vocab_size)):
            here = slice(rows.start + part.start, rows.start + part.stop)
            block = _Block(heads, tiles[0][part], tiles[1][part], scratch)
            parts.append(block.divergence(needs.entropy, None if factor is None else factor[here]))
            if factor is not None:
                grads.add_bias(tiles[0][part], slice(0, vocab_size), here.start == 0)
        if factor is None:
            continue
        for columns in windows:
            grads.add(products[0], rows, columns, tiles[0][:, columns])
            if grads.by_window:
                grads.settle_weight(columns)
        grads.settle_hidden(rows)
    grads.settle_rest()
    per_token, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return per_token, entropy, grads.results()


def _with_exact_complement(beta: float, dtype: torch.dtype) -> float:
    """The number near `beta` whose complement to 1 is exact in `dtype` too.

    The terms of a mixture cancel to second order in d where its two weights sum to 1. A rounding of
    either weight would leave a first order behind, with one sign in every class.
    """
    if beta in (0, 1):
        return beta
    larger = torch.tensor(max(beta, 1 - beta), dtype=dtype, device="cpu").item()
    larger = min(larger, 1 - torch.finfo(dtype).eps / 2)
    return larger if beta > 0.5 else 1 - larger


class _LocalSums(NamedTuple):
    """One head's rows over the classes of this rank, [rows] each."""

    row_max: Tensor  # the largest logit
    column: Tensor  # int64, its column
    largest: Tensor  # its exponent: 1, or 0 where a bias masks every class
    others: Tensor  # the sum of the exponents of all others

    @classmethod
    def of(cls, logits: Tensor) -> _LocalSums:
        """Of a block of logits, which becomes `exp(z - row_max)` in place."""
        row_max, column = logits.max(dim=1)
        # The lowest finite number: -inf minus -inf would be nan on a rank whose classes are masked.
        row_max = row_max.clamp_(min=torch.finfo(logits.dtype).min)
        exps = logits.sub_(row_max[:, None]).exp_()
        index = column[:, None]
        largest = exps.gather(1, index)
        others = exps.scatter_(1, index, 0.0).sum(dim=1)
        exps.scatter_(1, index, largest)
        return cls(row_max, column, largest[:, 0], others)


class _RowSums(NamedTuple):
    """One head's rows over the classes of all ranks, [rows] each."""

    top_class: Tensor  # int64, of the largest logit
    row_max: Tensor  # that logit, float64
    log_total: Tensor  # log1p of the sum of the exponents of all others around it, float64
    share: Tensor  # p_j over the exponent in this rank's block


class _Block:
    """Some rows of both heads, worked on in the memory of their tiles."""

    def __init__(self, heads: HeadPair, student: Tensor, teacher: Tensor, scratch: Scratch) -> None:
        """Takes logits as products leave them: with a softcap, the argument of its tanh.

        Args:
            heads: Both heads.
            student: [rows, V], overwritten by the gradient where there is one.
            teacher: [rows, V], overwritten.
            scratch: Memory beside the blocks.
        """
        self.heads, self.scratch = heads, scratch
        self.student, self.teacher = student, teacher
        self.shard = heads.student.shard

    def divergence(self, entropy: bool, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """The divergence and, where wanted, the entropy of each row, [rows] or [0].

        Args:
            entropy: Whether the entropy is wanted.
            factor: [rows], what the gradient of the student's logits is multiplied by; None for no
                gradient.
        """
        heads, shape = self.heads, self.student.shape
        p, q = self.student, self.teacher
        if heads.student.softcap is not None:
            p = softcapped(p, heads.student.softcap, self.scratch)
        if heads.teacher.softcap is not None:
            q.tanh_().mul_(heads.teacher.softcap)
        d = torch.sub(p, q, out=self.scratch.block(_DIFFERENCE, *shape))
        local = [_LocalSums.of(block) for block in (p, q)]
        spread = p.new_zeros(p.shape[0])
        if entropy:
            # entr(e) = -e log e, and log e is the logit below the maximum.
            work = self.scratch.block(_WORK, *shape)
            spread = torch.special.entr(p, out=work).sum(dim=1)
        sums = self._merged(local)
        below = (sums[0].row_max - local[0].row_max).to(p.dtype)
        spread = (spread + below * (local[0].others + local[0].largest)) * sums[0].share
        self._finish_difference(d, *sums)
        p.mul_(sums[0].share[:, None])
        q.mul_(sums[1].share[:, None])
        per_row, mean = self._terms(p, q, d)
        merged = self.shard.sum(torch.stack((per_row, mean, spread)))
        per_row, mean, spread = merged.unbind()
        if factor is not None:
            self._finish_gradient(p, d, mean, factor)
        entropies = spread + sums[0].log_total.to(p.dtype)
        return per_row, entropies if entropy else per_row.new_empty(0)

    def _merged(self, local: list[_LocalSums]) -> list[_RowSums]:
        """The sums of both heads over all ranks: three collectives, none for a head on one rank."""
        first, vocab_size = self.shard.first, self.heads.student.vocab_size
        own_max = torch.stack([each.row_max for each in local])
        row_max = self.shard.max(own_max.clone())
        column = torch.stack([each.column for each in local]) + first
        # Of equal logits on several ranks, the first.
        candidate = torch.where(own_max == row_max, column, vocab_size)
        top_class = -self.shard.max(-candidate)
        largest = torch.stack([each.largest for each in local])
        others = torch.stack([each.others for each in local]).to(WIDEST)
        others = others + torch.where(top_class == column, 0.0, largest.to(WIDEST))
        row_max = row_max.to(WIDEST)
        scale = (own_max.to(WIDEST) - row_max).exp()
        log_total = torch.log1p(self.shard.sum(others * scale))
        share = (scale * (-log_total).exp()).to(own_max.dtype)
        return [_RowSums(*each) for each in zip(top_class, row_max, log_total, share, strict=True)]

    def _finish_difference(self, d: Tensor, student: _RowSums, teacher: _RowSums) -> None:
        """Turns the difference of the logits into that of the log-probabilities."""
        above = student.row_max - teacher.row_max
        difference = above + (student.log_total - teacher.log_total)
        d.sub_(difference.to(d.dtype)[:, None])
        # Where both are confident of one class, its difference has lost all digits.
        offset = student.top_class - self.shard.first
        column = offset.clamp(0, d.shape[1] - 1)
        agreed = (student.top_class == teacher.top_class) & (offset == column)
        exact = (teacher.log_total - student.log_total).to(d.dtype)
        write_target(d, column, agreed, exact)
        # 0 for a class that neither head has. What multiplies an infinite difference is 0, except
        # where the divergence is infinite.
        beta, largest = self.heads.beta, torch.finfo(d.dtype).max
        above_all = math.inf if beta == 1 else largest
        below_all = -math.inf if beta == 0 else -largest
        d.nan_to_num_(nan=0.0, posinf=above_all, neginf=below_all)

    def _terms(self, p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence of each row and the sum of its slopes, over this rank's classes.

        With them go `p - q` in the memory of p (`beta = 0`), or the slopes without their factors
        in the memory of d (`beta = 1`) or of the work block. Overwrites q, and d within a mixture.
        """
        beta, shape = self.heads.beta, d.shape
        work = self.scratch.block(_WORK, *shape)
        torch.abs(d, out=work).neg_().expm1_()  # exp(-|d|) - 1
        if 0 < beta < 1:
            return self._mixture_terms(p, q, d, work)
        if beta == 0:
            # p - q, in the memory of p.
            gap = torch.maximum(p, q, out=p).mul_(work.neg_()).copysign_(d)
            per_row = q.mul_(d).sub_(gap).sum(dim=1).neg_()
            return per_row, torch.zeros_like(per_row)
        gap = torch.maximum(p, q, out=q).mul_(work.neg_()).copysign_(d)
        weighted = torch.mul(p, d, out=work)
        return torch.sub(weighted, gap, out=q).sum(dim=1), weighted.sum(dim=1)

    def _mixture_terms(
        self, p: Tensor, q: Tensor, d: Tensor, work: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `_terms`, where the `expm1` terms of both divergences cancel class by class."""
        beta = self.heads.beta
        more = self.scratch.block(_MORE, *d.shape)
        torch.gt(d, 0, out=more).mul_(2 * beta - 1).add_(1 - beta)
        near = work.mul_(more).log1p_()
        below = torch.clamp(d, max=0, out=more)
        from_teacher = d.clamp_(min=0).add_(near)  # log m - log q
        from_student = near.sub_(below)  # log m - log p
        terms = from_teacher.mul_(q).mul_(beta)
        weighted = torch.mul(p, from_student, out=q)
        per_row = terms.add_(weighted, alpha=1 - beta).sum(dim=1).neg_()
        return per_row, weighted.sum(dim=1)

    def _finish_gradient(self, p: Tensor, d: Tensor, mean: Tensor, factor: Tensor) -> None:
        """Writes the gradient of `X W^T + bias` over the student's block.

        Args:
            p: The student's probabilities; at `beta = 0` the difference of the probabilities.
            d: The difference of the log-probabilities.
            mean: [rows], what is subtracted from every slope before p multiplies it.
            factor: [rows].
        """
        beta = self.heads.beta
        factor = factor[:, None]
        if beta == 0:
            gradient = p.mul_(factor)
        else:
            slope = d if beta == 1 else self.scratch.block(_WORK, *d.shape)
            scale = factor if beta == 1 else -(1 - beta) * factor
            gradient = p.mul_(slope.sub_(mean[:, None])).mul_(scale)
        if self.heads.student.softcap is not None:
            # 1 / cosh^2: 1 - tanh^2 has no digit left where tanh rounds to 1.
            block = self.student.cosh_()
            torch.div(gradient.div_(block), block, out=block)
