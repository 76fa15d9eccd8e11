"""The three products of a head with tiles of its logits, and the sums in which gradients grow.

float32 sums whatever the operands: where a device multiplies 16-bit matrices into float32 (CUDA),
the products take the operands as they are; elsewhere pieces of them are converted to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_fused_head.engines.protocol import Needs, Operands
from hf_fused_head.options import accumulation_dtype
from hf_fused_head.planning.schedule import Schedule

# float16 gradients of logits are stored with the largest row factor near this number.
_HALF_PEAK = 64.0


class Products:
    """The products of a head with tiles of its logits, in the precision of the statistics.

    That is `accumulation_dtype` of the operands, unless a wider one is given.
    """

    def __init__(
        self, operands: Operands, chunk: int, window: int, dtype: torch.dtype | None = None
    ) -> None:
        self.operands = operands
        first = operands.inputs[0]
        self.dtype = accumulation_dtype(first.dtype) if dtype is None else dtype
        self.device = first.device
        into_float32 = self.dtype == torch.float32 and multiplies_into_float32(first)
        self.native = first.dtype == self.dtype or into_float32
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

    def __init__(self, result: Tensor, dtype: torch.dtype, buffer_rows: int) -> None:
        """Accumulates into `result`, or beside it in `buffer_rows` rows of `dtype`."""
        self.result = result
        self.memory: Tensor | None = None
        if result.dtype != dtype:
            shape = (min(buffer_rows, result.shape[0]), *result.shape[1:])
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


class Gradients:
    """The gradients of a call: where they accumulate, and when they are finished."""

    def __init__(
        self,
        operands: Operands,
        needs: Needs,
        schedule: Schedule,
        keep_half: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        first = operands.inputs[0]
        dtype = accumulation_dtype(first.dtype) if dtype is None else dtype
        # Products in a wider dtype than float32 take no 16-bit tile.
        self.narrows = dtype == torch.float32 and multiplies_into_float32(first)
        widen = keep_half and first.dtype == torch.float16
        result_dtype = torch.float32 if widen else first.dtype
        whole_rows = schedule.name == "gradient_in_forward"
        num_tokens, vocab_size = first.shape[0], operands.local_vocab_size
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
        self.shard, self.last_column = operands.shard, vocab_size
        self.waits: list[Callable[[], Any]] = []

    def into_range(self, operands: Operands, *upstream: Tensor | None) -> list[Any]:
        """Row weights as they are, or scaled so that products in float16 keep small ones."""
        first = operands.inputs[0]
        if first.dtype != torch.float16 or not self.narrows:
            return list(upstream)
        peak = sum(value.abs().amax() for value in upstream if value is not None)
        scale = _HALF_PEAK / torch.as_tensor(peak).clamp_min(torch.finfo(torch.float32).tiny)
        self.unscale = 1 / scale
        return [None if value is None else value * scale for value in upstream]

    def add(self, products: Products, rows: slice, columns: slice, tile: Tensor) -> None:
        """Adds what a tile of the logits' gradient contributes to hidden states and weights.

        With the last columns the hidden states' part of this rank is complete: the ranks' parts
        are summed while the product of the weights runs.
        """
        tile = products.narrowed(tile)
        for index, total in enumerate(self.hidden):
            if total is not None:
                weight = products.piece("weights", index, columns)
                multiply(tile, weight, total.slot(rows), beta=float(columns.start > 0))
                if columns.stop == self.last_column:
                    self.waits.append(self.shard.start_hidden_sum(total.slot(rows)))
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
        for wait in self.waits:
            wait()
        self.waits.clear()
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
        """Gradients of inputs, weights and bias; empty where not needed."""
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
