"""The loss by plain torch operations, the problems it is asked about, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from oracle import assert_close_as_torch
from places import generator
from torch import Tensor

from hf_fused_head import linear_cross_entropy

NAMES = ("hidden", "weight", "bias")


def plain_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The logits as a model makes them: in its dtype, then float32 (float64 stays)."""
    return shaped_logits(F.linear(hidden, weight, bias), logit_scale, softcap)


def shaped_logits(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """The product of hidden states and head as float32 logits, scaled and capped."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight_of_class: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    num_items: float | None = None,
) -> Tensor:
    """What `linear_cross_entropy` promises, written with `F.cross_entropy`."""
    logits = plain_logits(hidden, weight, linear_bias, logit_scale, softcap)
    rest = (reduction, ignore_index, label_smoothing, z_loss, num_items)
    return loss_of_logits(logits, target, weight_of_class, *rest)


def loss_of_logits(
    logits: Tensor,
    target: Tensor,
    weight_of_class: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items: float | None = None,
) -> Tensor:
    """The part of `plain_loss` after the logits, [..., vocab]."""
    logits, flat = logits.flatten(0, -2), target.flatten()
    class_weight = None if weight_of_class is None else weight_of_class.to(logits.dtype)
    inner = "sum" if reduction == "mean" and num_items is not None else reduction
    loss = F.cross_entropy(
        logits,
        flat,
        class_weight,
        reduction=inner,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    valid = flat != ignore_index
    squared = z_loss * logits.logsumexp(dim=-1) ** 2 * valid
    if reduction == "none":
        return (loss + squared).view(target.shape)
    if reduction == "sum":
        return loss + squared.sum()
    if num_items is not None:
        return (loss + squared.sum()) / num_items
    return loss if z_loss == 0 else loss + squared.sum() / valid.sum()


@dataclass(frozen=True)
class Problem:
    """Shapes and contents of one head; `tensors()` makes them."""

    shape: tuple[int, ...] = (3, 7)
    hidden_size: int = 8
    vocab_size: int = 37
    bias: bool = True
    ignored: int = 4
    class_weight: bool = False
    confident: bool = False  # nearly sure of the labels
    surprised: bool = False  # nearly sure of other classes than the labels
    shift: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Problem:
        """The same head with other options."""
        return replace(self, options={**self.options, **options})

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """hidden, weight, bias, target, class_weight; every number is exact in `dtype`."""
        source = generator(hash(self.shape) % 2**31 + self.vocab_size)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source)

        hidden = normal(*self.shape, self.hidden_size)
        weight = normal(self.vocab_size, self.hidden_size) * self.hidden_size**-0.5
        target = torch.randint(0, self.vocab_size, self.shape, generator=source)
        bias = normal(self.vocab_size) + self.shift
        if self.confident or self.surprised:
            expected = (target + self.surprised) % self.vocab_size
            hidden = hidden + 30 * F.normalize(weight[expected], dim=-1)
        flat = target.view(-1)
        if flat.numel() > 1:
            flat[-1] = self.vocab_size - 1
        if self.ignored:
            places = torch.randperm(flat.numel(), generator=source)[: self.ignored]
            flat[places] = self.options.get("ignore_index", -100)
        made = {"hidden": hidden, "weight": weight, "bias": bias}
        made = {name: value.to(dtype) for name, value in made.items()}
        class_weight = torch.rand(self.vocab_size, generator=source) + 0.5
        made["target"] = target
        made["class_weight"] = class_weight.to(dtype)
        if not self.bias:
            del made["bias"]
        if not self.class_weight:
            del made["class_weight"]
        return made


Loss = Callable[..., Tensor]


def by_plain(problem: Problem) -> Loss:
    """The problem's loss by plain operations, of hidden, weight and bias."""

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return plain_loss(
            tensors["hidden"],
            tensors["weight"],
            tensors["target"],
            linear_bias=tensors.get("bias"),
            weight_of_class=tensors.get("class_weight"),
            **problem.options,
        )

    return loss


def by_ours(problem: Problem, impl: str, memory_budget_mib: float | None = None) -> Loss:
    """The problem's loss by the public function."""

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return linear_cross_entropy(
            tensors["hidden"],
            tensors["weight"],
            tensors["target"],
            linear_bias=tensors.get("bias"),
            weight=tensors.get("class_weight"),
            impl=impl,
            memory_budget_mib=memory_budget_mib,
            **problem.options,
        )

    return loss


def results(loss: Loss, tensors: dict[str, Tensor], upstream: Tensor | None) -> dict[str, Tensor]:
    """The loss and the gradients of everything with one, under their names."""
    leaves = {
        name: value.clone().requires_grad_() if name in NAMES else value
        for name, value in tensors.items()
    }
    value = loss(leaves)
    wanted = [name for name in NAMES if name in leaves]
    grads = torch.autograd.grad(value, [leaves[name] for name in wanted], upstream)
    return {"loss": value.detach(), **dict(zip(wanted, grads, strict=True))}


def exact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiples of 1/16 near these numbers: logits are exact in whatever pieces they are made."""
    return {n: (t * 16).round() / 16 if n in NAMES else t for n, t in tensors.items()}


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64."""
    return {
        name: value.double() if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def check(problem: Problem, loss: Loss, dtype: torch.dtype = torch.float32) -> None:
    """Fails unless loss and gradients are as near to float64 as torch's own in this dtype."""
    tensors = problem.tensors(dtype)
    per_token = problem.options.get("reduction") == "none"
    upstream = torch.randn(problem.shape) if per_token else torch.tensor(0.75)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ours = results(loss, tensors, upstream.to(wide))
    plain = results(by_plain(problem), tensors, upstream.to(wide))
    truth = results(by_plain(problem), widened(tensors), upstream.double())
    for name, value in ours.items():
        expected = wide if name == "loss" else dtype
        if value.dtype != expected:
            raise AssertionError(f"{name}: dtype {value.dtype}, expected {expected}")
        assert_close_as_torch(name, value, plain[name], truth[name])
