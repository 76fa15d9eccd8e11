"""How the torch engine cuts its work: ranges, tiles in reused memory, and blocks of a tile."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from hf_fused_head.engines.torch_engine.tiles import Scratch
from hf_fused_head.planning.cards import card_of_type


def slices(total: int, step: int) -> Iterator[slice]:
    """Ranges of `step` that cover `total`, the last one shorter."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def tile_of(memory: Tensor, rows: slice, columns: slice) -> Tensor:
    """The start of `memory` as a contiguous tile."""
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    return memory[: shape[0] * shape[1]].view(shape)


def blocks_of(tile: Tensor, columns: int) -> Iterator[slice]:
    """Rows of a tile that are worked on together, as many as of one with so many columns."""
    row_bytes = columns * tile.element_size()
    size = card_of_type(tile.device.type).block_bytes
    return slices(tile.shape[0], max(1, size // row_bytes))


def scratch_beside(memory: Tensor, columns: int) -> Scratch:
    """Memory for blocks of a tile with so many columns in `memory`."""
    size = card_of_type(memory.device.type).block_bytes
    rows = max(1, size // (columns * memory.element_size()))
    return Scratch(min(memory.numel(), rows * columns), memory)
