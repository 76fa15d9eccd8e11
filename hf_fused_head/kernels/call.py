"""The tensors of one call, and memory for what is made from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_fused_head.distributed.vocab_parallel import WHOLE, VocabShard
from hf_fused_head.kernels.operands import Attempt, Head, RowOutputs
from hf_fused_head.kernels.tuning import TileConfig, cdiv


class Call(NamedTuple):
    """The tensors of one call and how its kernels are tiled."""

    head: Head
    labels: Tensor  # [T] int64; negative where none counts
    config: TileConfig
    allow_tf32: bool  # for float32 products
    sums_bytes: int  # the most memory that the row sums of a pass may take
    attempt: Attempt | None = None  # until the host knows which labels count
    shard: VocabShard = WHOLE
    class_weight: Tensor | None = None  # of the whole vocabulary
    lent: Tensor | None = None  # [n] float32, for row sums

    @property
    def num_tokens(self) -> int:
        return self.labels.shape[0]

    @property
    def vocab_size(self) -> int:
        """Rows of the head that are here."""
        return self.head.weight.shape[0]

    @property
    def vocab_total(self) -> int:
        """Rows of the head on all ranks."""
        return self.shard.total(self.vocab_size)

    @property
    def row_sum_bytes(self) -> int:
        """Row sums of one kind, for one row, on the rank that holds most columns.

        The rows that the ranks speak about at once are those that this one has memory for.
        """
        return 4 * cdiv(self.shard.largest(self.vocab_size), self.config.block_v)

    def rows(self, rows: slice) -> Call:
        return self._replace(head=self.head.rows(rows), labels=self.labels[rows])

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.labels.device)

    def tile(self, num_rows: int, num_columns: int) -> Tensor:
        """Memory for a tile, [num_rows, num_columns] of the operands' dtype, with aligned rows."""
        stride = -(-num_columns // 64) * 64
        return self.empty(num_rows, stride, dtype=self.head.hidden.dtype)[:, :num_columns]

    def borrowing(self, lenders: list[Tensor | None]) -> Call:
        """The same call, whose row sums lie in one of these where they fit.

        Args:
            lenders: Contiguous, written only after the statistics.
        """
        present = [tensor for tensor in lenders if tensor is not None]
        if not present:
            return self
        largest = max(present, key=lambda tensor: tensor.nbytes).view(-1)
        whole = largest.nbytes // 4 * 4 // largest.element_size()
        return self._replace(lent=largest[:whole].view(torch.float32))

    def row_sums(self, kinds: int, num_tiles: int, num_rows: int) -> Tensor:
        """Memory for row sums, [kinds, tiles, rows] float32, borrowed where that is possible."""
        size = kinds * num_tiles * num_rows
        fits = self.lent is not None and self.lent.numel() >= size
        memory = self.lent[:size] if fits else self.empty(size)
        return memory.view(kinds, num_tiles, num_rows)

    def outputs(
        self, smooth: bool, entropy: bool, correct: bool, factor: bool, correction: bool
    ) -> RowOutputs:
        rows = self.num_tokens
        return RowOutputs(
            nll=self.empty(rows),
            lse=self.empty(rows),
            smooth=self.empty(rows) if smooth else None,
            entropy=self.empty(rows) if entropy else None,
            correct=self.empty(rows, dtype=torch.bool) if correct else None,
            factor=self.empty(rows) if factor else None,
            correction=self.empty(rows) if correction else None,
            overflowed=self.empty(rows, dtype=torch.int32),
        )

    def class_total(self) -> Tensor:
        """Sum of the class weights, or V: [1] float32."""
        if self.class_weight is not None:
            return self.class_weight.sum(dtype=torch.float32).reshape(1)
        return torch.full((1,), float(self.vocab_total), device=self.labels.device)
