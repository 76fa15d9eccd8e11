"""The bytes that a step takes, for each engine and schedule. Integers only, no device."""

from __future__ import annotations

from typing import NamedTuple

from hf_fused_head.planning.problem import Problem

# Row sums of the "triton" engine: float32, one for each tile of this many columns, up to four kinds
# for a loss and a fifth, of squares, for log-probabilities. It makes the statistics of fewer rows
# at once rather than hold more than this.
_SUM_COLUMNS = 128
_SUM_KINDS = 4
_SUM_BYTES = 4 * _SUM_KINDS
TRITON_SUMS_BYTES = 32 * 2**20
# Per-row vectors of the "triton" engine.
_ROW_BYTES = 64


class Tile(NamedTuple):
    """The tile of a schedule: tokens, columns, and the share of the exponents that is kept."""

    chunk_tokens: int
    vocab_window: int
    kept_share: float = 0.0


def workspace_bytes(problem: Problem, name: str, tile: Tile, late: bool = False) -> int:
    """Bytes beyond inputs, outputs and gradients in their own dtype.

    Args:
        problem: What is computed.
        name: The schedule.
        tile: Its tile.
        late: Whether a head's gradient that is summed over chunks has no memory until the tile is
            freed, and is rounded then ("triton").
    """
    if problem.impl == "reference":
        # Logits, probabilities, their gradient and two intermediates; operands in float32.
        operands = (problem.num_tokens + problem.vocab_size) * problem.hidden_size
        logits = problem.num_tokens * problem.vocab_size
        return (5 * logits + 2 * operands) * problem.sum_bytes
    if problem.impl == "triton":
        return problem.product_bytes + _triton_bytes(problem, name, tile, late)
    return _torch_bytes(problem, name, tile)


def _torch_bytes(problem: Problem, name: str, tile: Tile) -> int:
    """What the torch engine allocates: tile, scratch blocks, conversions and sums."""
    chunk, window, _ = tile
    wide = problem.sum_bytes
    whole = name == "gradient_in_forward"
    columns = problem.vocab_size if whole else window
    logits = chunk * columns * wide
    row = columns * wide
    scratch = min(logits, max(row, problem.card.block_bytes // row * row))
    # A tile, scratch blocks, and vectors per token and per column.
    vectors = 32 * problem.num_tokens + 4 * problem.vocab_size
    total = logits + problem.scratch_blocks * scratch + vectors * wide
    if problem.item_bytes == wide:
        return total
    total += (window + chunk) * problem.hidden_size * wide
    total += chunk * window * problem.item_bytes
    if problem.grad_hidden:
        rows = chunk if whole else problem.num_tokens
        total += rows * problem.hidden_size * wide
    rows = problem.vocab_size if whole and chunk < problem.num_tokens else window
    return total + _weight_sum_bytes(problem, rows, name)


def _triton_bytes(problem: Problem, name: str, tile: Tile, late: bool) -> int:
    """What the Triton engine allocates: stored exponents or a window, row sums, float32 sums.

    Products that the library makes come on top.
    """
    chunk, window, kept = tile
    item, wide = problem.item_bytes, problem.sum_bytes
    sums = chunk * -(-problem.vocab_size // _SUM_COLUMNS) * _SUM_BYTES
    most = TRITON_SUMS_BYTES
    if name == "gradient_in_forward":
        # One kind of all rows of a chunk, a 64th of its tile.
        most = max(most, sums // _SUM_KINDS)
    sums = min(sums, most)
    chunked = name == "gradient_in_forward" and chunk < problem.num_tokens
    weight = problem.vocab_size * problem.weight_columns * item
    # They use the memory of the head's gradient until that is written. With chunks of tokens it
    # holds sums, or has no memory yet.
    if sums <= weight and not chunked:
        sums = 0
    rows = problem.num_tokens * _ROW_BYTES
    if name == "loss_only":
        return sums + rows
    sums_hidden = problem.sums_hidden and problem.grad_hidden
    # Scaled hidden states use the memory of their gradient, where there is one and no rank shares
    # it; not with the rows that smoothing appends to them.
    in_place = problem.grad_hidden and not (problem.smoothing or sums_hidden)
    scaled = 0 if in_place else chunk * problem.hidden_size * item
    if sums_hidden and item != wide and name == "gradient_in_forward":
        scaled += chunk * problem.hidden_size * wide
    if name == "gradient_in_forward":
        total = _weight_sum_bytes(problem, problem.vocab_size if chunked else 0, name)
        made = chunk * problem.vocab_size * item + sums + scaled
        if late and chunked and total and not problem.widened:
            made = max(made - weight, 0)
        return made + total + rows
    columns = max(window, round(kept * problem.vocab_size))
    hidden = 0
    several = columns < problem.vocab_size or sums_hidden
    if problem.grad_hidden and item != wide and several:
        hidden = problem.num_tokens * problem.hidden_size * wide
    # The sums of the statistics are freed before the sums of the gradients are made.
    total = chunk * columns * item + max(sums, hidden) + rows + _weight_sum_bytes(problem, 0, name)
    return total + (scaled if name == "hybrid" else 0)


def _weight_sum_bytes(problem: Problem, rows: int, name: str) -> int:
    """Bytes of the float32 sum in which `rows` of the head's gradient accumulate."""
    if problem.item_bytes == problem.sum_bytes or not problem.grad_weight:
        return 0
    if problem.widened and name != "loss_only":
        # float16 gradients leave the forward in float32: twice what they come back in.
        return problem.vocab_size * problem.weight_columns * problem.sum_bytes
    return rows * problem.weight_columns * problem.sum_bytes
