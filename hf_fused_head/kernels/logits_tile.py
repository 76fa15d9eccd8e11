"""Any card: what the loss makes of a tile of logits whose product the vendor's library has made.

The library's kernel writes a tile of the product to float32 memory, this one reads it once: the
smaller the tile, the more of it is still in the L2 cache. No line here depends on the card; the
epilogue is that of the kernels with a product of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fused_head.kernels.arguments import (
    Launch,
    LogitOptions,
    StoredTile,
    options_of,
    stored_tile,
)
from hf_fused_head.kernels.epilogue import finish_tile
from hf_fused_head.kernels.operands import Head, RowFactors, RowSums
from hf_fused_head.kernels.tuning import TileConfig, cdiv

_VARYING = ["first_t", "first_v", "num_tokens", "local_vocab_size", "vocab_start"]


@triton.jit(do_not_specialize=_VARYING)
def _logits_tile_kernel(
    product,
    store,
    labels_ptr,
    anchor_ptr,
    sums,
    gradient,
    skip_ptr,
    logit_options,
    first_t,
    first_v,
    num_tokens,
    local_vocab_size,
    vocab_start,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Program (j, i) owns row block i and column block j of the product.

    Writes their row sums or, with `gradient`, none; and what `epilogue` makes of them, if there is
    a store.
    """
    # Nested, since an absent pointer cannot be loaded from, also not behind `and`.
    if skip_ptr is not None:  # noqa: SIM102
        if tl.load(skip_ptr) != 0:
            return
    sums, gradient = RowSums(*sums), RowFactors(*gradient)
    launch = Launch(
        num_tokens,
        local_vocab_size,
        labels_ptr,
        anchor_ptr if gradient.lse is None else gradient.lse,
        vocab_start,
        LogitOptions(*logit_options),
        sums,
        gradient,
    )
    product = StoredTile(*product)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_t = first_t + rows
    offs_v = first_v + columns
    inside = (offs_t < num_tokens)[:, None] & (offs_v < local_vocab_size)[None, :]
    places = rows.to(tl.int64)[:, None] * product.stride_t + columns[None, :]
    acc = tl.load(product.ptr + places, mask=inside, other=0.0)
    tile = finish_tile(acc, launch, offs_t, offs_v, first_v + tl.program_id(0) * BLOCK_V, EXACT)
    if store is not None:
        store = StoredTile(*store)
        places = offs_t.to(tl.int64)[:, None] * store.stride_t + offs_v[None, :]
        tl.store(store.ptr + places, tile.to(store.ptr.dtype.element_ty), mask=inside)


class TilePass:
    """One pass over `hidden @ weight.T` in tiles: row sums, and maybe exponents or gradients.

    Its launches differ in the place of their tile alone, so that all but the first skip what Triton
    finds out about the arguments: the host must not be slower than the library's products.

    Args:
        head: The head, or a window of it that starts at `vocab_start`.
        labels: [T] int64, contiguous, see `launch_exponents`.
        vocab_start: First row of the window in this rank's shard.
        anchor: [T] float32, contiguous; None with row factors.
        sums: Row sums of the window's tiles, `ceil(window / config.block_v)` of them, of which each
            launch writes its own. Only `target` has to be zeroed.
        gradient: The row factors, contiguous; all None for exponents.
        store: [T, window], unit stride along V, of which each launch writes its tile; None to
            store nothing.
        config: The block of a program.
        skip: One int32 on the device; where it is not 0 nothing is done and nothing written.
    """

    def __init__(
        self,
        head: Head,
        labels: Tensor,
        vocab_start: int,
        anchor: Tensor | None,
        sums: RowSums,
        gradient: RowFactors,
        store: Tensor | None,
        config: TileConfig,
        skip: Tensor | None,
    ) -> None:
        self._config = config
        records = (tuple(sums), tuple(gradient), skip, options_of(head))
        self._first = (stored_tile(store), labels, anchor, *records)
        exact = head.hidden.dtype == torch.float32
        sizes = (head.hidden.shape[0], head.weight.shape[0], vocab_start)
        self._last = (*sizes, config.block_t, config.block_v, exact)
        self._compiled: Any = None

    def launch(self, product: Tensor, first_t: int, first_v: int) -> None:
        """Launches one tile.

        Args:
            product: [rows, columns] float32, unit stride along the columns: the head's product from
                row `first_t` and column `first_v` on, without bias, scale and softcap. Every tile
                of a pass begins at the same address and has the same stride.
            first_t: First row of the tile, a multiple of `config.block_t`.
            first_v: First column of the tile in the window, a multiple of `config.block_v`.
        """
        config, (num_rows, num_columns) = self._config, product.shape
        grid = (cdiv(num_columns, config.block_v), cdiv(num_rows, config.block_t), 1)
        arguments = (stored_tile(product), *self._first, first_t, first_v, *self._last)
        if self._compiled is None:
            # None in the interpreter, which compiles nothing.
            kernel = _logits_tile_kernel[grid]
            self._compiled = kernel(*arguments, num_warps=config.num_warps)
        else:
            self._compiled[grid](*arguments)
