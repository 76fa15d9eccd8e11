"""`torch.func` and dual tensors on patched models: stock's values, or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from causal_loss import in_float64
from oracle import assert_close_as_torch
from peft_cases import filled, lora
from tiny_models import batch, build
from torch import Tensor, func, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from hf_fused_head import apply_patch, patch_report


class Model:
    """A model as a function of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inputs = batch(model)
        self.parameters = {n: p.detach() for n, p in self.model.named_parameters()}
        source = torch.Generator().manual_seed(7)
        self.tangents = {
            name: torch.randn(p.shape, generator=source).to(p)
            for name, p in self.parameters.items()
        }

    def loss(self, parameters: dict[str, Tensor]) -> Tensor:
        return func.functional_call(self.model, parameters, kwargs=self.inputs).loss


def of_one_sequence(
    model: Model, parameters: dict[str, Tensor], ids: Tensor, labels: Tensor
) -> Any:
    inputs = {"input_ids": ids[None], "labels": labels[None]}
    return func.functional_call(model.model, parameters, kwargs=inputs).loss


def stacked(model: Model) -> dict[str, Tensor]:
    members = [copy.deepcopy(model.model) for _ in range(2)]
    with torch.no_grad():
        for name, parameter in members[1].named_parameters():
            parameter.add_(model.tangents[name], alpha=0.01)
    return func.stack_module_state(members)[0]


def by_dual_tensors(model: Model, trained: bool) -> Any:
    model.model.requires_grad_(trained)
    with forward_ad.dual_level():
        parameters = dict(model.model.named_parameters())
        duals = {n: forward_ad.make_dual(p, model.tangents[n]) for n, p in parameters.items()}
        return [value.detach() for value in forward_ad.unpack_dual(model.loss(duals))]


CASES: dict[str, Callable[[Model], Any]] = {
    "jvp": lambda model: func.jvp(model.loss, (model.parameters,), (model.tangents,)),
    "grad": lambda model: func.grad(model.loss)(model.parameters),
    "ensemble": lambda model: func.vmap(model.loss)(stacked(model)),
    "gradients of an ensemble": lambda model: func.vmap(func.grad(model.loss))(stacked(model)),
    "gradients of each sequence": lambda model: func.vmap(
        func.grad(lambda *args: of_one_sequence(model, *args)), (None, 0, 0)
    )(model.parameters, model.inputs["input_ids"], model.inputs["labels"]),
    "dual tensors": lambda model: by_dual_tensors(model, True),
    "dual tensors, frozen": lambda model: by_dual_tensors(model, False),
}


BATCHES = ("ensemble", "gradients of an ensemble", "gradients of each sequence")


def tiny(family: str, **adapter: Any) -> nn.Module:
    """A tiny model, with an adapter on its head where there are options for one."""
    model = build(family)
    model.set_attn_implementation("eager")
    return filled(lora(**adapter)(model)) if adapter else model


def compare(case: Callable[[Model], Any], stock: nn.Module) -> None:
    """Fails unless the patched model is as near to float64 as stock is."""
    models = apply_patch(copy.deepcopy(stock)), stock, in_float64(stock)
    found = [pytree.tree_leaves(case(Model(model))) for model in models]
    for index, (got, expected, exact) in enumerate(zip(*found, strict=True)):
        assert_close_as_torch(f"result {index}", got, expected, exact)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(
    ("family", "adapter"), [("gemma2", {}), ("gpt2", {}), ("llama", {"r": 4})], ids=str
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_patched_model(
    case: Callable[[Model], Any], family: str, adapter: dict[str, Any], grad: bool
) -> None:
    with torch.set_grad_enabled(grad):
        compare(case, tiny(family, **adapter))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", CASES)
def test_a_head_in_chunks_takes_no_batch(name: str, grad: bool) -> None:
    stock = tiny("llama", use_dora=True)
    with torch.set_grad_enabled(grad):
        if name not in BATCHES:
            compare(CASES[name], stock)
            return
        model = Model(apply_patch(copy.deepcopy(stock)))
        with pytest.raises(NotImplementedError, match=r"must not run under torch\.vmap"):
            CASES[name](model)
    model.model(**model.inputs)
    assert patch_report(model.model).fused
