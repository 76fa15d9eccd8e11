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

What is no row factor (entropy's gradient, smoothing under a softcap) and what has too little range
for exponents (float16) takes the windows, where the statistics are known and the kernel writes
the gradient of the logits itself.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hf_fused_head.kernels.gradients import EXTRA_ROWS, Totals, stored_gradients, window_gradients
from hf_fused_head.kernels.head import (
    Head,
    RowGradient,
    RowSums,
    launch_exponents,
    launch_gradient,
)
from hf_fused_head.kernels.rows import (
    RowOutputs,
    RowWeights,
    launch_anchor,
    launch_finish,
    launch_multiply,
)
from hf_fused_head.kernels.tuning import TileConfig, interpreted, tile_config
from hf_fused_head.options import Needs, Operands, RowStats
from hf_fused_head.schedule import TRITON_SUMS_BYTES, Schedule, plan

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Rows whose statistics are made at once, at most: enough to fill any card.
_STATISTICS_ROWS = 8192
# Chunks and windows are whole multiples of this: row tiles stay whole, row strides aligned.
_MULTIPLE = 256
# float16 gradients of logits are stored with their largest row factor at this power of two.
_HALF_PEAK = 2.0**14


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
    if torch.version.hip is not None:
        return "they have not been verified on AMD devices"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"they need compute capability 8.0 or newer, this device has {major}.{minor}"
    return None


def forward(
    operands: Operands,
    labels: Tensor,
    budget_bytes: int,
    want_smooth: bool,
    want_entropy: bool,
    want_correct: bool,
) -> RowStats:
    """Statistics of every row in one pass that stores no tile; the protocol is the one of `ops`."""
    call = _Call.start(operands, labels)
    outputs = call.outputs(want_smooth, want_entropy, want_correct, want_factor=False)
    with _on_device(labels.device):
        _statistics(call, None, outputs, None)
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
) -> tuple[RowStats, list[Tensor]]:
    """Statistics, and the gradients of `sum_t a_t nll_t + b_t smooth_t + c_t lse_t^2`."""
    call = _Call.start(operands, labels)
    weights = RowWeights(*(_contiguous(w) for w in (nll_weight, smooth_weight, z_weight)))
    grads = _empty_grads(operands, needs, widen_half=True)
    # With both, or with float16's range, the gradient is no row factor times a stored tile.
    needs_windows = smooth_weight is not None and operands.softcap is not None
    needs_windows |= call.head.hidden.dtype == torch.float16
    schedule = _plan(call, needs, budget_bytes, per_token=needs_windows)
    factor = schedule.name in ("gradient_in_forward", "hybrid")
    outputs = call.outputs(smooth_weight is not None, want_entropy, want_correct, factor)
    with _on_device(labels.device):
        if schedule.name == "gradient_in_forward":
            _chunk_gradients(call, schedule.chunk_tokens, weights, outputs, grads, needs)
        else:
            kept = round(schedule.kept_share * call.vocab_size) // _MULTIPLE * _MULTIPLE
            _kept_gradients(call, kept, schedule.vocab_window, weights, outputs, grads, needs)
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
    call = _Call.start(operands, labels)
    grads = _empty_grads(operands, needs, widen_half=False)
    schedule = _plan(call, needs, budget_bytes, per_token=True)
    upstream = [_contiguous(g) for g in (g_nll, g_lse, g_smooth, g_entropy)]
    with _on_device(labels.device):
        gradient = _row_gradient(call, stats.nll, stats.lse, stats.entropy, *upstream)
        _window_gradients(call, gradient, 0, schedule.vocab_window, None, grads, needs)
    return grads


def multiply_(values: Tensor, factor: Tensor) -> Tensor:
    """`values *= factor` without a pass over them where the factor, on the device, is 1."""
    if not values.is_contiguous() or values.numel() == 0:
        return values.mul_(factor)
    with _on_device(values.device):
        launch_multiply(values, factor)
    return values


class _Call(NamedTuple):
    """The tensors of one call and how its kernels are tiled."""

    head: Head
    labels: Tensor
    config: TileConfig
    allow_tf32: bool

    @staticmethod
    def start(operands: Operands, labels: Tensor) -> _Call:
        hidden, low = [_unit_stride(t) for t in (*operands.inputs, None)][:2]
        weight, low_weight = [_unit_stride(t) for t in (*operands.weights, None)][:2]
        head = Head(
            hidden,
            weight,
            low,
            low_weight,
            _contiguous(operands.bias),
            _contiguous(operands.class_weight),
            operands.logit_scale,
            operands.softcap,
        )
        config = tile_config(labels.device, hidden.dtype)
        allow_tf32 = labels.is_cuda and torch.backends.cuda.matmul.allow_tf32
        return _Call(head, labels.contiguous(), config, allow_tf32)

    @property
    def num_tokens(self) -> int:
        return self.labels.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    def rows(self, rows: slice) -> _Call:
        return self._replace(head=self.head.rows(rows), labels=self.labels[rows])

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.labels.device)

    def tile(self, num_rows: int, num_columns: int) -> Tensor:
        """Memory for a tile, [num_rows, num_columns] of the operands' dtype, with aligned rows."""
        stride = -(-num_columns // 64) * 64
        return self.empty(num_rows, stride, dtype=self.head.hidden.dtype)[:, :num_columns]

    def outputs(self, smooth: bool, entropy: bool, correct: bool, want_factor: bool) -> RowOutputs:
        rows = self.num_tokens
        return RowOutputs(
            nll=self.empty(rows),
            lse=self.empty(rows),
            smooth=self.empty(rows) if smooth else None,
            entropy=self.empty(rows) if entropy else None,
            correct=self.empty(rows, dtype=torch.bool) if correct else None,
            factor=self.empty(rows) if want_factor else None,
            overflowed=self.empty(rows, dtype=torch.int32),
        )

    def class_total(self) -> Tensor:
        """Sum of the class weights, or V: [1] float32."""
        if self.head.class_weight is not None:
            return self.head.class_weight.sum(dtype=torch.float32).reshape(1)
        return torch.full((1,), float(self.vocab_size), device=self.labels.device)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the one of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _plan(call: _Call, needs: Needs, budget_bytes: int, per_token: bool) -> Schedule:
    sizes = [hidden.shape[1] for hidden, _ in call.head.pairs()]
    return plan(
        num_tokens=call.num_tokens,
        hidden_size=sum(sizes),
        vocab_size=call.vocab_size,
        dtype=call.head.hidden.dtype,
        impl="triton",
        device_type=call.labels.device.type,
        grad_hidden=any(needs.inputs),
        grad_weight=needs.bias or any(needs.weights),
        per_token=per_token,
        memory_budget_mib=budget_bytes / 2**20,
        grad_columns=sum(size for size, need in zip(sizes, needs.weights, strict=True) if need),
    )


def _statistics(
    call: _Call, weights: RowWeights | None, outputs: RowOutputs, store: Tensor | None
) -> None:
    """One pass over the whole head that fills `outputs`, and `store` with the first exponents.

    Args:
        call: The rows.
        weights: Their objective, [T] each; None when no exponents are stored.
        outputs: Their outputs.
        store: [T or more, kept columns], whole tiles or the whole vocabulary; None to store none.
    """
    num_tiles = triton.cdiv(call.vocab_size, call.config.block_v)
    kinds = 1 + sum(t is not None for t in (outputs.smooth, outputs.entropy, outputs.correct))
    most = TRITON_SUMS_BYTES // (4 * kinds * num_tiles) // _MULTIPLE * _MULTIPLE
    for rows in _slices(call.num_tokens, max(_MULTIPLE, min(most, _STATISTICS_ROWS))):
        _row_statistics(
            call.rows(rows),
            None if weights is None else weights.rows(rows),
            outputs.rows(rows),
            None if store is None else store[rows],
            num_tiles,
        )


def _row_statistics(
    call: _Call,
    weights: RowWeights | None,
    outputs: RowOutputs,
    store: Tensor | None,
    num_tiles: int,
) -> None:
    """`_statistics` of rows whose sums are held at once."""
    head, labels, num_tokens = call.head, call.labels, call.num_tokens

    def tiles(wanted: bool) -> Tensor | None:
        return call.empty(num_tiles, num_tokens) if wanted else None

    best = outputs.correct is not None
    sums = RowSums(
        call.empty(num_tiles, num_tokens),
        tiles(outputs.entropy is not None),
        tiles(outputs.smooth is not None),
        tiles(best),
        call.empty(num_tokens) if best else None,
    )
    anchor = call.empty(num_tokens)
    launch_anchor(head, labels, anchor)
    kept = 0 if store is None else store.shape[1]
    run = (call.config, call.allow_tf32)
    if store is not None:
        kept_sums = sums.tiles(slice(0, triton.cdiv(kept, call.config.block_v)))
        launch_exponents(head.window(slice(0, kept)), labels, 0, anchor, kept_sums, store, *run)
    if kept < call.vocab_size:
        rest_sums = sums.tiles(slice(kept // call.config.block_v, None))
        rest = head.window(slice(kept, None))
        launch_exponents(rest, labels, kept, anchor, rest_sums, None, *run)
    class_total = None if outputs.smooth is None else call.class_total()
    launch_finish(head, labels, anchor, sums, class_total, weights, outputs, store, call.allow_tf32)


def _chunk_gradients(
    call: _Call,
    chunk_tokens: int,
    weights: RowWeights,
    outputs: RowOutputs,
    grads: list[Tensor],
    needs: Needs,
) -> None:
    """Gradient in forward: every chunk of tokens is finished before the next one begins."""
    num_chunks = triton.cdiv(call.num_tokens, chunk_tokens)
    # Chunks of one size rather than a short last one.
    chunks = _slices(call.num_tokens, _whole(triton.cdiv(call.num_tokens, num_chunks)))
    extra = 0 if weights.smooth is None else EXTRA_ROWS
    store = call.tile(chunks[0].stop + extra, call.vocab_size)
    results = _results(call, grads, needs)
    several = len(chunks) > 1
    totals = results._replace(
        weight=[_accumulator(t, several) for t in results.weight],
        bias=_accumulator(results.bias, several),
    )
    for rows in chunks:
        part, part_weights, part_outputs = call.rows(rows), weights.rows(rows), outputs.rows(rows)
        _statistics(part, part_weights, part_outputs, store)
        dhidden = totals.rows(rows)
        stored_gradients(
            part.head,
            store[: part.num_tokens + extra],
            _factor(part_outputs),
            _gamma(call, part_weights.smooth),
            dhidden,
            # The rows of dX are written last: until then they hold the scaled hidden states.
            dhidden.hidden,
            accumulate=rows.start > 0,
        )
    _copy([*totals.weight, totals.bias], [*results.weight, results.bias])


def _kept_gradients(
    call: _Call,
    kept: int,
    window: int,
    weights: RowWeights,
    outputs: RowOutputs,
    grads: list[Tensor],
    needs: Needs,
) -> None:
    """Hybrid, or recompute with `kept = 0`: statistics of all rows, then windows of the vocabulary.

    The first `kept` columns need no second pass: their exponents stay from the first.
    """
    extra = EXTRA_ROWS if kept and weights.smooth is not None else 0
    store = call.tile(call.num_tokens + extra, kept) if kept else None
    _statistics(call, weights if kept else None, outputs, store)
    totals = None
    if store is not None:
        results = _results(call, grads, needs)
        totals = results._replace(hidden=[_accumulator(t, True) for t in results.hidden])
        part = slice(0, kept)
        stored_gradients(
            call.head.window(part),
            store,
            _factor(outputs),
            _gamma(call, weights.smooth),
            totals.window(part),
            results.hidden,
            accumulate=False,
        )
        del store
    g_lse = torch.zeros_like(outputs.lse) if weights.z is None else 2 * weights.z * outputs.lse
    gradient = _row_gradient(
        call, outputs.nll, outputs.lse, None, weights.nll, g_lse, weights.smooth, None
    )
    _window_gradients(call, gradient, kept, window, totals, grads, needs)


def _window_gradients(
    call: _Call,
    gradient: RowGradient,
    start: int,
    window: int,
    totals: Totals | None,
    grads: list[Tensor],
    needs: Needs,
) -> None:
    """Makes the logits' gradient again in windows of the vocabulary, and multiplies it out.

    Args:
        call: All rows.
        gradient: Their row factors.
        start: First column that has no gradient yet.
        window: Columns at once.
        totals: With float32 sums of the hidden states' gradient over the columns before `start`.
        grads: Written.
        needs: Which of them somebody wants.
    """
    columns = call.vocab_size - start
    window = max(window // _MULTIPLE, 1) * _MULTIPLE
    window = _whole(triton.cdiv(columns, triton.cdiv(columns, window)))
    windows = [slice(start + part.start, start + part.stop) for part in _slices(columns, window)]
    results = _results(call, grads, needs)
    half = call.head.hidden.dtype == torch.float16
    accumulate = totals is not None
    if totals is None:
        several = half or len(windows) > 1
        totals = results._replace(hidden=[_accumulator(t, several) for t in results.hidden])
    unscale = None
    if half:
        gradient, unscale = _in_half_range(call, gradient)
    store = call.tile(call.num_tokens, min(window, columns))
    for part in windows:
        tile = store[:, : part.stop - part.start]
        head = call.head.window(part)
        launch_gradient(head, call.labels, part.start, gradient, tile, call.config, call.allow_tf32)
        part_totals, part_results = totals.window(part), results.window(part)
        if half:
            part_totals = part_totals._replace(
                weight=[_accumulator(t, True) for t in part_results.weight],
                bias=_accumulator(part_results.bias, True),
            )
        window_gradients(head, tile, part_totals, accumulate)
        _copy(
            [*part_totals.weight, part_totals.bias],
            [*part_results.weight, part_results.bias],
            unscale,
        )
        accumulate = True
    _copy(totals.hidden, results.hidden, unscale)


def _in_half_range(call: _Call, gradient: RowGradient) -> tuple[RowGradient, Tensor]:
    """Row factors whose gradients fit float16's range, and the scalar that undoes it."""
    terms = [gradient.alpha.abs(), gradient.target.abs()]
    if gradient.gamma is not None:
        terms.append(gradient.gamma.abs() * call.head.class_weights().max())
    if gradient.eta is not None and gradient.entropy is not None:
        # p log p lies in [-1/e, 0], and p times the entropy below the entropy.
        terms.append(gradient.eta.abs() * (gradient.entropy + 1.0))
    largest = torch.stack(terms).max() * abs(call.head.logit_scale)
    scale = _HALF_PEAK / largest.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = {
        name: value * scale
        for name in ("alpha", "target", "gamma", "eta")
        if (value := getattr(gradient, name)) is not None
    }
    return gradient._replace(**scaled), 1.0 / scale


def _row_gradient(
    call: _Call,
    nll: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    g_nll: Tensor,
    g_lse: Tensor,
    g_smooth: Tensor | None,
    g_entropy: Tensor | None,
) -> RowGradient:
    """Row factors of the logits' gradient from the upstream gradients of the row objective."""
    alpha, gamma = g_nll + g_lse, None
    if g_smooth is not None:
        gamma = g_smooth / call.vocab_size
        alpha = alpha + gamma * call.class_total()
    # alpha p - beta, with 1 - p from the loss: a confident row keeps its digits.
    label_p = torch.exp(-nll)
    target = (alpha - g_nll) * label_p + g_nll * torch.expm1(-nll)
    if g_entropy is None or entropy is None:
        return RowGradient(lse, alpha, target, gamma, None, None)
    target = target - g_entropy * label_p * (entropy - nll)
    return RowGradient(lse, alpha, target, gamma, g_entropy, entropy)


def _gamma(call: _Call, smooth_weight: Tensor | None) -> Tensor | None:
    """What smoothing subtracts from the stored exponents' gradient, per unit of class weight."""
    if smooth_weight is None:
        return None
    return smooth_weight * (call.head.logit_scale / call.vocab_size)


def _factor(outputs: RowOutputs) -> Tensor:
    if outputs.factor is None:
        raise RuntimeError("`factor` must be among the outputs of rows whose exponents are stored")
    return outputs.factor


def _results(call: _Call, grads: list[Tensor], needs: Needs) -> Totals:
    """The gradients by name; None where nobody wants one."""
    wanted = [*needs.inputs, *needs.weights, needs.bias]
    kept = [grad if need else None for grad, need in zip(grads, wanted, strict=True)]
    pairs = len(call.head.pairs())
    return Totals(kept[:pairs], kept[pairs : 2 * pairs], kept[-1])


def _accumulator(result: Tensor | None, several: bool) -> Tensor | None:
    """Where the products that make `result` add up: itself, or float32 if there are several."""
    if result is None or not several or result.dtype == torch.float32:
        return result
    return torch.empty(result.shape, dtype=torch.float32, device=result.device)


def _copy(
    sources: list[Tensor | None], targets: list[Tensor | None], scale: Tensor | None = None
) -> None:
    """Rounds sums into the gradients, times `scale`; where both are one there is nothing to do."""
    for source, target in zip(sources, targets, strict=True):
        if source is None or target is None:
            continue
        if scale is not None:
            torch.mul(source, scale, out=target)
        elif source.data_ptr() != target.data_ptr():
            target.copy_(source)


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
    )


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _whole(size: int) -> int:
    return triton.cdiv(size, _MULTIPLE) * _MULTIPLE


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _unit_stride(matrix: Tensor | None) -> Tensor | None:
    """The matrix as the kernels and cuBLAS read it: rows with unit stride."""
    return matrix if matrix is None or matrix.stride(1) == 1 else matrix.contiguous()
