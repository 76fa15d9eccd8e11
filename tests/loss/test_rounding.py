"""Gradients that are small beside what they are made from keep their digits, in every engine."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from head_cases import fixed_schedule, windows_of
from oracle import assert_close_as_torch
from plain_head import Problem, by_ours, by_plain, results, widened
from torch import Tensor

from hf_fused_head import ops

passes = pytest.importorskip(
    "hf_fused_head.engines.triton_engine.passes", reason="needs triton (pip install triton)"
)
tuning = pytest.importorskip("hf_fused_head.kernels.tuning", reason="needs triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Sizes(NamedTuple):
    """Of a head, and of the parts in which a schedule takes it."""

    num_tokens: int
    hidden_size: int
    vocab_size: int
    chunk: int
    window: int


# In the interpreter two row tiles and three column tiles, no size a multiple.
SIZES = {"cpu": Sizes(40, 21, 70, 32, 32), "cuda": Sizes(600, 72, 1300, 256, 512)}
RUNS = [
    "reference",
    "reference, per token",
    "torch, whole rows",
    "torch, windows",
    "torch, per token",
    "triton, one chunk",
    "triton, chunks",
    "triton, windows",
    "triton, hybrid",
    "triton, per token",
]


def check(
    run: str, problem: Problem, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of one engine and schedule, by the distance of stock from float64."""
    device = tensors["hidden"].device.type
    num_tokens, _, vocab_size, chunk, window = SIZES[device]
    impl, _, name = run.partition(", ")
    if impl == "triton" and device == "cpu":
        if not tuning.interpreted():
            pytest.skip("kernels on the CPU need TRITON_INTERPRET=1")
        monkeypatch.setattr(passes, "MULTIPLE", window)
    whole = fixed_schedule("gradient_in_forward", chunk_tokens=num_tokens, vocab_window=vocab_size)
    schedule = {
        "chunks": fixed_schedule("gradient_in_forward", chunk_tokens=chunk),
        "windows": fixed_schedule("recompute", chunk_tokens=num_tokens, vocab_window=window),
        "hybrid": fixed_schedule("hybrid", vocab_window=window, kept_share=0.5),
    }.get(name, whole)
    windows = windows_of(schedule)
    monkeypatch.setattr(ops, "plan", lambda problem: windows if problem.windows_only else schedule)
    upstream = torch.tensor(0.75, device=device)
    if name == "per token":
        problem = problem.with_options(reduction="none")
        upstream = torch.rand(num_tokens).to(device)
    ours = results(by_ours(problem, impl), tensors, upstream)
    stock = results(by_plain(problem), tensors, upstream)
    truth = results(by_plain(problem), widened(tensors), upstream.double())
    for name, value in ours.items():
        assert_close_as_torch(name, value, stock[name], truth[name])


def capped_head(
    place: str, dtype: torch.dtype, softcap: float, saturated: bool
) -> dict[str, Tensor]:
    """Arguments of the softcap's tanh beyond seven, of either sign; or of any size up to ten."""
    sizes = SIZES[place]
    hidden = 0.1 * torch.randn(sizes.num_tokens, sizes.hidden_size)
    weight = 0.1 * torch.randn(sizes.vocab_size, sizes.hidden_size)
    hidden[:, 0] = softcap * (7 + 3 * torch.rand(sizes.num_tokens))
    weight[:, 0] = 2 * torch.rand(sizes.vocab_size) - 1
    if saturated:
        weight[:, 0].sign_()
    target = torch.randint(sizes.vocab_size, (sizes.num_tokens,))
    made = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "target": target}
    return {name: tensor.to(place) for name, tensor in made.items()}


# By the share of smoothing in the gradient: by the option, or since the labels weigh little.
NEAR_ONE = {
    **{str(share): {"label_smoothing": share} for share in (0.1, 0.5, 0.9, 0.99, 1.0)},
    "class weights": {"label_smoothing": 0.5, "z_loss": 1e-3},
    "light labels": {"label_smoothing": 0.1},
}


def fresh_head(place: str, dtype: torch.dtype, weights: str) -> dict[str, Tensor]:
    """Logits of a few hundredths, as of a model at the start; some labels do not count."""
    sizes = SIZES[place]
    target = torch.randint(sizes.vocab_size, (sizes.num_tokens,))
    made = {
        "hidden": 0.1 * torch.randn(sizes.num_tokens, sizes.hidden_size).to(dtype),
        "weight": 0.02 * torch.randn(sizes.vocab_size, sizes.hidden_size).to(dtype),
        "bias": 0.02 * torch.randn(sizes.vocab_size).to(dtype),
    }
    if weights == "class weights":
        made["class_weight"] = torch.rand(sizes.vocab_size).to(dtype) + 0.5
    elif weights == "light labels":
        target %= 2
        made["class_weight"] = torch.ones(sizes.vocab_size, dtype=dtype)
        made["class_weight"][:2] = 2.0**-10
    made["target"] = target.clone()
    made["target"][::9] = -100
    return {name: tensor.to(place) for name, tensor in made.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", NEAR_ONE)
@pytest.mark.parametrize(
    "run",
    [
        "reference",
        "torch, whole rows",
        "torch, windows",
        "triton, one chunk",
        "triton, hybrid",
        "triton, per token",
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_smoothing_of_nearly_uniform_predictions(
    place: str, run: str, options: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What smoothing subtracts leaves little, which is rounded after that and not before."""
    check(run, Problem(options=NEAR_ONE[options]), fresh_head(place, dtype, options), monkeypatch)


@pytest.mark.parametrize("saturated", [True, False], ids=["saturated", "of_all_sizes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("place", PLACES)
def test_logits_many_softcaps_out(
    place: str,
    run: str,
    dtype: torch.dtype,
    saturated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The softcap's derivative is none of a tanh that was rounded to one."""
    check(
        run,
        Problem(options={"softcap": 5.0}),
        capped_head(place, dtype, 5.0, saturated),
        monkeypatch,
    )
