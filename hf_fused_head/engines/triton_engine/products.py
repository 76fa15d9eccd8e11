"""From a stored tile to gradients, by cuBLAS, and by `last_product` where a sum is rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fused_head.kernels.head import describable
from hf_fused_head.kernels.operands import Head, Rounding, Totals
from hf_fused_head.kernels.rows import launch_scale_rows
from hf_fused_head.kernels.tuning import TileConfig

# Rows appended to a stored tile for label smoothing, whose gradient has rank one. Eight keep the
# product's depth aligned; one for each part of the split digits is used.
EXTRA_ROWS = 8
_SPREAD_ROWS = 3
# cuBLAS fills the card by splitting the sum of a small result, and then rounds the parts to the
# result's dtype: below this many elements the parts are kept in float32.
_SPLIT_BELOW = 2**22
# The kernel that rounds a sum has tiles of so many columns; fewer would leave most of one empty.
_ROUNDED_FROM = 256


def product(left: Tensor, right: Tensor, out: Tensor, accumulate: bool) -> None:
    """`out (+)= left @ right`, summed in float32 whatever the operands; `out` may be float32.

    Accumulating needs a float32 `out`: a running sum in 16 bits loses digits with every term.
    """
    if left.device.type == "cpu":
        # The interpreter's tensors: no mixed-dtype products here.
        value = left.float() @ right.float()
        out.copy_(out + value if accumulate else value)
    elif out.dtype == left.dtype:
        if accumulate:
            torch.addmm(out, left, right, out=out)
        elif out.numel() < _SPLIT_BELOW and out.dtype != torch.float32:
            out.copy_(torch.mm(left, right, out_dtype=torch.float32))
        else:
            torch.mm(left, right, out=out)
    elif accumulate:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def last_product(
    left: Tensor, right: Tensor, total: Tensor, out: Tensor, config: TileConfig
) -> None:
    """`out = total + left @ right`, summed in float32 and rounded once; `total` is used up.

    Args:
        left: [M, K], the transpose of a matrix with rows of unit stride.
        right: [K, N].
        total: [M, N] float32.
        out: [M, N] of the operands' dtype.
        config: The tile, which says whether the card has a kernel for this.
    """
    matrices = (left.t(), right, out)
    if config.cooperative and out.shape[1] >= _ROUNDED_FROM and all(map(describable, matrices)):
        # Imported where it runs: the interpreter, and Triton's older versions, have no such Gluon.
        from hf_fused_head.kernels.last_product import launch_last_product

        launch_last_product(*matrices[:2], total, out, config)
        return
    product(left, right, total, accumulate=True)
    out.copy_(total)


def combine_rows(coefficients: Tensor, matrix: Tensor) -> Tensor:
    """`coefficients @ matrix` in float32 for a 16-bit matrix: [N], [N, M] -> [M].

    The coefficients are split into three parts of the matrix's dtype, which hold all their digits.
    """
    out = torch.empty((matrix.shape[1],), dtype=torch.float32, device=matrix.device)
    if matrix.dtype == torch.float32:
        product(coefficients[None, :], matrix, out[None, :], accumulate=False)
        return out
    parts = torch.stack(split_digits(coefficients, matrix.dtype, 3))  # [3, N]
    sums = torch.empty((3, matrix.shape[1]), dtype=torch.float32, device=matrix.device)
    product(parts, matrix, sums, accumulate=False)
    return torch.sum(sums, 0, out=out)


def split_digits(values: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """`count` tensors of `dtype` whose sum is `values` as nearly as they can say it."""
    parts, rest = [], values
    for _ in range(count):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return parts


def stored_gradients(
    head: Head,
    tile: Tensor,
    factor: Tensor,
    gamma: Tensor | None,
    totals: Totals,
    scratch: Sequence[Tensor | None],
    accumulate: bool,
    rounding: Rounding | None = None,
) -> None:
    """Gradients from stored exponents E: `dX = factor * (E W)`, `dW = E^T (factor * X)`.

    Label smoothing subtracts gamma from every column of `factor * E`, a term of rank one: dX loses
    gamma times the sum of all rows of W, and dW gets it as extra rows of the product, E's holding
    ones and X's minus the sum of gamma X, in digits that are exact together.

    Args:
        head: T rows and V columns of the head.
        tile: [T, V], or [T + EXTRA_ROWS, V] with `gamma`: E, whose extra rows are written here.
        factor: [T] float32.
        gamma: [T] float32 or None; not with class weights.
        totals: [T, H_i], [V, H_i], [V]. The first is overwritten; so are the others, unless
            `accumulate`.
        scratch: Memory for factor * X, [T, H_i] of its dtype; None to allocate it.
        accumulate: Whether weight and bias are added to.
        rounding: Where the sums of weights go that this product completes; None if there are none.
    """
    num_tokens = factor.shape[0]
    pairs = head.pairs()
    for index, (hidden, _) in enumerate(pairs):
        dweight = totals.weight[index]
        if dweight is None:
            continue
        scaled = scratch[index]
        if scaled is None or gamma is not None:
            scaled = hidden.new_empty((tile.shape[0], hidden.shape[1]))
        launch_scale_rows(hidden, scaled[:num_tokens], factor)
        if gamma is not None:
            _write_smoothing(tile, scaled, num_tokens, combine_rows(gamma, hidden))
        result = None if rounding is None else rounding.weight[index]
        if rounding is None or result is None or result.dtype == dweight.dtype:
            product(tile.t(), scaled, dweight, accumulate)
        else:
            last_product(tile.t(), scaled, dweight, result, rounding.config)
    tile = tile[:num_tokens]
    if totals.bias is not None:
        dbias = combine_rows(factor, tile)
        if gamma is not None:
            dbias -= gamma.sum()
        if accumulate:
            totals.bias.add_(dbias)
        else:
            totals.bias.copy_(dbias)
    for (_, weight), dhidden in zip(pairs, totals.hidden, strict=True):
        if dhidden is not None:
            product(tile, weight, dhidden, accumulate=False)
            direction = None if gamma is None else _column_sums(weight)
            launch_scale_rows(dhidden, dhidden, factor, gamma, direction)


def _column_sums(matrix: Tensor) -> Tensor:
    """[N, M] -> [M] float32, by a product: `torch.sum` would make a float32 copy of the matrix."""
    ones = matrix.new_ones((1, matrix.shape[0]))
    out = torch.empty((1, matrix.shape[1]), dtype=torch.float32, device=matrix.device)
    product(ones, matrix, out, accumulate=False)
    return out[0]


def _write_smoothing(tile: Tensor, scaled: Tensor, num_tokens: int, spread: Tensor) -> None:
    """The extra rows: ones, and the digits of -`spread`."""
    digits = split_digits(-spread, tile.dtype, _SPREAD_ROWS)
    tile[num_tokens:] = 0
    scaled[num_tokens:] = 0
    tile[num_tokens : num_tokens + _SPREAD_ROWS] = 1
    scaled[num_tokens : num_tokens + _SPREAD_ROWS] = torch.stack(digits)


def window_gradients(head: Head, tile: Tensor, totals: Totals, accumulate: bool) -> None:
    """Gradients from a stored gradient of the logits: `dX (+)= dZ W`, `dW = dZ^T X`.

    Args:
        head: T rows and one window of V columns.
        tile: [T, V], dZ.
        totals: [T, H_i], [V, H_i], [V]; weight and bias are overwritten.
        accumulate: Whether the hidden states' totals are added to.
    """
    pairs = zip(head.pairs(), totals.hidden, totals.weight, strict=True)
    for (hidden, weight), dhidden, dweight in pairs:
        if dhidden is not None:
            product(tile, weight, dhidden, accumulate)
        if dweight is not None:
            product(tile.t(), hidden, dweight, accumulate=False)
    if totals.bias is not None:
        totals.bias.copy_(torch.sum(tile, 0, dtype=torch.float32))
