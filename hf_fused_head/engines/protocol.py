"""What an engine computes, and the records that it takes; see `Engine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hf_fused_head.distributed.vocab_parallel import WHOLE, VocabShard
from hf_fused_head.objective import RowStats, RowWeights, Upstream, Wanted
from hf_fused_head.planning.schedule import Schedule


class Operands(NamedTuple):
    """The head: logits are `softcap * tanh(scale * (sum_i X_i W_i^T + b) / softcap) * r`.

    b is the bias and r the `row_scale`.
    """

    inputs: list[Tensor]  # [T, H_i] each
    weights: list[Tensor]  # [local V, H_i] each, the rows of `shard`
    bias: Tensor | None  # [local V], of `shard`
    class_weight: Tensor | None  # [V], of the whole vocabulary, in the dtype of the statistics
    logit_scale: float
    softcap: float | None
    shard: VocabShard = WHOLE
    row_scale: Tensor | None = None  # [T], in the dtype of the statistics; None for ones

    @property
    def local_vocab_size(self) -> int:
        """Rows of this rank's shard of the head."""
        return self.weights[0].shape[0]

    @property
    def vocab_size(self) -> int:
        """Rows of the whole head."""
        return self.shard.total(self.local_vocab_size)

    @property
    def local_class_weight(self) -> Tensor | None:
        """The class weights of this rank's rows."""
        return self.shard.part(self.class_weight, self.local_vocab_size)

    @property
    def slope(self) -> float | Tensor:
        """The derivative of a row's logits by their products, that of the softcap left out."""
        return self.logit_scale if self.row_scale is None else self.row_scale * self.logit_scale

    def rows(self, rows: slice) -> Operands:
        """The same head over some of the tokens."""
        scale = None if self.row_scale is None else self.row_scale[rows]
        return self._replace(inputs=[hidden[rows] for hidden in self.inputs], row_scale=scale)


class Needs(NamedTuple):
    """Which gradients are needed."""

    inputs: list[bool]
    weights: list[bool]
    bias: bool

    def any(self) -> bool:
        """Whether there is any gradient to make."""
        return self.bias or any(self.inputs) or any(self.weights)


class HeadPair(NamedTuple):
    """Two heads over one vocabulary, at the tokens that count.

    The temperature is in their scales and softcaps. `dtype` is that of logits and sums: float64 if
    either head has it, else float32.
    """

    student: Operands
    teacher: Operands
    beta: float
    dtype: torch.dtype


class DivergenceNeeds(NamedTuple):
    """What is made beside the divergence of every token."""

    student: bool
    weight: bool
    bias: bool
    entropy: bool = False

    @property
    def gradients(self) -> Needs:
        """As for a head of one pair of operands."""
        return Needs([self.student], [self.weight], self.bias)


class Speculation(NamedTuple):
    """A launch on all rows before the host knows how many of them count.

    The first product is launched on all rows and reads the decision on the device; the host learns
    it while that product runs, so that the device never waits in between.
    """

    labels: Tensor  # [T] int64, -1 for an ignored row, -2 for a label out of range
    rejected: Tensor | None  # one int32 on the device: not 0 if the product must not run
    commit: Callable[[], bool]  # waits; False if it was rejected; raises for a label out of range
    kept_rows: Callable[[], Tensor]  # the rows that count, int64, once the host has waited


class Rejected(Exception):
    """So many rows are ignored that the caller should drop them and call again."""


class Engine(Protocol):
    """One implementation of the loss and its gradients, as a module of functions.

    Rows without a label have been dropped, unless a `speculation` is given: then rows with a
    negative label may remain, whose results are zero. `labels` are columns of this rank's logits,
    beyond them for a target on another rank.
    """

    def row_stats(
        self,
        operands: Operands,
        labels: Tensor,
        wanted: Wanted,
        schedule: Schedule,
        speculation: Speculation | None = None,
    ) -> RowStats:
        """Statistics of every row.

        Raises:
            Rejected: If the speculation was rejected.
        """
        ...

    def stats_and_grads(
        self,
        operands: Operands,
        labels: Tensor,
        weights: RowWeights,
        needs: Needs,
        wanted: Wanted,
        schedule: Schedule,
        speculation: Speculation | None = None,
    ) -> tuple[RowStats, list[Tensor]]:
        """Statistics, and the gradients of the objective that `weights` states.

        Gradients are those of inputs, weights and bias in that order, [0] where not needed;
        float16 ones in float32, since a loss scale arrives only with the upstream gradient.

        Raises:
            Rejected: If the speculation was rejected.
        """
        ...

    def row_grads(
        self,
        operands: Operands,
        labels: Tensor,
        stats: RowStats,
        upstream: Upstream,
        needs: Needs,
        schedule: Schedule,
    ) -> list[Tensor]:
        """The gradients of `sum_t upstream_t . stats_t`, in the dtypes of their parameters."""
        ...

    def speculate(
        self,
        labels: Tensor,
        ignore_index: int,
        vocab_size: int,
        raise_for_label: Callable[[], object],
    ) -> Speculation | None:
        """A launch on all rows, or None where the engine waits for the host.

        Args:
            labels: [T] int64, at least one.
            ignore_index: The label of rows that do not count.
            vocab_size: Labels that count lie in `[0, vocab_size)`.
            raise_for_label: Called when a label is out of range; raises the error that names it.
        """
        ...


class DivergenceEngine(Protocol):
    """One implementation of the divergence of two heads, as a module with this function."""

    def divergence(
        self,
        heads: HeadPair,
        row_weight: Tensor,
        needs: DivergenceNeeds,
        schedule: Schedule,
        keep_half: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The divergence of every token, and the gradient of its weighted sum.

        Args:
            heads: Both heads.
            row_weight: [T], the factor of each token in the sum, in the dtype of `heads`; [0]
                without gradients.
            needs: Which gradients, and whether the entropy.
            schedule: Chunks of tokens, windows of the vocabulary.
            keep_half: Leave float16 gradients in float32, for a loss scale that arrives later.

        Returns:
            The divergence, [T]; the student's entropy, [T] or [0]; the gradients of the student's
            hidden states, weight and bias, [0] where not needed.
        """
        ...
