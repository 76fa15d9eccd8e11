"""impl="torch": bounded memory on any device, by plain torch operations.

Logits exist as one tile at a time, in float32 whatever the inputs, and both gradients accumulate in
float32, so results do not depend on the chunks of tokens. Two orders of work (`schedule.plan`):

    gradient_in_forward   chunks of tokens with whole rows: logits, statistics and gradient follow
                          each other in the same memory; 3 products
    recompute             statistics first; then windows of the vocabulary, whose piece of the
                          weight's gradient is finished at once: 4 products, no [V, H] sum
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fused_head.engines.protocol import Needs, Operands, Speculation
from hf_fused_head.engines.torch_engine.cuts import (
    blocks_of,
    scratch_beside,
    slices,
    tile_of,
)
from hf_fused_head.engines.torch_engine.products import Gradients, Products
from hf_fused_head.engines.torch_engine.tiles import (
    RowStatistics,
    exponentials,
    finish_gradient,
)
from hf_fused_head.objective import RowStats, RowWeights, Upstream, Wanted, row_gradient
from hf_fused_head.planning.schedule import Schedule


def speculate(*_: object) -> None:
    """Nothing to gain: this engine waits for the host."""


def row_stats(
    operands: Operands,
    labels: Tensor,
    wanted: Wanted,
    schedule: Schedule,
    speculation: Speculation | None = None,
) -> RowStats:
    """See `Engine.row_stats`: one pass over the whole head that keeps only row statistics."""
    chunk, num_tokens = schedule.chunk_tokens, labels.shape[0]
    whole = num_tokens // chunk * chunk if schedule.tile_tokens else num_tokens
    parts = _row_stats(operands.rows(slice(0, whole)), labels[:whole], wanted, schedule)
    if whole < num_tokens:
        rest = _padded(operands.rows(slice(whole, num_tokens)), labels[whole:], chunk)
        padded = _row_stats(*rest, wanted, schedule)
        parts += [RowStats(*(t[: num_tokens - whole] for t in part)) for part in padded]  # type: ignore[index]
    return _joined(parts)


def _padded(operands: Operands, labels: Tensor, num_rows: int) -> tuple[Operands, Tensor]:
    """With more rows, whose results do not count.

    A product's order of summation depends on its shape: one shape for all tiles gives a row the
    same bits in every batch.
    """
    missing = num_rows - labels.shape[0]

    def longer(tensor: Tensor) -> Tensor:
        return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:])))

    scale = None if operands.row_scale is None else longer(operands.row_scale)
    inputs = [longer(hidden) for hidden in operands.inputs]
    return operands._replace(inputs=inputs, row_scale=scale), longer(labels)


def _row_stats(
    operands: Operands, labels: Tensor, wanted: Wanted, schedule: Schedule
) -> list[RowStats]:
    """The statistics of all rows, chunk by chunk."""
    chunk, window = schedule.chunk_tokens, schedule.vocab_window
    local_vocab_size = operands.local_vocab_size
    products = Products(operands, chunk, window)
    memory = products.empty(chunk * window)
    scratch = scratch_beside(memory, window)
    parts = []
    for rows in slices(labels.shape[0], chunk):
        statistics = RowStatistics(operands.rows(rows), labels[rows], memory, wanted)
        for columns in slices(local_vocab_size, window):
            tile = tile_of(memory, rows, columns)
            products.logits(rows, columns, tile)
            for part in blocks_of(tile, window):
                statistics.update(tile[part], columns.start, scratch, part)
        parts.append(statistics.finish()[0])
    return parts


def stats_and_grads(
    operands: Operands,
    labels: Tensor,
    weights: RowWeights,
    needs: Needs,
    wanted: Wanted,
    schedule: Schedule,
    speculation: Speculation | None = None,
) -> tuple[RowStats, list[Tensor]]:
    """See `Engine.stats_and_grads`."""
    wanted = wanted._replace(smooth=weights.smooth is not None)
    grads = Gradients(operands, needs, schedule, keep_half=True)
    if schedule.name == "gradient_in_forward":
        stats = _gradient_in_forward(operands, labels, weights, grads, schedule, wanted)
    else:
        stats = row_stats(operands, labels, wanted, schedule)
        _recompute(operands, labels, stats, weights.upstream(stats.lse), grads, schedule)
    return stats, grads.results()


def row_grads(
    operands: Operands,
    labels: Tensor,
    stats: RowStats,
    upstream: Upstream,
    needs: Needs,
    schedule: Schedule,
) -> list[Tensor]:
    """See `Engine.row_grads`."""
    grads = Gradients(operands, needs, schedule, keep_half=False)
    _recompute(operands, labels, stats, upstream, grads, schedule)
    return grads.results()


def _gradient_in_forward(
    operands: Operands,
    labels: Tensor,
    weights: RowWeights,
    grads: Gradients,
    schedule: Schedule,
    wanted: Wanted,
) -> RowStats:
    """Chunks of tokens, each finished before the next: logits become their gradient in place."""
    chunk, window = schedule.chunk_tokens, schedule.vocab_window
    local_vocab_size = operands.local_vocab_size
    products = Products(operands, chunk, window)
    memory = products.empty(chunk * local_vocab_size)
    scratch = scratch_beside(memory, local_vocab_size)
    weights = RowWeights(*grads.into_range(operands, *weights))
    windows = list(slices(local_vocab_size, window))
    parts = []
    for rows in slices(labels.shape[0], chunk):
        tile = tile_of(memory, rows, slice(0, local_vocab_size))
        for columns in windows:
            products.logits(rows, columns, tile[:, columns])
        for part in blocks_of(tile, operands.shard.largest(local_vocab_size)):
            here = slice(rows.start + part.start, rows.start + part.stop)
            part_operands = operands.rows(here)
            statistics = RowStatistics(part_operands, labels[here], memory, wanted)
            exps = statistics.update(tile[part], 0, scratch, slice(None))
            stats, share = statistics.finish()
            parts.append(stats)
            gradient = row_gradient(
                stats._replace(correction=share),
                weights.rows(here).upstream(stats.lse),
                operands.vocab_size,
                operands.class_weight,
            ).scaled(part_operands.slope)
            finish_gradient(
                tile[part], exps, gradient, stats.entropy, operands, labels[here], 0, scratch
            )
            grads.add_bias(tile[part], slice(0, local_vocab_size), rows.start + part.start == 0)
        for columns in windows:
            grads.add(products, rows, columns, tile[:, columns])
            if grads.by_window:
                grads.settle_weight(columns)
        grads.settle_hidden(rows)
    grads.settle_rest()
    return _joined(parts)


def _recompute(
    operands: Operands,
    labels: Tensor,
    stats: RowStats,
    upstream: Upstream,
    grads: Gradients,
    schedule: Schedule,
) -> None:
    """Windows of the vocabulary, each with all tokens: logits once more, then their gradient."""
    chunk, window = schedule.chunk_tokens, schedule.vocab_window
    products = Products(operands, chunk, window)
    memory = products.empty(chunk * window)
    scratch = scratch_beside(memory, window)
    upstream = Upstream(*grads.into_range(operands, *upstream))
    gradient = row_gradient(stats, upstream, operands.vocab_size, operands.class_weight)
    gradient = gradient.scaled(operands.slope)
    for columns in slices(operands.local_vocab_size, window):
        for rows in slices(labels.shape[0], chunk):
            tile = tile_of(memory, rows, columns)
            products.logits(rows, columns, tile)
            for part in blocks_of(tile, window):
                here = slice(rows.start + part.start, rows.start + part.stop)
                block, entropy = tile[part], stats.entropy[here]
                exps = exponentials(block, stats.lse[here], operands, here, scratch)
                part_gradient = gradient.rows(here)
                place = (labels[here], columns.start, scratch)
                finish_gradient(block, exps, part_gradient, entropy, operands, *place)
                grads.add_bias(block, columns, here.start == 0)
            grads.add(products, rows, columns, tile)
        grads.settle_weight(columns)
    grads.settle_rest()


def _joined(parts: list[RowStats]) -> RowStats:
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return RowStats(*(torch.cat([t for t in column if t is not None]) for column in columns))
