"""Heads of every kind for the tests of an engine: operands, objective, and the float64 truth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from oracle import assert_close_as_torch
from torch import Tensor

from hf_fused_head import reference
from hf_fused_head.options import Needs, Operands, RowStats
from hf_fused_head.schedule import Schedule


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
    "everything": Case(
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


def row_weights(case: Case, num_tokens: int, device: str) -> tuple[Tensor, ...]:
    """Weights of nll, smooth and squared lse of every row; None for what the case lacks."""
    wanted = (True, case.smooth, case.z_loss)
    vectors = [torch.rand(num_tokens) * scale for scale in (1.0, 0.5, 0.01)]
    return tuple(v.to(device) if want else None for v, want in zip(vectors, wanted, strict=True))


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


def check_forward_backward(engine, case: Case, operands: Operands, labels: Tensor) -> RowStats:
    """Holds statistics and gradients of the scalar objective against float64."""
    weights = row_weights(case, labels.shape[0], labels.device.type)
    needs = all_needs(operands)
    rest = (needs, 2**30, True, True)
    stats, grads = engine.forward_backward(operands, labels, *weights, *rest)
    plain = reference.forward_backward(operands, labels, *weights, *rest)
    weights64 = [None if weight is None else weight.double() for weight in weights]
    truth = reference.forward_backward(in_float64(operands), labels, *weights64, *rest)
    _compare_stats(stats, plain[0], truth[0])
    _compare_grads(grads, plain[1], truth[1], operands.inputs[0].dtype)
    return stats


def check_backward(engine, case: Case, operands: Operands, labels: Tensor) -> None:
    """Holds statistics and gradients of any upstream vectors, entropy's too, against float64."""
    upstream = [torch.randn(labels.shape[0]).to(labels.device) for _ in range(4)]
    if not case.smooth:
        upstream[2] = None
    needs, wanted = all_needs(operands), (case.smooth, True, True)
    stats = engine.forward(operands, labels, 2**30, *wanted)
    grads = engine.backward(operands, labels, stats, *upstream, needs, 2**30)
    plain_stats = reference.forward(operands, labels, 2**30, *wanted)
    plain = reference.backward(operands, labels, plain_stats, *upstream, needs, 2**30)
    operands64 = in_float64(operands)
    stats64 = reference.forward(operands64, labels, 2**30, *wanted)
    upstream64 = [None if vector is None else vector.double() for vector in upstream]
    truth = reference.backward(operands64, labels, stats64, *upstream64, needs, 2**30)
    _compare_stats(stats, plain_stats, stats64)
    _compare_grads(grads, plain, truth, operands.inputs[0].dtype)


def _compare_stats(ours: RowStats, plain: RowStats, truth: RowStats) -> None:
    for name in ("nll", "lse", "smooth", "entropy"):
        assert_close_as_torch(name, getattr(ours, name), getattr(plain, name), getattr(truth, name))
    assert torch.equal(ours.correct, truth.correct)


def _compare_grads(
    ours: list[Tensor], plain: list[Tensor], truth: list[Tensor], arithmetic: torch.dtype
) -> None:
    for index, tensors in enumerate(zip(ours, plain, truth, strict=True)):
        assert_close_as_torch(f"gradient {index}", *tensors, arithmetic=arithmetic)


def fixed_schedule(
    name: str, chunk_tokens: int = 2**30, vocab_window: int = 2**30, kept_share: float = 0.0
):
    """A stand-in for `plan`: this schedule, but windows where an engine asks for those."""
    schedule = Schedule(name, chunk_tokens, vocab_window, 0, 0, 0, kept_share, True, "fixed")
    windows = Schedule("recompute", 2**30, vocab_window, 0, 0, 0, 0.0, True, "fixed")
    return lambda **sizes: windows if sizes["per_token"] else schedule
