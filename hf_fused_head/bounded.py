"""impl="torch": bounded memory on any device, by plain torch operations.

Logits exist as one tile at a time, in float32 whatever the inputs, and both gradients accumulate in
float32, so results do not depend on how the tokens were cut. Two orders of work (`schedule.plan`):

    gradient_in_forward   chunks of tokens with whole rows: logits, statistics and gradient follow
                          each other in the same memory; 3 products
    recompute             statistics first; then windows of the vocabulary, whose piece of the
                          weight's gradient is finished at once: 4 products, no [V, H] sum

Where a device multiplies bfloat16 into float32 (CUDA), the products take the operands as they are;
elsewhere pieces of them are converted to float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_fused_head.options import Needs, Operands, RowStats, accumulation_dtype
from hf_fused_head.schedule import Schedule, block_bytes, plan
from hf_fused_head.tiles import (
    Scratch,
    Tally,
    exponentials,
    finish_gradient,
    row_gradient,
)

# float16 gradients of logits are stored with the largest row factor near this number.
_HALF_PEAK = 64.0


def forward(
    operands: Operands,
    labels: Tensor,
    budget_bytes: int,
    want_smooth: bool,
    want_entropy: bool,
    want_correct: bool,
) -> RowStats:
    """Statistics of every row; the protocol is the one of `hf_fused_head.ops`."""
    schedule = _plan(operands, labels, None, False, budget_bytes)
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
) -> tuple[RowStats, list[Tensor]]:
    """Statistics, and the gradients of `sum_t a_t nll_t + b_t smooth_t + c_t lse_t^2`."""
    schedule = _plan(operands, labels, needs, False, budget_bytes)
    grads = _Gradients(operands, needs, schedule, keep_half=True)
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
    schedule = _plan(operands, labels, needs, True, budget_bytes)
    grads = _Gradients(operands, needs, schedule, keep_half=False)
    _recompute(operands, labels, stats, (g_nll, g_lse, g_smooth, g_entropy), grads, schedule)
    return grads.results()


def _plan(
    operands: Operands, labels: Tensor, needs: Needs | None, per_token: bool, budget_bytes: int
) -> Schedule:
    sizes = [weight.shape[1] for weight in operands.weights]
    wanted = [False] * len(sizes) if needs is None else needs.weights
    return plan(
        num_tokens=labels.shape[0],
        hidden_size=sum(sizes),
        vocab_size=operands.weights[0].shape[0],
        dtype=operands.weights[0].dtype,
        impl="torch",
        device_type=labels.device.type,
        grad_hidden=needs is not None and any(needs.inputs),
        grad_weight=needs is not None and (any(needs.weights) or needs.bias),
        per_token=per_token,
        memory_budget_mib=budget_bytes / 2**20,
        grad_columns=sum(size for size, want in zip(sizes, wanted, strict=True) if want),
    )


def _statistics(
    operands: Operands, labels: Tensor, schedule: Schedule, smooth: bool, entropy: bool, best: bool
) -> RowStats:
    """One pass over the whole head that keeps nothing but row statistics."""
    chunk, window = schedule.chunk_tokens, schedule.vocab_window
    vocab_size = operands.weights[0].shape[0]
    products = _Products(operands, chunk, window)
    memory = products.empty(chunk * window)
    scratch = _scratch(memory, window)
    parts = []
    for rows in _slices(labels.shape[0], chunk):
        tally = Tally(operands, labels[rows], memory, smooth, entropy)
        for columns in _slices(vocab_size, window):
            tile = _tile(memory, rows, columns)
            products.logits(rows, columns, tile)
            for part in _blocks(tile):
                tally.absorb(tile[part], columns.start, scratch, part, best)
        parts.append(tally.finish(best))
    return _joined(parts)


def _gradient_in_forward(
    operands: Operands,
    labels: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor | None],
    grads: _Gradients,
    schedule: Schedule,
    want_entropy: bool,
    want_correct: bool,
) -> RowStats:
    """Chunks of tokens, each finished before the next: logits become their gradient in place."""
    chunk, window = schedule.chunk_tokens, schedule.vocab_window
    vocab_size = operands.weights[0].shape[0]
    products = _Products(operands, chunk, window)
    memory = products.empty(chunk * vocab_size)
    scratch = _scratch(memory, vocab_size)
    nll_weight, smooth_weight, z_weight = grads.into_range(operands, *weights)
    windows = list(_slices(vocab_size, window))
    parts = []
    for rows in _slices(labels.shape[0], chunk):
        tile = _tile(memory, rows, slice(0, vocab_size))
        for columns in windows:
            products.logits(rows, columns, tile[:, columns])
        for part in _blocks(tile):
            here = slice(rows.start + part.start, rows.start + part.stop)
            tally = Tally(operands, labels[here], memory, smooth_weight is not None, want_entropy)
            exps = tally.absorb(tile[part], 0, scratch, slice(None), want_correct)
            stats = tally.finish(want_correct)
            parts.append(stats)
            g_lse = None if z_weight is None else 2 * z_weight[here] * stats.lse
            g_smooth = None if smooth_weight is None else smooth_weight[here]
            upstream = (nll_weight[here], g_lse, g_smooth, None)
            gradient = row_gradient(operands, labels[here], stats, *upstream)
            gradient = gradient._replace(factor=gradient.factor / tally.total())
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
    grads: _Gradients,
    schedule: Schedule,
) -> None:
    """Windows of the vocabulary, each with all tokens: logits once more, then their gradient."""
    chunk, window = schedule.chunk_tokens, schedule.vocab_window
    vocab_size = operands.weights[0].shape[0]
    products = _Products(operands, chunk, window)
    memory = products.empty(chunk * window)
    scratch = _scratch(memory, window)
    g_nll, *others = grads.into_range(operands, *upstream)
    gradient = row_gradient(operands, labels, stats, g_nll, *others)
    for columns in _slices(vocab_size, window):
        for rows in _slices(labels.shape[0], chunk):
            tile = _tile(memory, rows, columns)
            products.logits(rows, columns, tile)
            for part in _blocks(tile):
                here = slice(rows.start + part.start, rows.start + part.stop)
                block, first = tile[part], columns.start
                exps = exponentials(block, stats.lse[here], operands.softcap, scratch)
                part_gradient = gradient.rows(here)
                finish_gradient(block, exps, part_gradient, operands, labels[here], first, scratch)
                grads.add_bias(block, columns, here.start == 0)
            grads.add(products, rows, columns, tile)
        grads.settle_weight(columns)
    grads.settle_rest()


class _Products:
    """The products of a head with tiles of its logits, in the precision of the statistics."""

    def __init__(self, operands: Operands, chunk: int, window: int) -> None:
        self.operands = operands
        first = operands.inputs[0]
        self.dtype = accumulation_dtype(first.dtype)
        self.device = first.device
        self.native = first.dtype == self.dtype or multiplies_into_float32(first)
        bias = operands.bias
        self.bias = None if bias is None else bias.to(self.dtype)
        # Where operands are converted: memory for a piece of each, and which piece it holds.
        self.pieces: dict[tuple[str, int], Tensor] = {}
        self.held: dict[tuple[str, int], slice] = {}
        self.sizes = {"inputs": chunk, "weights": window}
        self.narrow_memory: Tensor | None = None
        self.narrow_size = chunk * window

    def empty(self, elements: int) -> Tensor:
        """Memory in the dtype of the statistics."""
        return torch.empty(elements, dtype=self.dtype, device=self.device)

    def logits(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Writes scale * (X W^T + bias), divided by the softcap where there is one."""
        operands = self.operands
        alpha = operands.logit_scale / (1.0 if operands.softcap is None else operands.softcap)
        for index in range(len(operands.inputs)):
            hidden = self.piece("inputs", index, rows)
            weight = self.piece("weights", index, columns)
            if index == 0 and self.bias is not None:
                out.copy_(self.bias[columns].expand_as(out))
                multiply(hidden, weight.t(), out, alpha=alpha, beta=alpha)
            else:
                multiply(hidden, weight.t(), out, alpha=alpha, beta=float(index > 0))

    def piece(self, kind: str, index: int, part: slice) -> Tensor:
        """Some rows of an operand, in a dtype that `multiply` takes."""
        source = getattr(self.operands, kind)[index]
        if self.native:
            return source[part]
        key = (kind, index)
        if key not in self.pieces:
            rows = min(self.sizes[kind], source.shape[0])
            self.pieces[key] = self.empty(rows * source.shape[1]).view(rows, source.shape[1])
        piece = self.pieces[key][: part.stop - part.start]
        if self.held.get(key) != part:
            piece.copy_(source[part])
            self.held[key] = part
        return piece

    def narrowed(self, tile: Tensor) -> Tensor:
        """The tile in the dtype of the operands, if the products take them as they are."""
        dtype = self.operands.inputs[0].dtype
        if not self.native or dtype == self.dtype:
            return tile
        if self.narrow_memory is None:
            self.narrow_memory = torch.empty(self.narrow_size, dtype=dtype, device=self.device)
        narrow = self.narrow_memory[: tile.numel()].view(tile.shape)
        return narrow.copy_(tile)


class _Sum:
    """One gradient while it accumulates, in float32 beside the result where that is narrower."""

    def __init__(self, result: Tensor, dtype: torch.dtype, num_rows: int) -> None:
        """Accumulates into `result`, or beside it in `num_rows` rows of `dtype`."""
        self.result = result
        self.memory: Tensor | None = None
        if result.dtype != dtype:
            shape = (min(num_rows, result.shape[0]), *result.shape[1:])
            self.memory = torch.empty(shape, dtype=dtype, device=result.device)

    def slot(self, part: slice) -> Tensor:
        """Where some rows accumulate."""
        if self.memory is None:
            return self.result[part]
        if len(self.memory) == len(self.result):
            return self.memory[part]
        return self.memory[: part.stop - part.start]

    def settle(self, part: slice, unscale: Tensor | None) -> None:
        """Finishes some rows; once for each."""
        slot = self.slot(part)
        if unscale is not None:
            slot.mul_(unscale)
        if self.memory is not None:
            self.result[part].copy_(slot)


class _Gradients:
    """The gradients of a call: where they accumulate, and when they are finished."""

    def __init__(
        self, operands: Operands, needs: Needs, schedule: Schedule, keep_half: bool
    ) -> None:
        first = operands.inputs[0]
        dtype = accumulation_dtype(first.dtype)
        widen = keep_half and first.dtype == torch.float16
        result_dtype = torch.float32 if widen else first.dtype
        whole_rows = schedule.name == "gradient_in_forward"
        num_tokens, vocab_size = first.shape[0], operands.weights[0].shape[0]
        # One chunk, or windows outermost: a piece of the weight's gradient is finished at once.
        self.by_window = not whole_rows or schedule.chunk_tokens >= num_tokens
        hidden_rows = schedule.chunk_tokens if whole_rows else num_tokens
        weight_rows = schedule.vocab_window if self.by_window else vocab_size

        def sums(tensors: list[Tensor], wanted: list[bool], rows: int) -> list[_Sum | None]:
            return [
                _Sum(torch.empty(t.shape, dtype=result_dtype, device=t.device), dtype, rows)
                if want
                else None
                for t, want in zip(tensors, wanted, strict=True)
            ]

        self.hidden = sums(operands.inputs, needs.inputs, hidden_rows)
        self.weight = sums(operands.weights, needs.weights, weight_rows)
        bias = [] if operands.bias is None else [operands.bias]
        self.bias = (sums(bias, [needs.bias] * len(bias), vocab_size) or [None])[0]
        self.all_tokens, self.all_columns = slice(0, num_tokens), slice(0, vocab_size)
        self.hidden_settled = self.weight_settled = False
        self.empty = torch.empty(0, dtype=result_dtype, device=first.device)
        self.unscale: Tensor | None = None

    def into_range(self, operands: Operands, *upstream: Tensor | None) -> list[Tensor | None]:
        """Row weights as they are, or scaled so that products in float16 keep small ones."""
        first = operands.inputs[0]
        if first.dtype != torch.float16 or not multiplies_into_float32(first):
            return list(upstream)
        peak = sum(value.abs().amax() for value in upstream if value is not None)
        scale = _HALF_PEAK / torch.as_tensor(peak).clamp_min(torch.finfo(torch.float32).tiny)
        self.unscale = 1 / scale
        return [None if value is None else value * scale for value in upstream]

    def add(self, products: _Products, rows: slice, columns: slice, tile: Tensor) -> None:
        """Adds what a tile of the logits' gradient contributes to hidden states and weights."""
        tile = products.narrowed(tile)
        for index, total in enumerate(self.hidden):
            if total is not None:
                weight = products.piece("weights", index, columns)
                multiply(tile, weight, total.slot(rows), beta=float(columns.start > 0))
        for index, total in enumerate(self.weight):
            if total is not None:
                hidden = products.piece("inputs", index, rows)
                multiply(tile.t(), hidden, total.slot(columns), beta=float(rows.start > 0))

    def add_bias(self, block: Tensor, columns: slice, is_first: bool) -> None:
        """Adds some rows of the logits' gradient to the gradient of the bias."""
        if self.bias is None:
            return
        slot = self.bias.slot(columns)
        slot.copy_(block.sum(dim=0)) if is_first else slot.add_(block.sum(dim=0))

    def settle_hidden(self, rows: slice) -> None:
        """Finishes the hidden states' gradient of some tokens."""
        self.hidden_settled = True
        for total in self.hidden:
            if total is not None:
                total.settle(rows, self.unscale)

    def settle_weight(self, columns: slice) -> None:
        """Finishes the weights' gradient of some columns."""
        self.weight_settled = True
        for total in self.weight:
            if total is not None:
                total.settle(columns, self.unscale)

    def settle_rest(self) -> None:
        """Finishes what was not finished piece by piece."""
        if not self.hidden_settled:
            self.settle_hidden(self.all_tokens)
        if not self.weight_settled:
            self.settle_weight(self.all_columns)
        if self.bias is not None:
            self.bias.settle(self.all_columns, self.unscale)

    def results(self) -> list[Tensor]:
        """Gradients of inputs, weights and bias; empty where nobody needs one."""
        sums = [*self.hidden, *self.weight, self.bias]
        return [torch.empty_like(self.empty) if s is None else s.result for s in sums]


def multiplies_into_float32(tensor: Tensor) -> bool:
    """Whether products of such 16-bit tensors can have float32 results."""
    if tensor.device.type != "cuda" or tensor.dtype not in (torch.float16, torch.bfloat16):
        return False
    return hasattr(torch.ops.aten.addmm, "dtype_out")


def multiply(
    left: Tensor, right: Tensor, out: Tensor, alpha: float = 1.0, beta: float = 0.0
) -> None:
    """`out = alpha * left @ right + beta * out`, summed in the dtype of `out`."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, alpha=alpha, beta=beta, out=out)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, alpha=alpha, beta=beta, out=out)


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _tile(memory: Tensor, rows: slice, columns: slice) -> Tensor:
    """The start of `memory` as a contiguous tile."""
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    return memory[: shape[0] * shape[1]].view(shape)


def _blocks(tile: Tensor) -> Iterator[slice]:
    """Rows of a tile that are worked on together."""
    row_bytes = tile.shape[1] * tile.element_size()
    return _slices(tile.shape[0], max(1, block_bytes(tile.device.type) // row_bytes))


def _scratch(memory: Tensor, columns: int) -> Scratch:
    rows = max(1, block_bytes(memory.device.type) // (columns * memory.element_size()))
    return Scratch(min(memory.numel(), rows * columns), memory)


def _joined(parts: list[RowStats]) -> RowStats:
    if len(parts) == 1:
        return parts[0]
    return RowStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
