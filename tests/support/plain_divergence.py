"""The divergence of two heads by plain torch operations, and the pairs of heads it is asked of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from oracle import assert_close_as_torch, farthest
from places import generator
from plain_head import plain_logits
from torch import Tensor

from hf_fused_head import linear_kl_div

NAMES = ("student", "student_weight", "student_bias")
TEACHER = ("teacher", "teacher_weight", "teacher_bias")
Divergence = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Pair:
    """Shapes and contents of two heads; `tensors()` makes them."""

    shape: tuple[int, ...] = (3, 7)
    sizes: tuple[int, int] = (8, 12)
    vocab_size: int = 37
    masked: int = 4
    confident: bool = False  # both are nearly sure of one class
    scale: float = 1.0  # of the hidden states
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Pair:
        """The same heads with other options."""
        return replace(self, options={**self.options, **options})

    def tensors(self, dtype: torch.dtype, teacher: torch.dtype | None = None) -> dict[str, Tensor]:
        """Both heads and the mask; multiples of 1/16, so that products are exact in float32."""
        source = generator(sum(self.shape) + self.vocab_size)
        made: dict[str, Tensor] = {}
        favourite = torch.randint(0, self.vocab_size, self.shape, generator=source)
        for names, size, kind in ((NAMES, self.sizes[0], dtype), (TEACHER, self.sizes[1], teacher)):
            hidden = torch.randn(*self.shape, size, generator=source) * self.scale
            weight = torch.randn(self.vocab_size, size, generator=source) * size**-0.5
            if self.confident:
                weight = F.normalize(weight, dim=-1)
                hidden = hidden + 60 * weight[favourite]
            bias = torch.randn(self.vocab_size, generator=source)
            rounded = ((t * 16).round() / 16 for t in (hidden, weight, bias))
            values = (t.to(dtype if kind is None else kind) for t in rounded)
            made.update(zip(names, values, strict=True))
        if self.masked:
            flat = torch.ones(favourite.numel(), dtype=torch.bool)
            flat[torch.randperm(flat.numel(), generator=source)[: self.masked]] = False
            made["mask"] = flat.view(self.shape)
        return made


def plain_divergence(log_p: Tensor, log_q: Tensor, beta: float, as_sum: bool = False) -> Tensor:
    """Of log-probabilities, summed over the last dimension; a mixture by logarithms or as a sum."""

    def kl(of: Tensor, other: Tensor) -> Tensor:
        return F.kl_div(other, of, reduction="none", log_target=True).sum(dim=-1)

    if beta == 0:
        return kl(log_q, log_p)
    if beta == 1:
        return kl(log_p, log_q)
    m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    if as_sum:
        m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * kl(log_q, m) + (1 - beta) * kl(log_p, m)


def plain_log_probs(tensors: dict[str, Tensor], options: dict[str, Any], head: str) -> Tensor:
    """Log-probabilities of one head; its name is "student" or "teacher"."""
    shape = options.get(f"{head}_logit_scale", 1.0), options.get(f"{head}_softcap")
    operands = (tensors[head], tensors[f"{head}_weight"], tensors.get(f"{head}_bias"))
    logits = plain_logits(*operands, *shape)
    return (logits / options.get("temperature", 1.0)).log_softmax(dim=-1)


def by_plain(pair: Pair, as_sum: bool = False) -> Divergence:
    """The pair's divergence by plain operations."""
    options = pair.options

    def divergence(tensors: dict[str, Tensor]) -> Tensor:
        log_p, log_q = (plain_log_probs(tensors, options, head) for head in ("student", "teacher"))
        dtype = torch.promote_types(log_p.dtype, log_q.dtype)
        log_p, log_q = log_p.to(dtype), log_q.to(dtype)
        per_token = plain_divergence(log_p, log_q, options.get("beta", 0.0), as_sum)
        return plain_reduction(per_token, tensors.get("mask"), options)

    return divergence


def plain_reduction(per_token: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The loss from the divergence of every token."""
    mask = torch.ones_like(per_token, dtype=torch.bool) if mask is None else mask
    per_token = torch.where(mask, per_token, 0.0)
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        return per_token
    if reduction == "sum":
        return per_token.sum()
    return per_token.sum() / options.get("num_items", mask.sum())


def by_ours(pair: Pair, impl: str, memory_budget_mib: float | None = None) -> Divergence:
    """The pair's divergence by the public function."""

    def divergence(tensors: dict[str, Tensor]) -> Tensor:
        heads = {name: tensors[name] for name in (*NAMES, *TEACHER) if name in tensors}
        return linear_kl_div(
            **heads,
            mask=tensors.get("mask"),
            impl=impl,  # type: ignore[arg-type]
            memory_budget_mib=memory_budget_mib,
            **pair.options,
        )

    return divergence


def results(
    divergence: Divergence, tensors: dict[str, Tensor], upstream: Tensor | None = None
) -> dict[str, Tensor]:
    """The loss and the gradients of the student's tensors, under their names."""
    wanted = [name for name in NAMES if name in tensors]
    leaves = {name: tensors[name].clone().requires_grad_() for name in wanted}
    value = divergence({**tensors, **leaves})
    grads = torch.autograd.grad(value, list(leaves.values()), upstream)
    return {"loss": value.detach(), **dict(zip(wanted, grads, strict=True))}


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64."""
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def upstream_of(pair: Pair, dtype: torch.dtype) -> Tensor:
    """An upstream gradient, a vector of random numbers where the loss is one per token."""
    if pair.options.get("reduction") == "none":
        return torch.randn(pair.shape, generator=generator(5)).to(dtype)
    return torch.tensor(0.75, dtype=dtype)


def check(pair: Pair, divergence: Divergence, tensors: dict[str, Tensor]) -> None:
    """Fails unless loss and gradients are as near to float64 as torch's own in these dtypes."""
    dtype = tensors["student"].dtype
    double = torch.float64 in (dtype, tensors["teacher"].dtype)
    wide = torch.float64 if double else torch.float32
    upstream = upstream_of(pair, wide)
    ours = results(divergence, tensors, upstream)
    plain = [results(by_plain(pair, as_sum), tensors, upstream) for as_sum in (False, True)]
    plain.append(_backwards(pair, tensors, upstream))
    truth = results(by_plain(pair), widened(tensors), upstream.double())
    for name, value in ours.items():
        expected = wide if name == "loss" else dtype
        if value.dtype != expected:
            raise AssertionError(f"{name}: dtype {value.dtype}, expected {expected}")
        worst = farthest([each[name] for each in plain], truth[name])
        assert_close_as_torch(name, value, worst, truth[name])


def _backwards(pair: Pair, tensors: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """As plain operations have it with the classes in the opposite order."""
    of_classes = [*NAMES[1:], *TEACHER[1:]]
    flipped = {n: t.flip(0) if n in of_classes else t for n, t in tensors.items()}
    found = results(by_plain(pair), flipped, upstream)
    return {name: t.flip(0) if name in of_classes else t for name, t in found.items()}
