"""Heads of every kind for the tests of an engine: operands, objective, and the float64 truth."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from oracle import assert_close_as_torch, farthest
from torch import Tensor

from hf_fused_head.engines import reference
from hf_fused_head.engines.protocol import Needs, Operands
from hf_fused_head.objective import RowStats, RowWeights, Upstream, Wanted
from hf_fused_head.ops import HeadArguments
from hf_fused_head.planning.problem import Problem, budget_bytes
from hf_fused_head.planning.schedule import Schedule


class Case(NamedTuple):
    """One head and one objective."""

    bias: bool = False
    rank: int = 0  # of a second pair of operands, 0 for none
    class_weight: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None
    spread: float = 1.0  # standard deviation of the logits
    smooth: bool = False
    z_loss: bool = False


CASES = {
    "plain": Case(),
    "everything": Case(bias=True, rank=5, logit_scale=1.5, smooth=True, z_loss=True),
    "class_weight": Case(bias=True, rank=5, class_weight=True, logit_scale=1.5, z_loss=True),
    "class_weight_smooth": Case(
        bias=True, rank=5, class_weight=True, logit_scale=1.5, smooth=True, z_loss=True
    ),
    "smooth": Case(smooth=True),
    "softcap": Case(softcap=5.0, spread=3.0, z_loss=True),
    "softcap_smooth": Case(softcap=5.0, spread=3.0, class_weight=True, smooth=True),
    # Losses past exp's range, where rows are made again around their maximum.
    "overflow": Case(bias=True, spread=60.0, smooth=True, z_loss=True),
    "overflow_softcap": Case(softcap=80.0, spread=80.0),
}


def operands_of(
    case: Case, num_tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str
) -> tuple[Operands, Tensor]:
    """Random operands on `device`, and labels with the last class among them."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(device=device, dtype=dtype)

    inputs = [normal(num_tokens, hidden_size)]
    weights = [normal(vocab_size, hidden_size, scale=case.spread / hidden_size**0.5)]
    if case.rank:
        inputs.append(normal(num_tokens, case.rank))
        weights.append(normal(vocab_size, case.rank, scale=0.3))
    operands = Operands(
        inputs,
        weights,
        normal(vocab_size) if case.bias else None,
        torch.rand(vocab_size).to(device) if case.class_weight else None,
        case.logit_scale,
        case.softcap,
    )
    labels = torch.randint(vocab_size, (num_tokens,))
    labels[-1] = vocab_size - 1
    return operands, labels.to(device)


def row_weights(case: Case, num_tokens: int, device: str) -> RowWeights:
    """Weights of nll, smooth and squared lse of every row; None for what the case lacks."""
    wanted = (True, case.smooth, case.z_loss)
    vectors = [torch.rand(num_tokens) * scale for scale in (1.0, 0.5, 0.01)]
    return RowWeights(
        *(v.to(device) if want else None for v, want in zip(vectors, wanted, strict=True))
    )


def all_needs(operands: Operands) -> Needs:
    """Every gradient that there is."""
    return Needs(
        [True] * len(operands.inputs), [True] * len(operands.weights), operands.bias is not None
    )


def in_float64(operands: Operands) -> Operands:
    """The same numbers in float64."""

    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    return operands._replace(
        inputs=[t.double() for t in operands.inputs],
        weights=[t.double() for t in operands.weights],
        bias=double(operands.bias),
        class_weight=double(operands.class_weight),
    )


def doubled(vectors: tuple) -> tuple:
    """The same record of vectors in float64."""
    return type(vectors)(*(None if vector is None else vector.double() for vector in vectors))


def planned(
    operands: Operands,
    impl: str,
    memory_budget_mib: float | None = None,
    *,
    needs: Needs | None = None,
    wanted: Wanted | None = None,
    per_token: bool = False,
) -> Schedule:
    """The schedule that the operators would follow for these operands."""
    labels = torch.empty(operands.inputs[0].shape[0], device=operands.inputs[0].device)
    wanted = wanted or Wanted()
    options = (-100, operands.logit_scale, operands.softcap, 0.1 * wanted.smooth, impl)
    rest = (budget_bytes(memory_budget_mib), "", True, False)
    head = HeadArguments(*operands[:4], operands.row_scale, labels, *options, *rest)
    return head.schedule(operands, needs, wanted, per_token)


def check_forward_backward(
    engine, case: Case, operands: Operands, labels: Tensor, schedule: Schedule
) -> RowStats:
    """Holds statistics and gradients of the scalar objective against float64."""
    weights = row_weights(case, labels.shape[0], labels.device.type)
    rest = (all_needs(operands), Wanted(case.smooth, True, True))
    schedule = allowed(schedule, case, operands.inputs[0].dtype)
    stats, grads = engine.stats_and_grads(operands, labels, weights, *rest, schedule)
    plain = in_two_orders(
        lambda head: reference.stats_and_grads(head, labels, weights, *rest), operands
    )
    truth = reference.stats_and_grads(in_float64(operands), labels, doubled(weights), *rest)
    _compare_stats(stats, [result[0] for result in plain], truth[0])
    _compare_grads(operands, grads, [result[1] for result in plain], truth[1])
    return stats


def check_backward(
    engine, case: Case, operands: Operands, labels: Tensor, schedule: Schedule
) -> None:
    """Holds statistics and gradients of any upstream vectors, entropy's too, against float64."""
    vectors = [torch.randn(labels.shape[0]).to(labels.device) for _ in range(4)]
    upstream = Upstream(*vectors)._replace(**({} if case.smooth else {"smooth": None}))
    needs, wanted = all_needs(operands), Wanted(case.smooth, True, True)
    windows = windows_of(schedule)

    def run(module, head: Operands, vectors: Upstream) -> tuple[RowStats, list[Tensor]]:
        stats = module.row_stats(head, labels, wanted, windows)
        return stats, module.row_grads(head, labels, stats, vectors, needs, windows)

    stats, grads = run(engine, operands, upstream)
    plain = in_two_orders(lambda head: run(reference, head, upstream), operands)
    truth = run(reference, in_float64(operands), doubled(upstream))
    _compare_stats(stats, [result[0] for result in plain], truth[0])
    _compare_grads(operands, grads, [result[1] for result in plain], truth[1])


def in_two_orders(run, operands: Operands) -> list[tuple[RowStats, list[Tensor]]]:
    """`run(operands)` with the first product's terms in both directions.

    `run` returns statistics and gradients; the latter are turned back.
    """

    def turned(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0].flip(1), *tensors[1:]]

    backwards = operands._replace(inputs=turned(operands.inputs), weights=turned(operands.weights))
    stats, grads = run(backwards)
    pairs = len(operands.inputs)
    grads = [*turned(grads[:pairs]), *turned(grads[pairs : 2 * pairs]), grads[-1]]
    return [run(operands), (stats, grads)]


def _compare_stats(ours: RowStats, plain: list[RowStats], truth: RowStats) -> None:
    for name in ("nll", "lse", "smooth", "entropy"):
        exact = getattr(truth, name)
        stock = farthest([getattr(stats, name) for stats in plain], exact)
        assert_close_as_torch(name, getattr(ours, name), stock, exact)
    assert torch.equal(ours.correct, truth.correct)


def _compare_grads(
    operands: Operands, ours: list[Tensor], plain: list[list[Tensor]], truth: list[Tensor]
) -> None:
    arithmetic = operands.inputs[0].dtype
    for index, (grad, exact) in enumerate(zip(ours, truth, strict=True)):
        stock = farthest([grads[index] for grads in plain], exact)
        assert_close_as_torch(f"gradient {index}", grad, stock, exact, arithmetic=arithmetic)


def fixed_schedule(
    name: str,
    chunk_tokens: int = 2**30,
    vocab_window: int = 2**30,
    kept_share: float = 0.0,
    late_rounding: bool = False,
    product_bytes: int = 0,
) -> Schedule:
    """A schedule that no planner made."""
    sizes = (chunk_tokens, vocab_window, 0, 0, 0, kept_share)
    return Schedule(name, *sizes, True, "fixed", late_rounding, product_bytes)


def with_library(schedules: dict[str, Schedule], product_bytes: int) -> dict[str, Schedule]:
    """Schedules and the same with products of the vendor's library, in tiles of so many bytes."""
    tiles = {
        f"{name}, tile": replace(schedule, product_bytes=product_bytes)
        for name, schedule in schedules.items()
    }
    return {**schedules, **tiles}


def windows_of(schedule: Schedule) -> Schedule:
    """The schedule of windows with the same tile."""
    return replace(schedule, name="recompute", kept_share=0.0)


def allowed(schedule: Schedule, case: Case, dtype: torch.dtype) -> Schedule:
    """The schedule, or windows where the Triton engine's planner allows nothing else."""
    options = {"softcap": case.softcap is not None, "class_weight": case.class_weight}
    problem = Problem(1, 1, 1, dtype, "triton", smoothing=0.1 * case.smooth, **options)
    return windows_of(schedule) if problem.windows_only else schedule
