"""The head's product with the loss in its epilogue: two kernels and their launchers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_fused_head.kernels.arguments import (
    Launch,
    LogitOptions,
    StoredTile,
    low_pair_of,
    options_of,
    pair_of,
    stored_tile,
)
from hf_fused_head.kernels.epilogue import finish_tile
from hf_fused_head.kernels.operands import Head, RowFactors, RowSums
from hf_fused_head.kernels.product import accumulate_product, tile_position
from hf_fused_head.kernels.tuning import (
    TileConfig,
    cdiv,
    interpreted,
    low_rank_block,
)

# Sizes that change from batch to batch or from window to window must not compile a kernel each.
_VARYING = ["num_tokens", "local_vocab_size", "vocab_start"]
NO_SUMS = RowSums(*[None] * len(RowSums._fields))
NO_GRADIENT = RowFactors(*[None] * len(RowFactors._fields))


@triton.jit(do_not_specialize=_VARYING)
def _head_descriptor_kernel(
    hidden_desc,
    weight_desc,
    store_desc,
    low_pair,
    labels_ptr,
    anchor_ptr,
    sums,
    gradient,
    skip_ptr,
    logit_options,
    num_tokens,
    local_vocab_size,
    vocab_start,
    hidden_size,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    HALVES: tl.constexpr,
    FLATTEN: tl.constexpr,
    UPCAST: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Persistent: program i owns tiles i, i + NUM_PROGRAMS, ... of the logits.

    Writes the row sums of every tile or, with `gradient`, none; and what `epilogue` makes of the
    tile, if there is a store. Loads go through tensor descriptors, which fill with zero outside the
    matrices. The tile is stored through one too, which clips it, in two halves when shared memory
    is short.
    """
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
    num_tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    num_tiles_v = tl.cdiv(local_vocab_size, BLOCK_V)
    # A second tile counter for the epilogue lets the loads of the next tile run ahead of it.
    tile_done = tl.program_id(0) - NUM_PROGRAMS
    num_tiles = num_tiles_t * num_tiles_v
    if skip_ptr is not None:
        num_tiles = tl.where(tl.load(skip_ptr) != 0, 0, num_tiles)
    for tile_id in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS, flatten=FLATTEN):
        pid_t, pid_v = tile_position(tile_id, num_tiles_t, num_tiles_v, GROUP_T)
        acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
        for step in range(tl.cdiv(hidden_size, BLOCK_H)):
            hidden = hidden_desc.load([pid_t * BLOCK_T, step * BLOCK_H])
            weight = weight_desc.load([pid_v * BLOCK_V, step * BLOCK_H])
            if UPCAST:
                hidden = hidden.to(tl.float32)
                weight = weight.to(tl.float32)
            acc = tl.dot(hidden, weight.T, acc, input_precision="ieee")

        tile_done += NUM_PROGRAMS
        pid_t, pid_v = tile_position(tile_done, num_tiles_t, num_tiles_v, GROUP_T)
        offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
        offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
        if low_pair is not None:
            acc = accumulate_product(
                acc,
                low_pair,
                offs_t,
                offs_v,
                num_tokens,
                local_vocab_size,
                BLOCK_R,
                False,
                UPCAST,
            )
        tile = finish_tile(acc, launch, offs_t, offs_v, pid_v * BLOCK_V, EXACT)
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
    pair,
    store,
    low_pair,
    labels_ptr,
    anchor_ptr,
    sums,
    gradient,
    skip_ptr,
    logit_options,
    num_tokens,
    local_vocab_size,
    vocab_start,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr,
    EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Any card: one program owns one tile of the logits; writes as the descriptor kernel does."""
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
    num_tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    num_tiles_v = tl.cdiv(local_vocab_size, BLOCK_V)
    pid_t, pid_v = tile_position(tl.program_id(0), num_tiles_t, num_tiles_v, GROUP_T)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    acc = accumulate_product(
        acc,
        pair,
        offs_t,
        offs_v,
        num_tokens,
        local_vocab_size,
        BLOCK_H,
        EVEN_H,
        UPCAST,
    )
    if low_pair is not None:
        acc = accumulate_product(
            acc,
            low_pair,
            offs_t,
            offs_v,
            num_tokens,
            local_vocab_size,
            BLOCK_R,
            False,
            UPCAST,
        )
    tile = finish_tile(acc, launch, offs_t, offs_v, pid_v * BLOCK_V, EXACT)
    if store is not None:
        store = StoredTile(*store)
        store_ptrs = store.ptr + offs_t.to(tl.int64)[:, None] * store.stride_t + offs_v[None, :]
        mask = (offs_t < num_tokens)[:, None] & (offs_v < local_vocab_size)[None, :]
        tl.store(store_ptrs, tile.to(store.ptr.dtype.element_ty), mask=mask)


def describable(matrix: Tensor | None) -> bool:
    """Whether a tensor descriptor can address `matrix`: 16-byte base and rows; true for None."""
    if matrix is None:
        return True
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and row_bytes % 16 == 0 and matrix.numel() > 0


def launch_exponents(
    head: Head,
    labels: Tensor,
    vocab_start: int,
    anchor: Tensor,
    sums: RowSums,
    store: Tensor | None,
    config: TileConfig,
    skip: Tensor | None = None,
) -> None:
    """One pass over the head: the row sums of the exponents, and with a store the exponents too.

    Args:
        head: The head, or a window of it that starts at `vocab_start`; unit strides along H.
        labels: [T] int64, contiguous: columns of this rank's shard, beyond it for another rank's
            label, negative where none counts.
        vocab_start: First row of the window in this rank's shard.
        anchor: [T] float32, contiguous.
        sums: Row sums of the window's tiles, `ceil(window / config.block_v)` of them, contiguous,
            written. Only `target` has to be zeroed: it is written where the window has the label.
        store: [T, window] of the hidden states' dtype, unit stride along V, written: exponents
            times the softcap's slope, zero at the labels; it does not have to be zeroed. None to
            store nothing.
        config: The tile.
        skip: One int32 on the device; where it is not 0 nothing is done and nothing written.
    """
    _launch(head, labels, vocab_start, anchor, sums, NO_GRADIENT, store, config, skip)


def launch_gradient(
    head: Head,
    labels: Tensor,
    vocab_start: int,
    gradient: RowFactors,
    store: Tensor,
    config: TileConfig,
) -> None:
    """One pass over the head that writes the gradient of `hidden @ weight.T`.

    Args:
        head: The head, or a window of it that starts at `vocab_start`; unit strides along H.
        labels: [T] int64, contiguous: columns of this rank's shard, beyond it for another rank's
            label, negative where none counts.
        vocab_start: First row of the window in this rank's shard.
        gradient: The row factors, contiguous.
        store: [T, window], unit stride along V, written; it does not have to be zeroed.
        config: The tile.
    """
    _launch(head, labels, vocab_start, None, NO_SUMS, gradient, store, config, None)


def _launch(
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
    """Launches the kernel that `config` asks for, or the pointer kernel where it cannot run."""
    num_tokens, hidden_size = head.hidden.shape
    local_vocab_size = head.weight.shape[0]
    matrices = (head.hidden, head.weight, store)
    arguments: dict[str, Any] = {
        "labels_ptr": labels,
        "anchor_ptr": anchor,
        "sums": tuple(sums),
        "gradient": tuple(gradient),
        "skip_ptr": skip,
        "logit_options": options_of(head),
        "num_tokens": num_tokens,
        "local_vocab_size": local_vocab_size,
        "vocab_start": vocab_start,
    }
    if config.cooperative and all(map(describable, (*matrices, head.low, head.low_weight))):
        # Imported where it runs: the interpreter, and Triton's older versions, have no such Gluon.
        from hf_fused_head.kernels.cooperative import launch_cooperative

        launch_cooperative(head, store, arguments, config)
        return
    arguments.update(
        low_pair=low_pair_of(head),
        BLOCK_T=config.block_t,
        BLOCK_V=config.block_v,
        BLOCK_H=config.block_h,
        BLOCK_R=low_rank_block(0 if head.low is None else head.low.shape[1]),
        GROUP_T=config.group_t,
        UPCAST=interpreted(),
        EXACT=head.hidden.dtype == torch.float32,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    num_tiles = cdiv(num_tokens, config.block_t) * cdiv(local_vocab_size, config.block_v)
    descriptors = bool(config.num_programs) and not config.cooperative
    if descriptors and all(map(describable, matrices)):
        store_block = [config.block_t, config.block_v // (2 if config.halves else 1)]
        _head_descriptor_kernel[(min(config.num_programs, num_tiles),)](
            TensorDescriptor.from_tensor(head.hidden, [config.block_t, config.block_h]),
            TensorDescriptor.from_tensor(head.weight, [config.block_v, config.block_h]),
            None if store is None else TensorDescriptor.from_tensor(store, store_block),
            hidden_size=hidden_size,
            NUM_PROGRAMS=config.num_programs,
            HALVES=config.halves,
            FLATTEN=config.flatten,
            **arguments,
        )
        return
    _head_pointer_kernel[(num_tiles,)](
        pair_of(head),
        stored_tile(store),
        EVEN_H=hidden_size % config.block_h == 0,
        **arguments,
    )
