"""impl="triton": the loss on tiles of the head's product, gradients through the vendor's library.

The exponents e_j = exp(z_j - z_y) of a row need no maximum and no second sweep: with s their sum
over j != y, the loss is log1p(s) and the gradient of the logits is

    dz_j = factor * e_j  (j != y),   factor = g / (1 + s),   and -factor * s at the label,

so one product leaves tiles that are final up to one factor a row, and two plain products finish:
dX = factor * (E W) scales the rows of its result, dW = E^T (factor * X) those of its operand.

Three schedules spend memory differently (`schedule.plan` chooses):

    gradient_in_forward  all of E for a chunk of tokens: 3 products, float32 dW with several chunks
    recompute            statistics first, then windows of the vocabulary made again: 4 products
    hybrid               keeps E for the first share of the vocabulary and makes the rest again

What is no row factor (entropy's gradient, smoothing under a softcap), what smoothing may cancel and
what has too little range for exponents (float16) takes the windows, where the statistics are known
and the kernel writes the gradient of the logits itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from hf_fused_head.engines.protocol import Needs, Operands, Speculation
from hf_fused_head.engines.triton_engine import passes
from hf_fused_head.engines.triton_engine.call import HeadCall
from hf_fused_head.engines.triton_engine.row_factors import row_gradient
from hf_fused_head.kernels.operands import Head, RowOutputs, Totals
from hf_fused_head.kernels.rows import launch_count, launch_multiply
from hf_fused_head.kernels.tuning import (
    GLUON,
    interpreted,
    supports_gluon,
    tile_config,
)
from hf_fused_head.objective import DTYPES, RowStats, RowWeights, Upstream, Wanted
from hf_fused_head.planning.cards import OLDEST_CAPABILITY, card_of, too_old
from hf_fused_head.planning.schedule import Schedule
from hf_fused_head.planning.workspace import TRITON_SUMS_BYTES


def unavailable_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this engine cannot run on such tensors; None when it can.

    Args:
        device_type: "cuda", or "cpu" for Triton's interpreter (`TRITON_INTERPRET=1`).
        dtype: The dtype of the hidden states and the head.
    """
    if dtype not in OLDEST_CAPABILITY:
        return f"they take float16, bfloat16 and float32, not {dtype}"
    if device_type == "cpu":
        return None if interpreted() else "on the CPU they need TRITON_INTERPRET=1"
    if device_type != "cuda":
        return f"they run on CUDA devices, not on {device_type!r}"
    if interpreted():
        return "TRITON_INTERPRET=1 is set, which takes tensors on the CPU"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return too_old(card_of(torch.device("cuda")), dtype)


def slower_reason(dtype: torch.dtype) -> str | None:
    """Why the kernels for `dtype` are not the fastest for this card; None if they are."""
    hopper = torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
    if dtype == torch.float32 or not hopper or supports_gluon():
        return None
    first, last = (".".join(map(str, version)) for version in GLUON)
    return (
        f"the fastest kernel for this card needs Triton {first} or newer, below {last}, got "
        f"{triton.__version__}: an older one runs"
    )


def row_stats(
    operands: Operands,
    labels: Tensor,
    wanted: Wanted,
    schedule: Schedule,
    speculation: Speculation | None = None,
) -> RowStats:
    """See `Engine.row_stats`: one pass that stores no tile."""
    call = _call(operands, labels, schedule, speculation)
    outputs = call.outputs(wanted, factor=False, correction=True)
    with _on_device(labels.device):
        passes.statistics(call, None, outputs, None)
    return _row_stats(outputs)


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
    call = _call(operands, labels, schedule, speculation)
    weights = RowWeights(*(_contiguous(vector) for vector in weights))  # type: ignore[arg-type]
    grads = _empty_grads(operands, needs, widen_half=True)
    results = _named(call, grads, needs)
    wanted = wanted._replace(smooth=weights.smooth is not None)
    with _on_device(labels.device):
        if schedule.name == "gradient_in_forward":
            outputs = call.outputs(wanted, factor=True, correction=False)
            passes.chunk_gradients(call, schedule, weights, outputs, results)
        else:
            kept = round(schedule.kept_share * call.local_vocab_size)
            # Whole tiles: each has row sums of its own.
            step = max(passes.MULTIPLE, call.config.block_v)
            kept = kept // step * step
            outputs = call.outputs(wanted, factor=kept > 0, correction=True)
            passes.kept_gradients(call, kept, schedule.vocab_window, weights, outputs, results)
    return _row_stats(outputs), grads


def row_grads(
    operands: Operands,
    labels: Tensor,
    stats: RowStats,
    upstream: Upstream,
    needs: Needs,
    schedule: Schedule,
) -> list[Tensor]:
    """See `Engine.row_grads`."""
    call = _call(operands, labels, schedule)
    grads = _empty_grads(operands, needs, widen_half=False)
    results = _named(call, grads, needs)
    vectors = (_contiguous(vector) for vector in upstream)
    with _on_device(labels.device):
        gradient = row_gradient(call, stats, Upstream(*vectors))  # type: ignore[arg-type]
        passes.recomputed_gradients(call, gradient, 0, schedule.vocab_window, None, results)
    return grads


def speculate(
    labels: Tensor, ignore_index: int, vocab_size: int, raise_for_label: Callable[[], object]
) -> Speculation:
    """See `Engine.speculate`.

    While a CUDA graph is captured, where no host can wait or raise, the launch is never rejected;
    labels out of range make the loss NaN there.
    """
    on_gpu = labels.is_cuda
    with _on_device(labels.device):
        plain, rows, counts = launch_count(labels.contiguous(), ignore_index, vocab_size)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return Speculation(plain, None, lambda: True, lambda: rows)
        on_host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=on_gpu)
        on_host.copy_(counts, non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if on_gpu else None

    def commit() -> bool:
        if arrived is not None:
            arrived.synchronize()
        num_wrong, many_ignored, _ = on_host.tolist()
        if num_wrong:
            raise_for_label()
        return not many_ignored

    return Speculation(plain, counts[1:2], commit, lambda: rows[: int(on_host[2])])


def multiply_(values: Tensor, factor: Tensor) -> Tensor:
    """`values *= factor` without a pass over them where the factor, on the device, is 1."""
    if not values.is_contiguous() or values.numel() == 0:
        return values.mul_(factor)
    with _on_device(values.device):
        launch_multiply(values, factor)
    return values


def _call(
    operands: Operands,
    labels: Tensor,
    schedule: Schedule,
    speculation: Speculation | None = None,
) -> HeadCall:
    if len(operands.inputs) > 2:
        raise NotImplementedError(
            f"`operands` must hold at most two pairs for impl='triton', got "
            f"{len(operands.inputs)}: use impl='torch'"
        )
    hidden, *low = [_unit_stride(matrix) for matrix in operands.inputs]
    weight, *low_weight = [_unit_stride(matrix) for matrix in operands.weights]
    head = Head(
        hidden,
        weight,
        low[0] if low else None,
        low_weight[0] if low_weight else None,
        _contiguous(operands.bias),
        _contiguous(operands.local_class_weight),
        operands.logit_scale,
        operands.softcap,
        _contiguous(operands.row_scale),
    )
    config = tile_config(labels.device, hidden.dtype, by_library=schedule.product_bytes > 0)
    return HeadCall(
        head,
        labels.contiguous(),
        config,
        schedule.product_bytes,
        schedule.tile_tokens,
        TRITON_SUMS_BYTES,
        speculation,
        operands.shard,
        operands.class_weight,
    )


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the one of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _named(call: HeadCall, grads: list[Tensor], needs: Needs) -> Totals:
    """The gradients by name; None where not needed."""
    wanted = [*needs.inputs, *needs.weights, needs.bias]
    kept = [grad if need else None for grad, need in zip(grads, wanted, strict=True)]
    pairs = len(call.head.pairs())
    return Totals(kept[:pairs], kept[pairs : 2 * pairs], kept[-1])


def _empty_grads(operands: Operands, needs: Needs, widen_half: bool) -> list[Tensor]:
    """Memory for the gradients; empty where not needed."""
    absent = operands.inputs[0] if operands.bias is None else operands.bias
    parameters = [*operands.inputs, *operands.weights, absent]
    wanted = [*needs.inputs, *needs.weights, needs.bias]
    grads = []
    for parameter, need in zip(parameters, wanted, strict=True):
        widen = widen_half and parameter.dtype == torch.float16
        dtype = torch.float32 if widen else parameter.dtype
        shape = parameter.shape if need else (0,)
        grads.append(torch.empty(shape, dtype=dtype, device=parameter.device))
    return grads


def _row_stats(outputs: RowOutputs) -> RowStats:
    stats = {name: getattr(outputs, name) for name in RowStats._fields}
    for name in Wanted._fields:
        if stats[name] is None:
            stats[name] = outputs.nll.new_empty(0, dtype=DTYPES.get(name))
    return RowStats(**stats)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _unit_stride(matrix: Tensor) -> Tensor:
    """The matrix as the kernels and cuBLAS read it: rows with unit stride."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
