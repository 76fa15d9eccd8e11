"""The bytes that a step takes, for each engine and schedule. Pure integers and no device."""

from __future__ import annotations

from dataclasses import dataclass

# "torch" goes over a tile in blocks of this size, so that what lies beside it is no second tile.
# Blocks that fit a cache gain nothing here, and on a busy machine every block is a barrier more:
# 8 MiB took 2.2 times as long as 200 MiB then (two cores), 24 MiB 1.3 times.
_BLOCK_BYTES = {"cpu": 48 * 2**20, "cuda": 128 * 2**20}

# Row sums of the "triton" engine: float32, one a tile of this many columns, up to four kinds. It
# makes statistics of fewer rows at once rather than hold more than this.
_SUM_COLUMNS = 128
_SUM_KINDS = 4
_SUM_BYTES = 4 * _SUM_KINDS
TRITON_SUMS_BYTES = 32 * 2**20
# Per-row vectors of the "triton" engine.
_ROW_BYTES = 64

Tile = tuple[int, int, float]  # tokens, columns, kept share


def block_bytes(device_type: str) -> int:
    """The size of the blocks in which "torch" goes over a tile."""
    return _BLOCK_BYTES.get(device_type, _BLOCK_BYTES["cuda"])


@dataclass(frozen=True)
class Problem:
    """The sizes of one problem and who needs which gradient.

    Attributes:
        num_tokens: Tokens that count.
        hidden_size: Columns of the head.
        vocab_size: Rows of the head.
        item: Bytes of an operand's element.
        acc: Bytes of an element of a sum.
        impl: "torch", "triton" or "reference".
        device_type: "cpu", "cuda", ...
        grad_hidden: Whether the hidden states need a gradient.
        grad_weight: Whether the head does.
        grad_columns: Columns of the head that do.
        scratch_blocks: Blocks of a tile that "torch" holds beside it.
        smoothing: Whether rows are appended for label smoothing.
        shared_hidden: Whether ranks sum the gradient of the hidden states.
        widened: Whether float16 gradients leave the forward in float32.
    """

    num_tokens: int
    hidden_size: int
    vocab_size: int
    item: int
    acc: int
    impl: str
    device_type: str
    grad_hidden: bool
    grad_weight: bool
    grad_columns: int
    scratch_blocks: int
    smoothing: bool
    shared_hidden: bool
    widened: bool

    def workspace(self, name: str, tile: Tile, late: bool = False) -> int:
        """Bytes beyond inputs, outputs and gradients in their own dtype.

        Args:
            name: The schedule.
            tile: Its tile.
            late: Whether a head's gradient that is summed over chunks has no memory until the tile
                is gone, and is rounded then ("triton").
        """
        if self.impl == "reference":
            # Logits, probabilities, their gradient and two intermediates; operands in `acc`.
            operands = (self.num_tokens + self.vocab_size) * self.hidden_size
            return (5 * self.num_tokens * self.vocab_size + 2 * operands) * self.acc
        if self.impl == "triton":
            return self._triton(name, tile, late)
        return self._torch(name, tile)

    def _torch(self, name: str, tile: Tile) -> int:
        """What `bounded` allocates: tile, scratch blocks, conversions and sums."""
        chunk, window, _ = tile
        whole = name == "gradient_in_forward"
        columns = self.vocab_size if whole else window
        logits = chunk * columns * self.acc
        row = columns * self.acc
        scratch = min(logits, max(row, block_bytes(self.device_type) // row * row))
        # A tile, scratch blocks, and vectors per token and per column.
        total = (
            logits
            + self.scratch_blocks * scratch
            + (32 * self.num_tokens + 4 * self.vocab_size) * self.acc
        )
        if self.item == self.acc:
            return total
        total += (window + chunk) * self.hidden_size * self.acc
        total += chunk * window * self.item
        if self.grad_hidden:
            rows = chunk if whole else self.num_tokens
            total += rows * self.hidden_size * self.acc
        rows = self.vocab_size if whole and chunk < self.num_tokens else window
        return total + self._weight_sum(rows, name)

    def _triton(self, name: str, tile: Tile, late: bool) -> int:
        """What `fused` allocates: kept exponentials or a window, row sums, float32 gradients."""
        chunk, window, kept = tile
        sums = chunk * -(-self.vocab_size // _SUM_COLUMNS) * _SUM_BYTES
        most = TRITON_SUMS_BYTES
        if name == "gradient_in_forward":
            # One kind of all rows of a chunk, a 64th of its tile.
            most = max(most, sums // _SUM_KINDS)
        sums = min(sums, most)
        chunked = name == "gradient_in_forward" and chunk < self.num_tokens
        weight = self.vocab_size * self.grad_columns * self.item
        # They borrow the memory of the head's gradient. With chunks of tokens it is in use, or has
        # none yet.
        if sums <= weight and not chunked:
            sums = 0
        rows = self.num_tokens * _ROW_BYTES
        if name == "loss_only":
            return sums + rows
        # Scaled hidden states borrow the memory of their gradient, where there is one and no rank
        # shares it; not with the rows that smoothing appends to them.
        borrowed = self.grad_hidden and not (self.smoothing or self.shared_hidden)
        scaled = 0 if borrowed else chunk * self.hidden_size * self.item
        if self.shared_hidden and self.item != self.acc and name == "gradient_in_forward":
            scaled += chunk * self.hidden_size * self.acc
        if name == "gradient_in_forward":
            total = self._weight_sum(self.vocab_size if chunked else 0, name)
            made = chunk * self.vocab_size * self.item + sums + scaled
            if late and chunked and total and not self.widened:
                made = max(made - weight, 0)
            return made + total + rows
        columns = max(window, round(kept * self.vocab_size))
        hidden = 0
        several = columns < self.vocab_size or self.shared_hidden
        if self.grad_hidden and self.item != self.acc and several:
            hidden = self.num_tokens * self.hidden_size * self.acc
        # The sums of the statistics are gone when the sums of the gradients begin.
        total = chunk * columns * self.item + max(sums, hidden) + rows + self._weight_sum(0, name)
        return total + (scaled if name == "hybrid" else 0)

    def _weight_sum(self, rows: int, name: str) -> int:
        """Bytes of the float32 sum in which `rows` of the head's gradient accumulate."""
        if self.item == self.acc or not self.grad_weight:
            return 0
        if self.widened and name != "loss_only":
            # float16 gradients leave the forward in float32: twice what they come back in.
            return self.vocab_size * self.grad_columns * self.acc
        return rows * self.grad_columns * self.acc
