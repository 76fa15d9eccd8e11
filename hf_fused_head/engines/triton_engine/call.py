"""The tensors of one call, and memory for what is made from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_fused_head.distributed.vocab_parallel import WHOLE, VocabShard
from hf_fused_head.engines.protocol import Rejected, Speculation
from hf_fused_head.kernels.operands import Head, RowOutputs
from hf_fused_head.kernels.tuning import TileConfig, cdiv
from hf_fused_head.objective import DTYPES, Wanted


class HeadCall(NamedTuple):
    """The tensors of one call and how its kernels are tiled."""

    head: Head
    labels: Tensor  # [T] int64; negative where none counts
    config: TileConfig
    product_bytes: int  # memory for products that the library makes
    product_rows: int  # rows of such a product, if they are the same for every batch; else 0
    sums_bytes: int  # the most memory that the row sums of a pass may take
    speculation: Speculation | None = None  # until the host knows which labels count
    shard: VocabShard = WHOLE
    class_weight: Tensor | None = None  # of the whole vocabulary
    sums_memory: Tensor | None = None  # [n] float32, for row sums

    @property
    def num_tokens(self) -> int:
        return self.labels.shape[0]

    @property
    def local_vocab_size(self) -> int:
        """Rows of this rank's shard of the head."""
        return self.head.weight.shape[0]

    @property
    def vocab_size(self) -> int:
        """Rows of the whole head."""
        return self.shard.total(self.local_vocab_size)

    @property
    def row_sum_bytes(self) -> int:
        """Bytes of the row sums of one kind, for one row, on the rank that holds most columns.

        All ranks make the statistics of equally many rows at once, for their collectives.
        """
        return 4 * cdiv(self.shard.largest(self.local_vocab_size), self.config.block_v)

    def decide(self) -> None:
        """Waits for the decision of a speculation, if there is one.

        Raises:
            Rejected: If the speculation was rejected.
        """
        if self.speculation is not None and not self.speculation.commit():
            raise Rejected

    def rows(self, rows: slice) -> HeadCall:
        return self._replace(head=self.head.rows(rows), labels=self.labels[rows])

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.labels.device)

    def tile(self, num_rows: int, num_columns: int) -> Tensor:
        """Memory for a tile, [num_rows, num_columns] of the operands' dtype, with aligned rows."""
        stride = -(-num_columns // 64) * 64
        return self.empty(num_rows, stride, dtype=self.head.hidden.dtype)[:, :num_columns]

    def with_sums_in(self, gradients: list[Tensor | None]) -> HeadCall:
        """The same call, whose row sums lie in the memory of a gradient where they fit.

        Args:
            gradients: Contiguous, written only after the statistics.
        """
        present = [tensor for tensor in gradients if tensor is not None]
        if not present:
            return self
        largest = max(present, key=lambda tensor: tensor.nbytes).view(-1)
        whole = largest.nbytes // 4 * 4 // largest.element_size()
        return self._replace(sums_memory=largest[:whole].view(torch.float32))

    def row_sums(self, kinds: int, num_tiles: int, num_rows: int) -> Tensor:
        """Memory for row sums, [kinds, tiles, rows] float32; not initialised."""
        size = kinds * num_tiles * num_rows
        reserved = self.sums_memory
        fits = reserved is not None and reserved.numel() >= size
        memory = reserved[:size] if reserved is not None and fits else self.empty(size)
        return memory.view(kinds, num_tiles, num_rows)

    def outputs(self, wanted: Wanted, factor: bool, correction: bool) -> RowOutputs:
        """Memory for what is made of every row; not initialised."""
        rows = self.num_tokens
        asked = {
            name: self.empty(rows, dtype=DTYPES.get(name, torch.float32)) if want else None
            for name, want in wanted._asdict().items()
        }
        return RowOutputs(
            nll=self.empty(rows),
            lse=self.empty(rows),
            **asked,
            factor=self.empty(rows) if factor else None,
            correction=self.empty(rows) if correction else None,
            overflowed=self.empty(rows, dtype=torch.int32),
        )

    def class_total(self) -> Tensor:
        """Sum of the class weights, or V: [1] float32."""
        if self.class_weight is not None:
            return self.class_weight.sum(dtype=torch.float32).reshape(1)
        return torch.full((1,), float(self.vocab_size), device=self.labels.device)
