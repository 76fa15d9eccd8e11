"""The passes of one call: statistics, and the three orders in which gradients can be made."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fused_head.engines.triton_engine.call import HeadCall
from hf_fused_head.engines.triton_engine.first_product import exponents, logits_gradient
from hf_fused_head.engines.triton_engine.merging import merged_sums
from hf_fused_head.engines.triton_engine.products import (
    EXTRA_ROWS,
    stored_gradients,
    window_gradients,
)
from hf_fused_head.engines.triton_engine.row_factors import (
    in_half_range,
    row_gradient,
    smoothing_factor,
)
from hf_fused_head.kernels.operands import (
    Rounding,
    RowFactors,
    RowOutputs,
    RowSums,
    Totals,
)
from hf_fused_head.kernels.overflow import launch_overflow
from hf_fused_head.kernels.rows import launch_anchor
from hf_fused_head.kernels.statistics import OVERFLOW, launch_finish
from hf_fused_head.kernels.tuning import cdiv
from hf_fused_head.objective import RowStats, RowWeights
from hf_fused_head.planning.schedule import Schedule

# Chunks and windows are whole multiples of this: row tiles stay whole, row strides aligned.
MULTIPLE = 256
# Columns of a tile that has the sums of all ranks: beyond any label.
_ONE_TILE = 2**30
# Rows whose statistics are made at once, at most: enough to fill any card.
_STATISTICS_ROWS = 8192


def statistics(
    call: HeadCall, weights: RowWeights | None, outputs: RowOutputs, store: Tensor | None
) -> None:
    """One pass over the whole head that fills `outputs`, and `store` with the first exponents.

    Args:
        call: The rows. A speculation is decided behind the first product.
        weights: Their objective, [T] each; None when no exponents are stored.
        outputs: Their outputs.
        store: [T or more, kept columns], whole tiles or the whole vocabulary; None to store none.

    Raises:
        Rejected: If the speculation was rejected; nothing of the result is valid then.
    """
    asked = (outputs.smooth, outputs.entropy, outputs.log_sum_sq)
    kinds = 1 + sum(t is not None for t in asked) + outputs.needs_row_max
    most = min(call.sums_bytes // (kinds * call.row_sum_bytes), _STATISTICS_ROWS)
    most = max(most // MULTIPLE, 1) * MULTIPLE
    for rows in _slices(call.num_tokens, most):
        _row_statistics(
            call.rows(rows),
            None if weights is None else weights.rows(rows),
            outputs.rows(rows),
            None if store is None else store[rows],
            kinds,
        )
        call = call._replace(speculation=None)


def _row_statistics(
    call: HeadCall,
    weights: RowWeights | None,
    outputs: RowOutputs,
    store: Tensor | None,
    kinds: int,
) -> None:
    """`statistics` of rows whose sums are held at once."""
    head, labels = call.head, call.labels
    target_logit = call.empty(call.num_tokens)
    num_tiles = cdiv(call.local_vocab_size, call.config.block_v)
    tiles = iter(call.row_sums(kinds, num_tiles, call.num_tokens))
    sums = RowSums(
        next(tiles),
        None if outputs.entropy is None else next(tiles),
        None if outputs.smooth is None else next(tiles),
        next(tiles) if outputs.needs_row_max else None,
        None if outputs.log_sum_sq is None else next(tiles),
        torch.zeros_like(target_logit) if outputs.correct is not None else None,
    )
    skip = None if call.speculation is None else call.speculation.rejected
    slope = None
    if head.softcap is not None and store is not None:
        slope = torch.empty_like(target_logit)
    launch_anchor(head, labels, target_logit, slope, skip)
    call.shard.sum(target_logit)
    _exponents(call, target_logit, sums, store)
    call.decide()
    anchor, sums = _of_all_ranks(call, target_logit, sums, store)
    class_total = None if outputs.smooth is None else call.class_total()
    rest = (class_total, weights, outputs, store)
    columns = call.config.block_v if call.shard.group is None else _ONE_TILE
    sizes = (sums, call.vocab_size, *rest, columns)
    launch_finish(head, labels, anchor, target_logit, slope, *sizes)
    launch_overflow(head, labels, target_logit, slope, *rest)
    if head.row_scale is not None and outputs.factor is not None:
        outputs.factor.mul_(head.row_scale)


def _exponents(call: HeadCall, anchor: Tensor, sums: RowSums, store: Tensor | None) -> None:
    """Row sums of every tile around `anchor`, and the exponents of the columns that are kept."""
    kept = 0 if store is None else store.shape[1]
    if store is not None:
        kept_sums = sums.tiles(slice(0, cdiv(kept, call.config.block_v)))
        exponents(call, slice(0, kept), anchor, kept_sums, store)
    if kept < call.local_vocab_size:
        rest_sums = sums.tiles(slice(kept // call.config.block_v, None))
        exponents(call, slice(kept, call.local_vocab_size), anchor, rest_sums, None)


def _of_all_ranks(
    call: HeadCall, target_logit: Tensor, sums: RowSums, store: Tensor | None
) -> tuple[Tensor, RowSums]:
    """The anchors, and the sums of all ranks around them; on one rank there is nothing to do.

    A row whose sum overflows on all ranks together is computed again around its largest logit: two
    more passes, in a run whose losses exceed 44 nats. The host waits to know whether there is one.
    """
    if call.shard.group is None:
        return target_logit, sums
    merged = merged_sums(call, sums)
    far = merged.sum_exp[0] > OVERFLOW
    if not bool(far.any()):
        return target_logit, merged
    call = call._replace(speculation=None)
    row_max = torch.empty_like(sums.sum_exp)
    unused = torch.zeros_like(target_logit)
    _exponents(call, target_logit, sums._replace(row_max=row_max, target=unused), None)
    largest = target_logit + call.shard.max(row_max.amax(dim=0)).clamp_min(0.0)
    anchor = torch.where(far, largest, target_logit)
    _exponents(call, anchor, sums, store)
    return anchor, merged_sums(call, sums)


def chunk_gradients(
    call: HeadCall,
    schedule: Schedule,
    weights: RowWeights,
    outputs: RowOutputs,
    results: Totals,
) -> None:
    """Gradient in forward: every chunk of tokens is finished before the next one begins.

    Args:
        call: All rows.
        schedule: Rows at once, and when the head's gradient is rounded.
        weights: The objective.
        outputs: Written, `factor` among them.
        results: The gradients, written; None where not needed.

    Raises:
        Rejected: If the speculation was rejected; nothing of the results is valid then.
    """
    chunks = _slices(call.num_tokens, schedule.chunk_tokens)
    if len(chunks) == 1:
        _add_chunks(call.with_sums_in(results.weight), chunks, weights, outputs, results, None)
        return
    rounded = [t for t in results.weight if t is not None and t.dtype != torch.float32]
    if schedule.late_rounding:
        for grad in rounded:
            grad.untyped_storage().resize_(0)
    totals = results._replace(
        weight=[_accumulator(t, True) for t in results.weight],
        bias=_accumulator(results.bias, True),
    )
    rounding = None if schedule.late_rounding else Rounding(results.weight, call.config)
    _add_chunks(call, chunks, weights, outputs, totals, rounding)
    if schedule.late_rounding:
        for grad in rounded:
            grad.untyped_storage().resize_(grad.nbytes)
        _copy(totals.weight, results.weight)
    _copy([totals.bias], [results.bias])


def _add_chunks(
    call: HeadCall,
    chunks: list[slice],
    weights: RowWeights,
    outputs: RowOutputs,
    totals: Totals,
    rounding: Rounding | None,
) -> None:
    """`chunk_gradients`, all but a late rounding; the tile lives only in here."""
    extra = 0 if weights.smooth is None else EXTRA_ROWS
    store = call.tile(chunks[0].stop + extra, call.local_vocab_size)
    # Those of one kind are a 64th of the tile: no reason to make the statistics in parts.
    call = call._replace(sums_bytes=max(call.sums_bytes, chunks[0].stop * call.row_sum_bytes))
    for rows in chunks:
        part, part_weights, part_outputs = call.rows(rows), weights.rows(rows), outputs.rows(rows)
        statistics(part, part_weights, part_outputs, store)
        call = call._replace(speculation=None)
        made = (
            part.head,
            store[: part.num_tokens + extra],
            _factor(part_outputs),
            smoothing_factor(part, part_weights.smooth),
        )
        part_results = totals.rows(rows)
        adds = (rows.start > 0, rounding if rows is chunks[-1] else None)
        if not call.shard.sums_hidden:
            # The rows of dX are written last: until then they hold the scaled hidden states.
            scratch = part_results.hidden
            stored_gradients(*made, part_results, scratch, *adds)
            continue
        # dX first: the ranks sum their parts of it while the product of dW runs.
        scratch = [None] * len(totals.hidden)
        part_totals = part_results._replace(
            hidden=[_accumulator(t, True) for t in part_results.hidden]
        )
        stored_gradients(*made, part_totals.only_hidden(), scratch, accumulate=False)
        waits = [call.shard.start_hidden_sum(t) for t in part_totals.hidden if t is not None]
        rest = part_totals.without_hidden()
        stored_gradients(*made, rest, scratch, *adds)
        for wait in waits:
            wait()
        _copy(part_totals.hidden, part_results.hidden)


def kept_gradients(
    call: HeadCall,
    kept: int,
    window: int,
    weights: RowWeights,
    outputs: RowOutputs,
    results: Totals,
) -> None:
    """Hybrid, or recompute with `kept = 0`: statistics of all rows, then windows of the vocabulary.

    The first `kept` columns need no second pass: their exponents stay from the first.

    Args:
        call: All rows.
        kept: Columns whose exponents are kept: whole tiles, less than the vocabulary.
        window: Columns made again at once, at most.
        weights: The objective.
        outputs: Written, `correction` among them, and `factor` if `kept`.
        results: The gradients, written; None where not needed.

    Raises:
        Rejected: If the speculation was rejected; nothing of the results is valid then.
    """
    extra = EXTRA_ROWS if kept and weights.smooth is not None else 0
    store = call.tile(call.num_tokens + extra, kept) if kept else None
    call = call.with_sums_in(results.weight)
    statistics(call, weights if kept else None, outputs, store)
    totals = None
    if store is not None:
        totals = results._replace(hidden=[_accumulator(t, True) for t in results.hidden])
        part = slice(0, kept)
        stored_gradients(
            call.head.window(part),
            store,
            _factor(outputs),
            smoothing_factor(call, weights.smooth),
            totals.window(part),
            results.hidden,
            accumulate=False,
        )
        del store
    # Where no label counts every exponent around this lse is zero, and so is every weight.
    ignored = call.labels < 0
    lse = outputs.lse.masked_fill(ignored, float("inf"))
    weights = weights.without(ignored)
    unused = lse.new_empty(0)
    stats = RowStats(outputs.nll, lse, unused, unused, unused, unused, outputs.correction)
    gradient = row_gradient(call, stats, weights.upstream(outputs.lse))
    recomputed_gradients(call, gradient, kept, window, totals, results)


def recomputed_gradients(
    call: HeadCall,
    gradient: RowFactors,
    start: int,
    window: int,
    totals: Totals | None,
    results: Totals,
) -> None:
    """Makes the logits' gradient again in windows of the vocabulary, and multiplies it out.

    Args:
        call: All rows.
        gradient: Their row factors.
        start: First column that has no gradient yet.
        window: Columns at once, at most.
        totals: With sums of the hidden states' gradient over the columns before `start`.
        results: The gradients, written; None where not needed.
    """
    columns = call.local_vocab_size - start
    parts = _slices(columns, max(window // MULTIPLE, 1) * MULTIPLE)
    windows = [slice(start + part.start, start + part.stop) for part in parts]
    half = call.head.hidden.dtype == torch.float16
    accumulate = totals is not None
    if totals is None:
        several = half or len(windows) > 1 or call.shard.sums_hidden
        totals = results._replace(hidden=[_accumulator(t, several) for t in results.hidden])
    unscale = None
    if half:
        gradient, unscale = in_half_range(call, gradient)
    store = call.tile(call.num_tokens, parts[0].stop)
    for part in windows:
        tile = store[:, : part.stop - part.start]
        logits_gradient(call, part, gradient, tile)
        part_totals, part_results = totals.window(part), results.window(part)
        if half:
            part_totals = part_totals._replace(
                weight=[_accumulator(t, True) for t in part_results.weight],
                bias=_accumulator(part_results.bias, True),
            )
        window_gradients(call.head.window(part), tile, part_totals, accumulate)
        _copy(
            [*part_totals.weight, part_totals.bias],
            [*part_results.weight, part_results.bias],
            unscale,
        )
        accumulate = True
    for total in totals.hidden:
        if total is not None:
            call.shard.sum_hidden(total)
    _copy(totals.hidden, results.hidden, unscale)


def _factor(outputs: RowOutputs) -> Tensor:
    if outputs.factor is None:
        raise RuntimeError("`factor` must be among the outputs of rows whose exponents are stored")
    return outputs.factor


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


def _slices(size: int, most: int) -> list[slice]:
    """Parts of about one size rather than a short last one: whole tiles, `most` at the most."""
    parts = max(cdiv(size, most), 1)
    step = max(cdiv(size, parts * MULTIPLE), 1) * MULTIPLE
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
