"""How a result is judged: by its distance from float64, in units of what torch itself reaches."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_as_torch(
    name: str,
    ours: Tensor,
    torch_result: Tensor,
    truth: Tensor,
    arithmetic: torch.dtype | None = None,
) -> None:
    """Fails unless `ours` is about as near to `truth` as torch's own result in the same dtype.

    The budget is `2 * (err(torch) + eps(dtype) * max|truth|)`, so that it follows from the data:
    no test names a tolerance.

    Args:
        name: What is compared, for the message.
        ours: The result under test.
        torch_result: The same quantity by plain torch operations in the dtype of `ours`.
        truth: The same quantity in float64.
        arithmetic: The dtype of the products, where it is not that of `ours` (autocast).
    """
    if ours.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}")
    if ours.numel() == 0:
        return
    ours64, torch64 = ours.detach().double().cpu(), torch_result.detach().double().cpu()
    truth64 = truth.detach().double().cpu()
    same_nan = torch.equal(ours64.isnan(), truth64.isnan())
    if not same_nan:
        raise AssertionError(f"{name}: nan at other places than the truth: {ours64} vs {truth64}")
    ours64, torch64, truth64 = (t.nan_to_num(nan=0.0) for t in (ours64, torch64, truth64))
    scale = truth64.abs().max().item()
    budget = 2 * (
        (torch64 - truth64).abs().max().item() + torch.finfo(arithmetic or ours.dtype).eps * scale
    )
    error = (ours64 - truth64).abs()
    worst = int(error.argmax())
    if not error.flatten()[worst].item() <= budget:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{name}{list(index)}: got {ours64.flatten()[worst].item():.9g}, truth "
            f"{truth64.flatten()[worst].item():.9g}, error {error.flatten()[worst].item():.3g} "
            f"exceeds the budget {budget:.3g}"
        )


def assert_means_close(
    name: str,
    ours: Tensor,
    torch_result: Tensor,
    truth: Tensor,
    count: int,
    arithmetic: torch.dtype,
) -> None:
    """As `assert_close_as_torch`, for means of `count` terms, such as the losses of batches.

    The errors of the terms cancel, more or less as luck has it. Where torch has luck, its error
    counts as what roundings leave on average.
    """
    average = torch.finfo(arithmetic).eps * truth.abs().max() / count**0.5
    worst = torch.maximum((torch_result - truth).abs().max(), average)
    assert_close_as_torch(name, ours, truth + worst, truth)


def products_dtype(dtype: torch.dtype) -> torch.dtype:
    """A dtype with as many digits as products of `dtype` have; TF32 has those of float16."""
    tf32 = torch.cuda.is_available() and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.float16 if tf32 and dtype == torch.float32 else dtype


def farthest(candidates: list[Tensor], truth: Tensor) -> Tensor:
    """The candidate with the largest error: what torch reaches in its least lucky order."""
    if truth.numel() == 0:
        return candidates[0]
    errors = [(candidate.double() - truth).abs().nan_to_num().max() for candidate in candidates]
    return candidates[int(torch.stack(errors).argmax())]


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of `truth`, both in float64."""
    ours, truth = ours.detach().double().cpu(), truth.detach().double().cpu()
    return ((ours - truth).norm() / truth.norm()).item()


def assert_norm_as_torch(name: str, ours: Tensor, torch_result: Tensor, truth: Tensor) -> None:
    """Fails unless the error of `ours` by norm is at most twice that of torch's own result.

    Stricter than element by element for sums of many terms: there the budget is a rounding of the
    largest element, and an error that spreads over all others stays below it.
    """
    error, budget = relative_error(ours, truth), 2 * relative_error(torch_result, truth)
    if not error <= budget:
        raise AssertionError(f"{name}: error {error:.3g} by norm exceeds the budget {budget:.3g}")
