"""impl="torch": bounded memory on any device, by plain torch operations.

Logits exist as one tile at a time, in float32 whatever the inputs, and both gradients accumulate in
float32, so results do not depend on how the tokens were cut. Two orders of work (`schedule.plan`):

    gradient_in_forward   chunks of tokens with whole rows: logits, statistics and gradient follow
                          each other in the same memory; 3 products
    recompute             statistics first; then windows of the vocabulary, whose piece of the
                          weight's gradient is finished at once: 4 products, no [V, H] sum
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_fused_head.options import Needs, Operands, RowStats
from hf_fused_head.products import Gradients, Products
from hf_fused_head.run_record import note_schedule
from hf_fused_head.schedule import Schedule, plan
from hf_fused_head.tiles import (
    Scratch,
    Tally,
    exponentials,
    finish_gradient,
    row_gradient,
)
from hf_fused_head.workspace import block_bytes


def forward(
    operands: Operands,
    labels: Tensor,
    budget_bytes: int,
    want_smooth: bool,
    want_entropy: bool,
    want_correct: bool,
) -> RowStats:
    """Statistics of every row; the protocol is the one of `hf_fused_head.ops`."""
    schedule = _plan(operands, labels, None, want_entropy, False, budget_bytes)
    return _statistics(operands, labels, schedule, want_smooth, want_entropy, want_correct)


def forward_backward(
    operands: Operands,
    labels: Tensor,
    nll_weight: Tensor,
    smooth_weight: Tensor | None,
    z_weight: Tensor | None,
    needs: Needs,
    budget_bytes: int,
    want_entropy: bool,
    want_correct: bool,
    smoothing: float = 0.0,
) -> tuple[RowStats, list[Tensor]]:
    """Statistics, and the gradients of `sum_t a_t nll_t + b_t smooth_t + c_t lse_t^2`.

    Nothing is rounded before all terms are together, whatever the share of `smoothing`.
    """
    schedule = _plan(operands, labels, needs, want_entropy, False, budget_bytes)
    grads = Gradients(operands, needs, schedule, keep_half=True)
    if schedule.name == "gradient_in_forward":
        weights = (nll_weight, smooth_weight, z_weight)
        stats = _gradient_in_forward(
            operands, labels, weights, grads, schedule, want_entropy, want_correct
        )
        return stats, grads.results()
    want_smooth = smooth_weight is not None
    stats = _statistics(operands, labels, schedule, want_smooth, want_entropy, want_correct)
    g_lse = None if z_weight is None else 2 * z_weight * stats.lse
    _recompute(operands, labels, stats, (nll_weight, g_lse, smooth_weight, None), grads, schedule)
    return stats, grads.results()


def backward(
    operands: Operands,
    labels: Tensor,
    stats: RowStats,
    g_nll: Tensor,
    g_lse: Tensor,
    g_smooth: Tensor | None,
    g_entropy: Tensor | None,
    needs: Needs,
    budget_bytes: int,
) -> list[Tensor]:
    """The gradients of `sum_t g_nll nll + g_lse lse + g_smooth smooth + g_entropy entropy`."""
    schedule = _plan(operands, labels, needs, g_entropy is not None, True, budget_bytes)
    grads = Gradients(operands, needs, schedule, keep_half=False)
    _recompute(operands, labels, stats, (g_nll, g_lse, g_smooth, g_entropy), grads, schedule)
    return grads.results()


def _plan(
    operands: Operands,
    labels: Tensor,
    needs: Needs | None,
    entropy: bool,
    per_token: bool,
    budget_bytes: int,
) -> Schedule:
    sizes = [weight.shape[1] for weight in operands.weights]
    wanted = [False] * len(sizes) if needs is None else needs.weights
    schedule = plan(
        num_tokens=labels.shape[0],
        hidden_size=sum(sizes),
        vocab_size=operands.shard.largest(operands.num_rows),
        dtype=operands.weights[0].dtype,
        impl="torch",
        device_type=labels.device.type,
        grad_hidden=needs is not None and any(needs.inputs),
        grad_weight=needs is not None and (any(needs.weights) or needs.bias),
        per_token=per_token,
        memory_budget_mib=budget_bytes / 2**20,
        grad_columns=sum(size for size, want in zip(sizes, wanted, strict=True) if want),
        scratch_blocks=(operands.softcap is not None) + entropy,
    )
    note_schedule(schedule)
    return schedule


def _statistics(
    operands: Operands, labels: Tensor, schedule: Schedule, smooth: bool, entropy: bool, best: bool
) -> RowStats:
    """One pass over the whole head that keeps nothing but row statistics."""
    chunk, window = schedule.chunk_tokens, schedule.vocab_window
    vocab_size = operands.num_rows
    products = Products(operands, chunk, window)
    memory = products.empty(chunk * window)
    scratch = _scratch(memory, window)
    parts = []
    for rows in _slices(labels.shape[0], chunk):
        tally = Tally(operands, labels[rows], memory, smooth, entropy)
        for columns in _slices(vocab_size, window):
            tile = _tile(memory, rows, columns)
            products.logits(rows, columns, tile)
            for part in _blocks(tile, window):
                tally.absorb(tile[part], columns.start, scratch, part, best)
        parts.append(tally.finish(best)[0])
    return _joined(parts)


def _gradient_in_forward(
    operands: Operands,
    labels: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor | None],
    grads: Gradients,
    schedule: Schedule,
    want_entropy: bool,
    want_correct: bool,
) -> RowStats:
    """Chunks of tokens, each finished before the next: logits become their gradient in place."""
    chunk, window = schedule.chunk_tokens, schedule.vocab_window
    vocab_size = operands.num_rows
    products = Products(operands, chunk, window)
    memory = products.empty(chunk * vocab_size)
    scratch = _scratch(memory, vocab_size)
    nll_weight, smooth_weight, z_weight = grads.into_range(operands, *weights)
    windows = list(_slices(vocab_size, window))
    parts = []
    for rows in _slices(labels.shape[0], chunk):
        tile = _tile(memory, rows, slice(0, vocab_size))
        for columns in windows:
            products.logits(rows, columns, tile[:, columns])
        for part in _blocks(tile, operands.shard.largest(vocab_size)):
            here = slice(rows.start + part.start, rows.start + part.stop)
            tally = Tally(operands, labels[here], memory, smooth_weight is not None, want_entropy)
            exps = tally.absorb(tile[part], 0, scratch, slice(None), want_correct)
            stats, share = tally.finish(want_correct)
            parts.append(stats)
            g_lse = None if z_weight is None else 2 * z_weight[here] * stats.lse
            g_smooth = None if smooth_weight is None else smooth_weight[here]
            upstream = (nll_weight[here], g_lse, g_smooth, None)
            exact = stats._replace(correction=share)
            gradient = row_gradient(operands, labels[here], exact, *upstream)
            finish_gradient(tile[part], exps, gradient, operands, labels[here], 0, scratch)
            grads.add_bias(tile[part], slice(0, vocab_size), rows.start + part.start == 0)
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
    upstream: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    grads: Gradients,
    schedule: Schedule,
) -> None:
    """Windows of the vocabulary, each with all tokens: logits once more, then their gradient."""
    chunk, window = schedule.chunk_tokens, schedule.vocab_window
    vocab_size = operands.num_rows
    products = Products(operands, chunk, window)
    memory = products.empty(chunk * window)
    scratch = _scratch(memory, window)
    g_nll, *others = grads.into_range(operands, *upstream)
    gradient = row_gradient(operands, labels, stats, g_nll, *others)
    for columns in _slices(vocab_size, window):
        for rows in _slices(labels.shape[0], chunk):
            tile = _tile(memory, rows, columns)
            products.logits(rows, columns, tile)
            for part in _blocks(tile, window):
                here = slice(rows.start + part.start, rows.start + part.stop)
                block, first = tile[part], columns.start
                exps = exponentials(block, stats.lse[here], operands.softcap, scratch)
                part_gradient = gradient.rows(here)
                finish_gradient(block, exps, part_gradient, operands, labels[here], first, scratch)
                grads.add_bias(block, columns, here.start == 0)
            grads.add(products, rows, columns, tile)
        grads.settle_weight(columns)
    grads.settle_rest()


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _tile(memory: Tensor, rows: slice, columns: slice) -> Tensor:
    """The start of `memory` as a contiguous tile."""
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    return memory[: shape[0] * shape[1]].view(shape)


def _blocks(tile: Tensor, columns: int) -> Iterator[slice]:
    """Rows of a tile that are worked on together, as many as of one with so many columns."""
    row_bytes = columns * tile.element_size()
    return _slices(tile.shape[0], max(1, block_bytes(tile.device.type) // row_bytes))


def _scratch(memory: Tensor, columns: int) -> Scratch:
    rows = max(1, block_bytes(memory.device.type) // (columns * memory.element_size()))
    return Scratch(min(memory.numel(), rows * columns), memory)


def _joined(parts: list[RowStats]) -> RowStats:
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return RowStats(*(torch.cat([t for t in column if t is not None]) for column in columns))
