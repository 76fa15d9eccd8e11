"""impl="triton": the head's product with the loss in its epilogue, gradients through cuBLAS.

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

from hf_fused_head.kernels import passes
from hf_fused_head.kernels.call import Call
from hf_fused_head.kernels.factors import row_gradient
from hf_fused_head.kernels.operands import (
    Abandoned,
    Attempt,
    Head,
    RowOutputs,
    RowWeights,
    Totals,
)
from hf_fused_head.kernels.rows import launch_count, launch_multiply
from hf_fused_head.kernels.tuning import (
    GLUON,
    allows_tf32,
    cdiv,
    interpreted,
    knows_gluon,
    tile_config,
)
from hf_fused_head.options import Needs, Operands, RowStats
from hf_fused_head.run_record import note_schedule
from hf_fused_head.schedule import Schedule, plan
from hf_fused_head.workspace import TRITON_SUMS_BYTES

# Compute capabilities of the devices on which the tests of this engine have passed.
_VERIFIED = {(9, 0)}
# The largest share of label smoothing that is subtracted after the rounding of a stored tile.
_LARGEST_LATE_SMOOTHING = 0.5
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unavailable_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this engine cannot run on such tensors; None when it can.

    Args:
        device_type: "cuda", or "cpu" for Triton's interpreter (`TRITON_INTERPRET=1`).
        dtype: The dtype of the hidden states and the head.
    """
    if dtype not in _DTYPES:
        return f"they take float16, bfloat16 and float32, not {dtype}"
    if device_type == "cpu":
        return None if interpreted() else "on the CPU they need TRITON_INTERPRET=1"
    if device_type != "cuda":
        return f"they run on CUDA devices, not on {device_type!r}"
    if interpreted():
        return "TRITON_INTERPRET=1 is set, which takes tensors on the CPU"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (8, 0):
        return f"they need compute capability 8.0 or newer, this device has {capability}"
    return None


def unverified_reason(device_type: str) -> str | None:
    """Why `impl="auto"` leaves this engine alone where it could run; None when it takes it."""
    if device_type != "cuda":
        return "kernels in the interpreter are for tests"
    if torch.version.hip is not None:
        return "its results on AMD devices have not been verified"
    capability = torch.cuda.get_device_capability()
    if capability not in _VERIFIED:
        return f"its results on compute capability {capability} have not been verified"
    return None


def slower_reason(dtype: torch.dtype) -> str | None:
    """Why the kernels for `dtype` are not the fastest for this card; None if they are."""
    hopper = torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
    if dtype == torch.float32 or not hopper or knows_gluon():
        return None
    first, last = (".".join(map(str, version)) for version in GLUON)
    return (
        f"the fastest kernel for this card needs Triton {first} or newer, below {last}, got "
        f"{triton.__version__}: an older one runs"
    )


def forward(
    operands: Operands,
    labels: Tensor,
    budget_bytes: int,
    want_smooth: bool,
    want_entropy: bool,
    want_correct: bool,
    attempt: Attempt | None = None,
) -> RowStats | None:
    """Statistics of every row in one pass that stores no tile; the protocol is the one of `ops`.

    In an attempt some rows may not count, and are zero then; None if it was abandoned.
    """
    call = _call(operands, labels, attempt)
    # This pass has no tile to choose: the plan is for the record alone.
    frozen = [False] * len(operands.inputs)
    _plan(call, Needs(frozen, frozen, False), budget_bytes, per_token=False, smoothing=False)
    outputs = call.outputs(want_smooth, want_entropy, want_correct, factor=False, correction=True)
    with _on_device(labels.device):
        try:
            passes.statistics(call, None, outputs, None)
        except Abandoned:
            return None
    return _row_stats(outputs)


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
    attempt: Attempt | None = None,
) -> tuple[RowStats, list[Tensor]] | None:
    """Statistics, and the gradients of `sum_t a_t nll_t + b_t smooth_t + c_t lse_t^2`.

    `smoothing` is its share of the objective, as far as the host knows. In an attempt some rows may
    not count, and are zero then; None if it was abandoned.
    """
    call = _call(operands, labels, attempt)
    weights = RowWeights(nll_weight.contiguous(), _contiguous(smooth_weight), _contiguous(z_weight))
    grads = _empty_grads(operands, needs, widen_half=True)
    results = _named(call, grads, needs)
    smooth = smooth_weight is not None
    half = call.head.hidden.dtype == torch.float16
    windows = half or (smooth and _rounded_too_early(operands, smoothing))
    schedule = _plan(call, needs, budget_bytes, windows, smooth)
    whole_rows = schedule.name == "gradient_in_forward"
    kept = round(schedule.kept_share * call.vocab_size) // passes.MULTIPLE * passes.MULTIPLE
    factor = whole_rows or kept > 0
    outputs = call.outputs(smooth, want_entropy, want_correct, factor, not whole_rows)
    with _on_device(labels.device):
        try:
            if whole_rows:
                passes.chunk_gradients(
                    call,
                    schedule.chunk_tokens,
                    schedule.late_rounding,
                    weights,
                    outputs,
                    results,
                )
            else:
                window = schedule.vocab_window
                passes.kept_gradients(call, kept, window, weights, outputs, results)
        except Abandoned:
            return None
    return _row_stats(outputs), grads


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
    call = _call(operands, labels)
    grads = _empty_grads(operands, needs, widen_half=False)
    results = _named(call, grads, needs)
    schedule = _plan(call, needs, budget_bytes, per_token=True, smoothing=False)
    rows = (stats.nll, stats.lse, stats.entropy, stats.correction)
    optional = [_contiguous(g) for g in (g_smooth, g_entropy)]
    with _on_device(labels.device):
        gradient = row_gradient(call, *rows, g_nll.contiguous(), g_lse.contiguous(), *optional)
        passes.recomputed_gradients(call, gradient, 0, schedule.vocab_window, None, results)
    return grads


def _rounded_too_early(operands: Operands, smoothing: float) -> bool:
    """Whether smoothing has to be subtracted before the gradient of the logits is rounded.

    Under a softcap the difference has a factor of its own for every element. Otherwise the term of
    smoothing has rank one and could be subtracted from the products of stored exponents. But a
    nearly uniform prediction leaves `1 - smoothing` of them, which makes their rounding as many
    times larger. With class weights that share differs from row to row.
    """
    weighted = operands.class_weight is not None
    return operands.softcap is not None or weighted or smoothing > _LARGEST_LATE_SMOOTHING


def begin(
    labels: Tensor, ignore_index: int, vocab_size: int, complain: Callable[[], object]
) -> Attempt:
    """An attempt at all rows, so that the first product need not wait until the host has counted.

    Captured in a CUDA graph, which has no host to wait or to complain, it always goes on; labels
    out of range make the loss NaN then.

    Args:
        labels: [N] int64.
        ignore_index: The label of rows that do not count.
        vocab_size: Labels that count lie in `[0, vocab_size)`.
        complain: Called when a label is out of range; raises the error that names it.
    """
    on_gpu = labels.is_cuda
    with _on_device(labels.device):
        plain, rows, counts = launch_count(labels.contiguous(), ignore_index, vocab_size)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return Attempt(plain, None, lambda: True, lambda: rows)
        on_host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=on_gpu)
        on_host.copy_(counts, non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if on_gpu else None

    def goes_on() -> bool:
        if arrived is not None:
            arrived.synchronize()
        num_wrong, many_ignored, _ = on_host.tolist()
        if num_wrong:
            complain()
        return not many_ignored

    return Attempt(plain, counts[1:2], goes_on, lambda: rows[: int(on_host[2])])


def multiply_(values: Tensor, factor: Tensor) -> Tensor:
    """`values *= factor` without a pass over them where the factor, on the device, is 1."""
    if not values.is_contiguous() or values.numel() == 0:
        return values.mul_(factor)
    with _on_device(values.device):
        launch_multiply(values, factor)
    return values


def _call(operands: Operands, labels: Tensor, attempt: Attempt | None = None) -> Call:
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
        _contiguous(operands.part_weight),
        operands.logit_scale,
        operands.softcap,
    )
    config = tile_config(labels.device, hidden.dtype)
    return Call(
        head,
        labels.contiguous(),
        config,
        allows_tf32(labels.device),
        TRITON_SUMS_BYTES,
        attempt,
        operands.shard,
        operands.class_weight,
    )


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the one of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _plan(
    call: Call, needs: Needs, budget_bytes: int, per_token: bool, smoothing: bool
) -> Schedule:
    sizes = [hidden.shape[1] for hidden, _ in call.head.pairs()]
    schedule = plan(
        num_tokens=_rounded(call.num_tokens),
        hidden_size=sum(sizes),
        vocab_size=call.shard.largest(call.vocab_size),
        dtype=call.head.hidden.dtype,
        impl="triton",
        device_type=call.labels.device.type,
        grad_hidden=any(needs.inputs),
        grad_weight=needs.bias or any(needs.weights),
        per_token=per_token,
        shared_hidden=call.shard.sums_hidden,
        memory_budget_mib=budget_bytes / 2**20,
        smoothing=smoothing,
        grad_columns=sum(size for size, need in zip(sizes, needs.weights, strict=True) if need),
    )
    note_schedule(schedule)
    return schedule


def _named(call: Call, grads: list[Tensor], needs: Needs) -> Totals:
    """The gradients by name; None where nobody wants one."""
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
    absent = outputs.nll.new_empty
    return RowStats(
        outputs.nll,
        outputs.lse,
        absent(0) if outputs.smooth is None else outputs.smooth,
        absent(0) if outputs.entropy is None else outputs.entropy,
        absent(0, dtype=torch.bool) if outputs.correct is None else outputs.correct,
        outputs.correction,
    )


def _rounded(num_tokens: int) -> int:
    """Up to 1/16 more, so that batches of about the same size share a plan."""
    step = max(passes.MULTIPLE, 1 << max(num_tokens.bit_length() - 5, 0))
    return cdiv(num_tokens, step) * step


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _unit_stride(matrix: Tensor) -> Tensor:
    """The matrix as the kernels and cuBLAS read it: rows with unit stride."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
