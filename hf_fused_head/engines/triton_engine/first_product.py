"""The product of hidden states and head: inside a kernel, or by the vendor's library in tiles.

Where a card has a kernel whose epilogue hides behind its product, that kernel runs. Everywhere else
the library makes the product, tile by tile, in a little float32 memory, and one elementwise kernel
makes of each tile what the epilogue would have made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_fused_head.engines.triton_engine.call import HeadCall
from hf_fused_head.engines.triton_engine.products import product
from hf_fused_head.kernels.head import NO_GRADIENT, NO_SUMS, launch_exponents, launch_gradient
from hf_fused_head.kernels.logits_tile import TilePass
from hf_fused_head.kernels.operands import Head, RowFactors, RowSums
from hf_fused_head.kernels.tuning import cdiv


def exponents(
    call: HeadCall, window: slice, anchor: Tensor, sums: RowSums, store: Tensor | None
) -> None:
    """Row sums of the exponents of some columns, and maybe the exponents.

    Args:
        call: The rows. The library cannot leave out a product that is not wanted: with it a
            speculation is decided behind the first tile.
        window: The columns; the first is a multiple of a tile's width.
        anchor: [T] float32.
        sums: Of the window's tiles, written.
        store: [T, window], written; None to store nothing.

    Raises:
        Rejected: If the speculation was rejected.
    """
    head = call.head.window(window)
    skip = None if call.speculation is None else call.speculation.rejected
    if not call.config.product_rows:
        place = (call.labels, window.start, anchor, sums, store)
        launch_exponents(head, *place, call.config, skip)
        return
    place = (call.labels, window.start, anchor, sums)
    tiles = TilePass(head, *place, NO_GRADIENT, store, call.config, skip)
    for first_t, first_v, tile in _products(head, call):
        tiles.launch(tile, first_t, first_v)
        if first_t == first_v == 0:
            call.decide()


def logits_gradient(call: HeadCall, window: slice, gradient: RowFactors, store: Tensor) -> None:
    """The gradient of the products of some columns.

    Args:
        call: The rows.
        window: The columns.
        gradient: The row factors.
        store: [T, window], written.
    """
    head = call.head.window(window)
    if not call.config.product_rows:
        launch_gradient(head, call.labels, window.start, gradient, store, call.config)
        return
    place = (call.labels, window.start, None, NO_SUMS)
    tiles = TilePass(head, *place, gradient, store, call.config, None)
    for first_t, first_v, tile in _products(head, call):
        tiles.launch(tile, first_t, first_v)


def _products(head: Head, call: HeadCall) -> Iterator[tuple[int, int, Tensor]]:
    """Tiles of the product, float32, one after another in the same memory: (row, column, tile)."""
    num_tokens, vocab_size = head.hidden.shape[0], head.weight.shape[0]
    block_v = call.config.block_v
    rows = call.product_rows or _even_rows(num_tokens, call)
    columns = max(call.product_bytes // (4 * rows * block_v), 1) * block_v
    columns = min(columns, cdiv(vocab_size, block_v) * block_v)
    memory = torch.empty((rows, columns), dtype=torch.float32, device=head.hidden.device)
    pairs = head.pairs()
    starts = range(0, num_tokens, rows)
    hidden_parts = [[hidden[start : start + rows] for hidden, _ in pairs] for start in starts]
    if call.product_rows:
        # The library's order of summation depends on the shape: one for all gives a row the same
        # bits in every batch.
        hidden_parts[-1] = [_padded(hidden, rows) for hidden in hidden_parts[-1]]
    for first_v in range(0, vocab_size, columns):
        weights = [weight[first_v : first_v + columns].t() for _, weight in pairs]
        for first_t, hiddens in zip(starts, hidden_parts, strict=True):
            # The last columns keep the row stride, and so the alignment, of the others.
            tile = memory[: hiddens[0].shape[0], : weights[0].shape[1]]
            for index, (hidden, weight) in enumerate(zip(hiddens, weights, strict=True)):
                product(hidden, weight, tile, accumulate=index > 0)
            yield first_t, first_v, tile[: num_tokens - first_t]


def _even_rows(num_tokens: int, call: HeadCall) -> int:
    """Rows of a tile: even parts rather than a short last one, and as wide as memory allows."""
    block_t = call.config.block_t
    most = min(call.config.product_rows, call.product_bytes // (4 * call.config.block_v))
    parts = max(cdiv(num_tokens, max(most // block_t * block_t, block_t)), 1)
    return cdiv(num_tokens, parts * block_t) * block_t


def _padded(hidden: Tensor, rows: int) -> Tensor:
    missing = rows - hidden.shape[0]
    return torch.cat((hidden, hidden.new_zeros(missing, hidden.shape[1]))) if missing else hidden
