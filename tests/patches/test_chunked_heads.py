"""Heads that run their own forward on chunks of tokens: the gradients of any number of chunks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from allocation_spy import AllocationSpy
from causal_loss import in_float64
from oracle import assert_close_as_torch, assert_norm_as_torch
from peft_cases import CASES, lora, wrapped
from tiny_models import batch, build
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from trains_like import assert_trains_like

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report

# One token a chunk at the small one, all tokens in one chunk at the default.
BUDGETS_MIB = [None, 0.01]
VOCAB_SIZE = 512


class Shifted(nn.Module):
    """A head that adds a tensor which is no parameter of it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.shift: tuple[Tensor, ...] = ()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) + self.shift[0]


class Interrupted(nn.Module):
    """A head whose backward fails in the chunk in which it is told to."""

    failing = 0

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden)
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, grad: Tensor) -> None:
        self.failing -= 1
        if self.failing == 0:
            raise ArithmeticError


def with_head(make: Callable[[nn.Linear], nn.Module]) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        model.lm_head = make(model.lm_head)
        return model

    return change


HEADS: dict[str, Callable[[Any], Any]] = {
    "module": with_head(nn.Sequential),
    "dora": lora(use_dora=True),
    "oft": CASES["oft"].wrap,
    "ia3": CASES["ia3"].wrap,
    "loha": CASES["loha"].wrap,
}


def tiny(name: str, **settings: Any) -> Any:
    settings = {"tie_word_embeddings": False, "vocab_size": VOCAB_SIZE, **settings}
    return wrapped(HEADS[name], build("llama", **settings))


def head_of(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_output_embeddings()


def tokens(model: Any) -> dict[str, Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return batch(base, rows=2, length=200)


def gradients_of_head(model: Any, inputs: dict[str, Any], head: Any = None) -> dict[str, Tensor]:
    head = head_of(model) if head is None else head
    head.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()
    found = {name: p.grad for name, p in head.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}


def true_gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Of the head in float64, on the hidden states that the model itself makes."""
    seen: list[Tensor] = []
    head = head_of(model)
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=inputs["input_ids"])
    handle.remove()
    exact = copy.deepcopy(head).double()
    logits = exact(seen[0].double())[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten()).backward()
    return {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("name", HEADS)
def test_the_error_does_not_grow_with_the_number_of_chunks(name: str, autocast: bool) -> None:
    stock = tiny(name) if autocast else tiny(name).bfloat16()
    inputs = tokens(stock)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = gradients_of_head(stock, inputs)
        with torch.autocast("cpu", enabled=False):
            truth = true_gradients(stock, inputs)
        for memory_budget_mib in BUDGETS_MIB:
            fused = apply_patch(copy.deepcopy(stock), memory_budget_mib=memory_budget_mib)
            found = gradients_of_head(fused, inputs)
            assert patch_report(fused).kernel.startswith("the forward of")
            assert found.keys() == expected.keys() == truth.keys()
            for key, grad in found.items():
                assert grad.dtype == expected[key].dtype
                assert_norm_as_torch(key, grad, expected[key], truth[key])


def from_elsewhere(model: Any) -> Any:
    """The model with a head that adds a tensor made of the embeddings before the forward."""
    head = model.lm_head = Shifted(model.lm_head)

    def provide(module: nn.Module, args: Any) -> None:
        head.shift = (4 * model.get_input_embeddings().weight.mean(-1),)

    model.model.register_forward_pre_hook(provide)
    return model


def test_a_tensor_that_is_no_parameter_of_the_head_gets_its_gradient() -> None:
    """Also in a backward of its own, which does not run that of the head."""
    found, truth = [], None
    for fuse in (False, True):
        model = from_elsewhere(build("llama", tie_word_embeddings=False, vocab_size=VOCAB_SIZE))
        model = model.bfloat16()
        inputs = tokens(model)
        if fuse:
            apply_patch(model, memory_budget_mib=0.01)
        loss = model(**inputs).loss
        model.lm_head.shift[0].sum().backward(retain_graph=True)
        alone = model.get_input_embeddings().weight.grad.clone()
        shift = model.lm_head.shift[0]
        found.append((alone, *torch.autograd.grad(loss, [shift], retain_graph=True)))
    truth = true_shift_gradient(model, inputs)
    assert torch.equal(found[0][0], found[1][0])
    assert_norm_as_torch("shift", found[1][1], found[0][1], truth)


def true_shift_gradient(model: Any, inputs: dict[str, Any]) -> Tensor:
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=inputs["input_ids"])
    handle.remove()
    shift = model.lm_head.shift[0].detach().double().requires_grad_()
    logits = seen[0].double() @ model.lm_head.linear.weight.double().t() + shift
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    )
    return torch.autograd.grad(loss, shift)[0]


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)], ids=["weight", "embeddings", "both"])
def test_every_backward_of_one_forward_gives_the_same_gradients(wanted: tuple[int, ...]) -> None:
    """The first one may end in an exception; a backward may want some gradients only."""
    model = tiny("module").bfloat16()
    model.lm_head = Interrupted(model.lm_head[0])
    inputs = tokens(model)
    apply_patch(model, memory_budget_mib=0.01)
    parameters = [model.lm_head.linear.weight, model.get_input_embeddings().weight]
    model(**inputs).loss.backward()
    expected = [p.grad for p in parameters]
    loss = model(**inputs).loss
    model.lm_head.failing = 20
    with pytest.raises(ArithmeticError):
        loss.backward(retain_graph=True)
    for _ in range(2):
        grads = torch.autograd.grad(loss, [parameters[i] for i in wanted], retain_graph=True)
        for index, grad in zip(wanted, grads, strict=True):
            assert torch.equal(grad, expected[index])


def test_the_work_for_a_token_does_not_grow_with_the_number_of_tokens() -> None:
    """The gradient of all hidden states is written as often for many chunks as for few."""
    writes = []
    for length in (20, 80):
        model = tiny("module")
        inputs = batch(model, rows=1, length=length)
        apply_patch(model, memory_budget_mib=0.01)
        loss = model(**inputs).loss
        with AllocationSpy() as spy:
            loss.backward()
        writes.append(sum(shape in ((length, 16), (1, length, 16)) for _, shape, _ in spy.seen))
    assert writes[0] == writes[1]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_runs_the_head_between_its_graphs() -> None:
    fused = tiny("module", num_hidden_layers=1).bfloat16()
    inputs = tokens(fused)
    truth = true_gradients(fused, inputs)
    compiled, found = torch.compile(fused), []
    for memory_budget_mib in BUDGETS_MIB:
        apply_patch(fused, memory_budget_mib=memory_budget_mib)
        found.append(gradients_of_head(compiled, inputs, fused.lm_head)["0.weight"])
        assert patch_report(fused).fused
    assert_norm_as_torch("weight in many chunks", found[1], found[0], truth["0.weight"])


@pytest.mark.usefixtures("fresh_compiler")
def test_a_head_in_chunks_is_no_single_graph() -> None:
    fused = apply_patch(tiny("module", num_hidden_layers=1))
    with pytest.raises(Unsupported, match=r"not taken apart.*without fullgraph"):
        torch.compile(fused, fullgraph=True)(**tokens(fused))


@pytest.mark.parametrize("name", ["module", "dora"])
def test_the_reference_runs_the_head_once_on_all_tokens(name: str) -> None:
    stock = tiny(name)
    fused, inputs, seen = apply_patch(copy.deepcopy(stock), impl="reference"), tokens(stock), []
    assert_trains_like(fused, stock, inputs)
    report = patch_report(fused)
    assert report.kernel.endswith("on all tokens at once") and "at once" in report.schedule
    part = next(module for module in head_of(fused).modules() if not list(module.children()))
    part.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    fused(**inputs).loss.backward()
    assert seen == [int((inputs["labels"][:, 1:] != -100).sum())]


@pytest.mark.parametrize("strict", [True, False])
def test_a_module_is_no_head_for_the_kernels(strict: bool) -> None:
    """Known when the model is patched."""
    model = tiny("module")
    reason = r"`impl` must be 'auto', 'torch' or 'reference' for Sequential.*got 'triton'"
    with (
        pytest.raises(UnsupportedModelError, match=reason) if strict else pytest.warns(match=reason)
    ):
        apply_patch(model, impl="triton", strict=strict)
    report = patch_report(model)
    assert not report.fused and (strict or "got 'triton'" in report.reason)


def test_an_adapter_that_is_no_head_for_the_kernels_is_refused_by_the_first_forward() -> None:
    model = apply_patch(tiny("dora"), impl="triton")
    with pytest.raises(UnsupportedModelError, match=r"`impl` must be 'auto'.*Linear.*got 'triton'"):
        model(**tokens(model))
    assert not patch_report(model).fused


def head_weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lm_head" in name}


def loss_of_weights(model: Any, inputs: dict[str, Any]) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda weights: torch.func.functional_call(model, weights, (), inputs).loss


def tangent(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Of the loss, with the head's weights as their own tangents."""
    weights = head_weights(model)
    return [torch.func.jvp(loss_of_weights(model, inputs), (weights,), (weights,))[1]]


def functional_gradients(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    gradients = torch.func.grad(loss_of_weights(model, inputs))(head_weights(model))
    return list(gradients.values())


def second_derivatives(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    weights = [p for p in head_of(model).parameters() if p.requires_grad]
    grads = torch.autograd.grad(model(**inputs).loss, weights, create_graph=True)
    return list(torch.autograd.grad(sum(grad.square().sum() for grad in grads), weights))


@pytest.mark.parametrize("derivatives", [tangent, functional_gradients, second_derivatives])
@pytest.mark.parametrize("name", ["module", "dora"])
def test_other_derivatives_are_those_of_stock(name: str, derivatives: Callable) -> None:
    stock = tiny(name, num_hidden_layers=1)
    inputs = {key: value[:, :20] for key, value in tokens(stock).items()}
    fused = apply_patch(copy.deepcopy(stock), memory_budget_mib=0.01)
    results = [derivatives(model, inputs) for model in (fused, stock, in_float64(stock))]
    for ours, expected, truth in zip(*results, strict=True):
        assert_close_as_torch(name, ours, expected, truth)
    assert patch_report(fused).fused


def test_a_batch_of_models_is_refused_by_name() -> None:
    model = apply_patch(tiny("module", num_hidden_layers=1))
    inputs = tokens(model)
    weights = {name: torch.stack([p, p]) for name, p in head_weights(model).items()}
    with pytest.raises(NotImplementedError, match=r"Sequential head.*torch\.vmap.*each part"):
        torch.vmap(loss_of_weights(model, inputs))(weights)
    assert model(**inputs).loss.requires_grad and patch_report(model).fused
