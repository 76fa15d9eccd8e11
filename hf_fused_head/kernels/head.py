"""The head's product with the loss in its epilogue."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_fused_head.kernels.product import (
    LOG2E,
    accumulate_product,
    logits_of,
    softcap_slope,
    tile_position,
)
from hf_fused_head.kernels.tuning import TileConfig, interpreted

# Sizes that change from batch to batch or from window to window must not compile a kernel each.
_VARYING = ["num_tokens", "vocab_size", "vocab_start"]


class Head(NamedTuple):
    """What every tile of logits is made from; a window of the vocabulary is a slice of it.

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + low @ low_weight.T + bias) / softcap)
    """

    hidden: Tensor  # [T, H], unit stride along H
    weight: Tensor  # [V, H], unit stride along H
    low: Tensor | None  # [T, R]
    low_weight: Tensor | None  # [V, R]
    bias: Tensor | None  # [V]
    class_weight: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    def window(self, window: slice) -> Head:
        """The same head over some rows of the vocabulary."""
        return self._replace(
            weight=self.weight[window],
            low_weight=None if self.low_weight is None else self.low_weight[window],
            bias=None if self.bias is None else self.bias[window],
            class_weight=None if self.class_weight is None else self.class_weight[window],
        )

    def rows(self, rows: slice) -> Head:
        """The same head over some of the tokens."""
        return self._replace(
            hidden=self.hidden[rows], low=None if self.low is None else self.low[rows]
        )

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """What is multiplied: [T, H] with [V, H], and maybe [T, R] with [V, R]."""
        first = (self.hidden, self.weight)
        if self.low is None or self.low_weight is None:
            return [first]
        return [first, (self.low, self.low_weight)]

    def class_weights(self) -> Tensor:
        """The class weights, or ones: [V] float32."""
        if self.class_weight is None:
            return torch.ones(self.weight.shape[0], device=self.weight.device)
        return self.class_weight.float()


class RowSums(NamedTuple):
    """Sums over one vocabulary tile each, [tiles of V, T] float32; None where not asked for.

    With z the logits, a the row's anchor and y its label; a later kernel adds them up in a fixed
    order, which makes the result the same from run to run.
    """

    total: Tensor  # sum of exp(z - a) over j != y
    entropy: Tensor | None  # sum of exp(z - a) (z - a) over j != y
    smooth: Tensor | None  # sum of class_weight (z - a) over all j
    best: Tensor | None  # max of z over j != y
    target: Tensor | None  # [T]: z at y, of the same product as `best`

    def tiles(self, tiles: slice) -> RowSums:
        """The part of some vocabulary tiles."""
        parts = [None if t is None else t[tiles] for t in self[:4]]
        return RowSums(*parts, target=self.target)


class RowGradient(NamedTuple):
    """Row factors of the logits' gradient, [T] float32; None where the term is absent.

    `dz_j = p_j (alpha - eta (log p_j + entropy)) - gamma w_j` for j != y, with p = exp(z - lse);
    at the label the first term is `target` instead.
    """

    lse: Tensor
    alpha: Tensor
    target: Tensor
    gamma: Tensor | None
    eta: Tensor | None
    entropy: Tensor | None


@triton.jit
def _store_sums(
    logits,
    exponents,
    shifted,
    at_label,
    offs_t,
    offs_v,
    pid_v,
    labels,
    num_tokens,
    vocab_size,
    class_weight_ptr,
    total_ptr,
    entropy_ptr,
    smooth_ptr,
    best_ptr,
    target_ptr,
):
    """Writes this tile's row sums at [pid_v, offs_t]; see `RowSums`."""
    place = pid_v.to(tl.int64) * num_tokens + offs_t
    mask_t = offs_t < num_tokens
    tl.store(total_ptr + place, tl.sum(exponents, 1), mask=mask_t)
    if entropy_ptr is not None:
        # exp(-inf) * -inf would be nan: a column without mass adds nothing.
        weighted = tl.where(exponents > 0, exponents * shifted, 0.0)
        tl.store(entropy_ptr + place, tl.sum(weighted, 1), mask=mask_t)
    if smooth_ptr is not None:
        inside = (offs_v < vocab_size)[None, :]
        if class_weight_ptr is not None:
            weight = tl.load(class_weight_ptr + offs_v, mask=offs_v < vocab_size, other=0.0)
            spread = tl.where(inside, shifted * weight.to(tl.float32)[None, :], 0.0)
        else:
            spread = tl.where(inside, shifted, 0.0)
        tl.store(smooth_ptr + place, tl.sum(spread, 1), mask=mask_t)
    if best_ptr is not None:
        other = (offs_v < vocab_size)[None, :] & (at_label == 0)
        tl.store(best_ptr + place, tl.max(tl.where(other, logits, float("-inf")), 1), mask=mask_t)
        here = mask_t & (labels >= tl.min(offs_v, 0)) & (labels <= tl.max(offs_v, 0))
        tl.store(target_ptr + offs_t, tl.sum(tl.where(at_label, logits, 0.0), 1), mask=here)


@triton.jit
def _epilogue(
    acc,
    offs_t,
    offs_v,
    pid_v,
    num_tokens,
    vocab_size,
    vocab_start,
    labels_ptr,
    bias_ptr,
    class_weight_ptr,
    logit_scale,
    softcap,
    shift_ptr,
    total_ptr,
    entropy_sum_ptr,
    smooth_sum_ptr,
    best_ptr,
    target_logit_ptr,
    alpha_ptr,
    target_ptr,
    gamma_ptr,
    eta_ptr,
    entropy_ptr,
):
    """Turns accumulated products into the tile to be stored, float32, and writes the row sums.

    Without `alpha_ptr` the tile holds exp(z - anchor), zero at the label and times the softcap's
    slope; with it, the gradient of the accumulated products.
    """
    mask_t = offs_t < num_tokens
    shift = tl.load(shift_ptr + offs_t, mask=mask_t, other=0.0)
    labels = (tl.load(labels_ptr + offs_t, mask=mask_t, other=-1) - vocab_start).to(tl.int32)
    at_label = offs_v[None, :] == labels[:, None]
    logits = logits_of(acc, offs_v, vocab_size, bias_ptr, logit_scale, softcap)
    shifted = logits - shift[:, None]
    exponents = tl.exp2(shifted * LOG2E)
    if alpha_ptr is None:
        outside = at_label | (offs_v >= vocab_size)[None, :]
        tile = tl.where(outside, 0.0, exponents)
        if total_ptr is not None:
            _store_sums(
                logits,
                tile,
                shifted,
                at_label,
                offs_t,
                offs_v,
                pid_v,
                labels,
                num_tokens,
                vocab_size,
                class_weight_ptr,
                total_ptr,
                entropy_sum_ptr,
                smooth_sum_ptr,
                best_ptr,
                target_logit_ptr,
            )
        if softcap is not None:
            tile *= softcap_slope(logits, softcap)
    else:
        alpha = tl.load(alpha_ptr + offs_t, mask=mask_t, other=0.0)
        target = tl.load(target_ptr + offs_t, mask=mask_t, other=0.0)
        if eta_ptr is not None:
            eta = tl.load(eta_ptr + offs_t, mask=mask_t, other=0.0)
            entropy = tl.load(entropy_ptr + offs_t, mask=mask_t, other=0.0)
            # -inf * 0 would be nan: a column without mass has no entropy gradient either.
            log_p = tl.where(exponents > 0, shifted, 0.0)
            tile = exponents * (alpha[:, None] - eta[:, None] * (log_p + entropy[:, None]))
        else:
            tile = exponents * alpha[:, None]
        tile = tl.where(at_label, target[:, None], tile)
        if gamma_ptr is not None:
            gamma = tl.load(gamma_ptr + offs_t, mask=mask_t, other=0.0)
            if class_weight_ptr is not None:
                weight = tl.load(class_weight_ptr + offs_v, mask=offs_v < vocab_size, other=0.0)
                tile -= gamma[:, None] * weight.to(tl.float32)[None, :]
            else:
                tile -= gamma[:, None]
        if softcap is not None:
            tile *= softcap_slope(logits, softcap)
        tile *= logit_scale
    return tile


@triton.jit(do_not_specialize=_VARYING)
def _head_descriptor_kernel(
    hidden_desc,
    weight_desc,
    store_desc,
    low_ptr,
    low_weight_ptr,
    labels_ptr,
    bias_ptr,
    class_weight_ptr,
    shift_ptr,
    total_ptr,
    entropy_sum_ptr,
    smooth_sum_ptr,
    best_ptr,
    target_logit_ptr,
    alpha_ptr,
    target_ptr,
    gamma_ptr,
    eta_ptr,
    entropy_ptr,
    logit_scale,
    softcap,
    num_tokens,
    vocab_size,
    vocab_start,
    hidden_size,
    rank,
    stride_low_t,
    stride_low_weight_v,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    HALVES: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Persistent: program i owns tiles i, i + NUM_PROGRAMS, ... of the logits.

    Loads go through tensor descriptors, which fill with zero outside the matrices; the finished
    tile leaves through one too (clipped there), in two halves when shared memory is short.
    """
    num_tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    num_tiles_v = tl.cdiv(vocab_size, BLOCK_V)
    # A second tile counter for the epilogue lets the loads of the next tile run ahead of it.
    tile_done = tl.program_id(0) - NUM_PROGRAMS
    num_tiles = num_tiles_t * num_tiles_v
    for tile_id in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS, flatten=FLATTEN):
        pid_t, pid_v = tile_position(tile_id, num_tiles_t, num_tiles_v, GROUP_T)
        acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
        for step in range(tl.cdiv(hidden_size, BLOCK_H)):
            hidden = hidden_desc.load([pid_t * BLOCK_T, step * BLOCK_H])
            weight = weight_desc.load([pid_v * BLOCK_V, step * BLOCK_H])
            if UPCAST:
                hidden = hidden.to(tl.float32)
                weight = weight.to(tl.float32)
            acc = tl.dot(hidden, weight.T, acc, input_precision=PRECISION)

        tile_done += NUM_PROGRAMS
        pid_t, pid_v = tile_position(tile_done, num_tiles_t, num_tiles_v, GROUP_T)
        offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
        offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
        if low_ptr is not None:
            acc = accumulate_product(
                acc,
                low_ptr,
                low_weight_ptr,
                stride_low_t,
                stride_low_weight_v,
                offs_t,
                offs_v,
                num_tokens,
                vocab_size,
                rank,
                BLOCK_R,
                False,
                PRECISION,
                UPCAST,
            )
        tile = _epilogue(
            acc,
            offs_t,
            offs_v,
            pid_v,
            num_tokens,
            vocab_size,
            vocab_start,
            labels_ptr,
            bias_ptr,
            class_weight_ptr,
            logit_scale,
            softcap,
            shift_ptr,
            total_ptr,
            entropy_sum_ptr,
            smooth_sum_ptr,
            best_ptr,
            target_logit_ptr,
            alpha_ptr,
            target_ptr,
            gamma_ptr,
            eta_ptr,
            entropy_ptr,
        )
        if store_desc is not None:
            out = tile.to(store_desc.dtype)
            if HALVES:
                pairs = tl.permute(tl.reshape(out, (BLOCK_T, 2, BLOCK_V // 2)), (0, 2, 1))
                left, right = tl.split(pairs)
                store_desc.store([pid_t * BLOCK_T, pid_v * BLOCK_V], left)
                store_desc.store([pid_t * BLOCK_T, pid_v * BLOCK_V + BLOCK_V // 2], right)
            else:
                store_desc.store([pid_t * BLOCK_T, pid_v * BLOCK_V], out)


@triton.jit(do_not_specialize=_VARYING)
def _head_pointer_kernel(
    hidden_ptr,
    weight_ptr,
    store_ptr,
    low_ptr,
    low_weight_ptr,
    labels_ptr,
    bias_ptr,
    class_weight_ptr,
    shift_ptr,
    total_ptr,
    entropy_sum_ptr,
    smooth_sum_ptr,
    best_ptr,
    target_logit_ptr,
    alpha_ptr,
    target_ptr,
    gamma_ptr,
    eta_ptr,
    entropy_ptr,
    logit_scale,
    softcap,
    num_tokens,
    vocab_size,
    vocab_start,
    hidden_size,
    rank,
    stride_low_t,
    stride_low_weight_v,
    stride_hidden_t,
    stride_weight_v,
    stride_store_t,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Any card: one program owns one tile of the logits, loads and stores through pointers."""
    num_tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    num_tiles_v = tl.cdiv(vocab_size, BLOCK_V)
    pid_t, pid_v = tile_position(tl.program_id(0), num_tiles_t, num_tiles_v, GROUP_T)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    acc = accumulate_product(
        acc,
        hidden_ptr,
        weight_ptr,
        stride_hidden_t,
        stride_weight_v,
        offs_t,
        offs_v,
        num_tokens,
        vocab_size,
        hidden_size,
        BLOCK_H,
        EVEN_H,
        PRECISION,
        UPCAST,
    )
    if low_ptr is not None:
        acc = accumulate_product(
            acc,
            low_ptr,
            low_weight_ptr,
            stride_low_t,
            stride_low_weight_v,
            offs_t,
            offs_v,
            num_tokens,
            vocab_size,
            rank,
            BLOCK_R,
            False,
            PRECISION,
            UPCAST,
        )
    tile = _epilogue(
        acc,
        offs_t,
        offs_v,
        pid_v,
        num_tokens,
        vocab_size,
        vocab_start,
        labels_ptr,
        bias_ptr,
        class_weight_ptr,
        logit_scale,
        softcap,
        shift_ptr,
        total_ptr,
        entropy_sum_ptr,
        smooth_sum_ptr,
        best_ptr,
        target_logit_ptr,
        alpha_ptr,
        target_ptr,
        gamma_ptr,
        eta_ptr,
        entropy_ptr,
    )
    if store_ptr is not None:
        store_ptrs = store_ptr + offs_t.to(tl.int64)[:, None] * stride_store_t + offs_v[None, :]
        mask = (offs_t < num_tokens)[:, None] & (offs_v < vocab_size)[None, :]
        tl.store(store_ptrs, tile.to(store_ptr.dtype.element_ty), mask=mask)


def _describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can address `matrix`: 16-byte base and row stride."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and row_bytes % 16 == 0 and matrix.numel() > 0


def low_rank_block(rank: int) -> int:
    """Block of the low-rank product: at least the tensor core's depth, at most 64."""
    return min(64, max(16, triton.next_power_of_2(rank)))


def launch_exponents(
    head: Head,
    labels: Tensor,
    vocab_start: int,
    anchor: Tensor,
    sums: RowSums,
    store: Tensor | None,
    config: TileConfig,
    allow_tf32: bool,
) -> None:
    """One pass over the head: exponents around the anchors, their row sums, and maybe themselves.

    Args:
        head: The head, or a window of it that starts at `vocab_start`.
        labels: [T] int64, contiguous, of the whole vocabulary.
        vocab_start: First vocabulary row of the window.
        anchor: [T] float32, contiguous.
        sums: Row sums of the window's tiles, `ceil(window / config.block_v)` of them, contiguous;
            nothing has to be zeroed.
        store: [T, window] of the hidden states' dtype, unit stride along V: exponents times the
            softcap's slope, zero at the labels; None to store nothing.
        config: The tile.
        allow_tf32: Whether float32 products may round their operands to tf32.
    """
    _launch(head, labels, vocab_start, anchor, sums, None, store, config, allow_tf32)


def launch_gradient(
    head: Head,
    labels: Tensor,
    vocab_start: int,
    gradient: RowGradient,
    store: Tensor,
    config: TileConfig,
    allow_tf32: bool,
) -> None:
    """One pass over the head that writes the gradient of `hidden @ weight.T`.

    Args:
        head: The head, or a window of it that starts at `vocab_start`.
        labels: [T] int64, contiguous, of the whole vocabulary.
        vocab_start: First vocabulary row of the window.
        gradient: The row factors, contiguous.
        store: [T, window], unit stride along V, written.
        config: The tile.
        allow_tf32: Whether float32 products may round their operands to tf32.
    """
    _launch(head, labels, vocab_start, gradient.lse, None, gradient, store, config, allow_tf32)


def _launch(
    head: Head,
    labels: Tensor,
    vocab_start: int,
    shift: Tensor,
    sums: RowSums | None,
    gradient: RowGradient | None,
    store: Tensor | None,
    config: TileConfig,
    allow_tf32: bool,
) -> None:
    num_tokens, hidden_size = head.hidden.shape
    vocab_size = head.weight.shape[0]
    upcast = interpreted()
    rank = 0 if head.low is None else head.low.shape[1]
    total, entropy_sum, smooth_sum, best, target_logit = sums or (None,) * 5
    _, alpha, target, gamma, eta, entropy = gradient or (None,) * 6
    pointers = (
        head.low,
        head.low_weight,
        labels,
        head.bias,
        head.class_weight,
        shift,
        total,
        entropy_sum,
        smooth_sum,
        best,
        target_logit,
        alpha,
        target,
        gamma,
        eta,
        entropy,
        float(head.logit_scale),
        None if head.softcap is None else float(head.softcap),
        num_tokens,
        vocab_size,
        vocab_start,
        hidden_size,
        rank,
        0 if head.low is None else head.low.stride(0),
        0 if head.low_weight is None else head.low_weight.stride(0),
    )
    tiles = {
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_H": config.block_h,
        "BLOCK_R": low_rank_block(rank),
        "GROUP_T": config.group_t,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        "UPCAST": upcast,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    num_tiles = triton.cdiv(num_tokens, config.block_t) * triton.cdiv(vocab_size, config.block_v)
    matrices = [head.hidden, head.weight] + ([] if store is None else [store])
    if config.num_programs and all(_describable(matrix) for matrix in matrices):
        store_block = [config.block_t, config.block_v // (2 if config.halves else 1)]
        _head_descriptor_kernel[(min(config.num_programs, num_tiles),)](
            TensorDescriptor.from_tensor(head.hidden, [config.block_t, config.block_h]),
            TensorDescriptor.from_tensor(head.weight, [config.block_v, config.block_h]),
            None if store is None else TensorDescriptor.from_tensor(store, store_block),
            *pointers,
            NUM_PROGRAMS=config.num_programs,
            HALVES=config.halves,
            FLATTEN=config.flatten,
            **tiles,
        )
        return
    _head_pointer_kernel[(num_tiles,)](
        head.hidden,
        head.weight,
        store,
        *pointers,
        head.hidden.stride(0),
        head.weight.stride(0),
        0 if store is None else store.stride(0),
        EVEN_H=hidden_size % config.block_h == 0,
        **tiles,
    )
