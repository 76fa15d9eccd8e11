"""What is true, how far a result is from it, and whether that is near enough."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fused_head.benchmark.workloads import IGNORE_INDEX, Batch
from hf_fused_head.options import accumulation_dtype

# Tokens that the truth takes at a time, so that it fits wherever the head does.
_CHUNK_TOKENS = 512


class Result(NamedTuple):
    """What one step made; None for what the mode does not ask for."""

    loss: Tensor  # [], mean over the tokens that count
    dhidden: Tensor | None  # [T, H]
    dweight: Tensor | None  # [V, H]
    token_losses: Tensor | None = None  # [T], 0 where ignored; of `plain_result` only


class Errors(NamedTuple):
    """Relative distances (Frobenius norm) from the truth; None where nothing is compared."""

    loss: float | None
    dhidden: float | None
    dweight: float | None


def plain_result(batch: Batch, mode: str, dtype: torch.dtype) -> Result:
    """Loss and gradients by plain torch operations in `dtype`, in chunks of tokens.

    In float64 this is the truth. In the dtype of the batch it is what the stock head computes,
    rounded where that rounds (the logits, their gradient, the final gradients), in memory that
    does not grow with `tokens * vocab`.

    Args:
        batch: The data.
        mode: "fwd", "fwd+bwd" or "frozen".
        dtype: Dtype of the products.
    """
    wide = accumulation_dtype(dtype)
    weight = batch.weight.detach().to(dtype).requires_grad_(mode == "fwd+bwd")
    loss = torch.zeros((), dtype=wide, device=weight.device)
    dhidden = torch.zeros_like(batch.hidden, dtype=dtype) if mode != "fwd" else None
    dweight = torch.zeros_like(weight, dtype=wide) if mode == "fwd+bwd" else None
    token_losses = []
    for start in range(0, len(batch.labels), _CHUNK_TOKENS):
        rows = slice(start, start + _CHUNK_TOKENS)
        hidden = batch.hidden[rows].detach().to(dtype).requires_grad_(mode != "fwd")
        logits = F.linear(hidden, weight).to(wide)
        losses = F.cross_entropy(
            logits, batch.labels[rows], ignore_index=IGNORE_INDEX, reduction="none"
        )
        token_losses.append(losses.detach())
        part = losses.sum() / batch.num_valid
        loss += part.detach()
        del logits
        if dhidden is not None:
            wanted = [hidden] if dweight is None else [hidden, weight]
            grads = torch.autograd.grad(part, wanted)
            dhidden[rows] = grads[0]
            if dweight is not None:
                dweight += grads[1]
    dweight = None if dweight is None else dweight.to(dtype)
    return Result(loss, dhidden, dweight, torch.cat(token_losses))


def truth_of(batch: Batch, mode: str) -> Result:
    """Loss and gradients in the widest dtype that fits, with honest float32 products."""
    # Unlike `get_float32_matmul_precision` this can be read whichever API it was set by.
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        return plain_result(batch, mode, truth_dtype(batch))
    finally:
        matmul.fp32_precision = precision


def truth_dtype(batch: Batch) -> torch.dtype:
    """float64 where the device has it and the truth fits into its free memory, else float32."""
    device = batch.weight.device
    if device.type == "cuda":
        num_tokens, vocab_size = len(batch.labels), len(batch.weight)
        # The head, its gradient and that of a chunk; five tiles of logits.
        elements = 3 * batch.weight.numel() + batch.hidden.numel() + 5 * _CHUNK_TOKENS * vocab_size
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.float64 if 8 * (elements + num_tokens) < free + cached else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


def relative_error(ours: Tensor | None, truth: Tensor | None) -> float | None:
    """Norm of the difference over the norm of the truth; infinite if a value is missing."""
    if truth is None:
        return None
    if ours is None:
        return float("inf")
    squared = truth.new_zeros(())
    # By blocks of rows: the difference of a whole head in float64 may not fit beside it.
    for mine, true in zip(_blocks(ours.detach()), _blocks(truth), strict=True):
        squared += (mine.to(truth.dtype) - true).square_().sum()
    error = (squared.sqrt() / truth.norm()).item()
    return error if error == error else float("inf")


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.split(16384) if tensor.dim() else (tensor,)


def errors_of(result: Result, truth: Result) -> Errors:
    """The three relative errors of a result."""
    pairs = zip(result[:3], truth[:3], strict=True)
    return Errors(*(relative_error(ours, true) for ours, true in pairs))


def errors_of_stock(stock: Result, truth: Result) -> Errors:
    """The errors of stock arithmetic that others are held against; both from `plain_result`.

    The errors of its tokens, each about 1e-2 nats in bfloat16, cancel in the mean of a batch, more
    or less as luck has it. For the loss it is therefore what they leave on average: their root mean
    square over the root of their number.
    """
    errors = errors_of(stock, truth)
    if stock.token_losses is None or truth.token_losses is None:
        return errors
    spread = (stock.token_losses.to(truth.loss.dtype) - truth.token_losses).norm()
    num_valid = (truth.token_losses != 0).sum().clamp_min(1)
    return errors._replace(loss=max(errors.loss or 0.0, (spread / num_valid / truth.loss).item()))


def objections(errors: Errors, stock: Errors, dtype: torch.dtype) -> list[str]:
    """Where `errors` exceed twice what stock arithmetic in the same dtype reaches.

    Args:
        errors: Of the result that is judged.
        stock: Of plain torch in `dtype`, from `errors_of_stock`.
        dtype: The dtype of the inputs; the epsilon of its accumulators is added to stock's error,
            which may be smaller than that by luck.

    Returns:
        One phrase a tensor that is too far off; empty when the result passes.
    """
    eps = torch.finfo(accumulation_dtype(dtype)).eps
    found = []
    for name, ours, theirs in zip(Errors._fields, errors, stock, strict=True):
        budget = 2 * ((theirs or 0.0) + eps)
        if ours is not None and not ours <= budget:
            found.append(f"{name} error {ours:.2e} exceeds {budget:.2e}")
    return found
