"""Tensors that stand for a shape alone: FakeTensorMode, the meta device, torch.export."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from causal_loss import in_float64
from oracle import assert_close_as_torch
from peft import LoraConfig, get_peft_model
from plain_head import NAMES, Problem, by_ours, by_plain, results, widened
from tiny_models import batch, build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from trains_like import assert_gradients_close, loss_and_gradients

from hf_fused_head import UnsupportedModelError, apply_patch, last_stats, linear_cross_entropy
from hf_fused_head.patches.errors import LogitsUnavailableError

pytestmark = pytest.mark.newest


def on_meta() -> AbstractContextManager[Any]:
    return torch.device("meta")


MODES = [FakeTensorMode, on_meta]
Mode = Callable[[], AbstractContextManager[Any]]


def looks(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, type(tensor)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_has_the_looks_of_torchs(reduction: str, mode: Mode) -> None:
    with mode():
        tensors = torch.randn(7, 8), torch.randn(37, 8), torch.randint(37, (7,))
        hidden, weight, target = tensors
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        ours = linear_cross_entropy(*tensors, reduction=reduction)
        plain = F.cross_entropy(F.linear(*leaves), target, reduction=reduction)
        found, wanted = ((each, *torch.autograd.grad(each.sum(), leaves)) for each in (ours, plain))
    assert list(map(looks, found)) == list(map(looks, wanted))


def llama(lora: bool) -> Any:
    model = build("llama", tie_word_embeddings=not lora)
    if not lora:
        return model
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


def without_values(model: nn.Module, inputs: dict[str, Tensor], mode: Any) -> dict[str, Tensor]:
    """Moves a model into the mode, in place; its inputs there."""
    if not isinstance(mode, FakeTensorMode):
        model.to("meta")
        return {name: value.to("meta") for name, value in inputs.items()}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            kept.update({k: mode.from_tensor(v) for k, v in kept.items() if v is not None})
    return {name: mode.from_tensor(value) for name, value in inputs.items()}


@pytest.mark.parametrize("make_mode", MODES)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_a_patched_model_has_the_looks_of_stock(lora: bool, make_mode: Mode) -> None:
    models = [llama(lora), apply_patch(llama(lora), stats=("accuracy",))]
    found = []
    for model in models:
        inputs = batch(model)
        with make_mode() as mode:
            inputs = without_values(model, inputs, mode)
            output = model(**inputs)
            output.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        shown = output.logits.shape, output.logits.dtype, output.logits.device
        found.append([*map(looks, (output.loss, *grads)), shown])
    assert found[0] == found[1]
    assert looks(last_stats(models[1]).nll)[1:] == looks(output.loss)[1:]


@pytest.mark.parametrize("make_mode", MODES)
def test_a_head_in_chunks_is_refused_by_name(make_mode: Mode) -> None:
    model = build("llama", tie_word_embeddings=False)
    model.lm_head = nn.Sequential(model.lm_head)
    apply_patch(model)
    inputs = batch(model)
    with make_mode() as mode:
        inputs = without_values(model, inputs, mode)
        with pytest.raises(UnsupportedModelError, match="must be run on tensors with values"):
            model(**inputs)


def test_a_head_in_chunks_is_not_exported() -> None:
    model = build("llama", tie_word_embeddings=False, use_cache=False)
    model.lm_head = nn.Sequential(model.lm_head)
    apply_patch(model)
    with pytest.raises(UnsupportedModelError, match="must be run on tensors with values"):
        torch.export.export(model, (), batch(model), strict=False)


def exported(model: nn.Module, inputs: dict[str, Tensor], strict: bool = False) -> ExportedProgram:
    """A program that takes any length, after a journey through a file."""
    lengths = {name: {1: Dim.AUTO} for name in inputs}
    program = torch.export.export(model, (), inputs, strict=strict, dynamic_shapes=lengths)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["trace", "strict"]
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_exported_model_trains_as_stock(family: str, strict: bool) -> None:
    # Loaded programs have two parameters for one that was tied, of stock models too.
    stock = build(family, use_cache=False, tie_word_embeddings=False)
    fused = apply_patch(copy.deepcopy(stock), stats=("accuracy",))
    program = exported(fused, batch(stock, length=9), strict).module()
    inputs = batch(stock, length=14)
    losses, grads = zip(
        *(loss_and_gradients(m, inputs) for m in (program, stock, in_float64(stock))), strict=True
    )
    assert_close_as_torch("loss", *losses)
    assert_gradients_close(*grads)
    with pytest.raises(LogitsUnavailableError, match="without labels"):
        program(**inputs).logits.argmax(-1)
    assert last_stats(fused) is None


class Loss(nn.Module):
    """A problem's loss, of tensors that are its inputs."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def forward(self, **tensors: Tensor) -> Tensor:
        return by_ours(self.problem, "auto")(tensors)


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}, {"reduction": "none"}],
    ids=str,
)
def test_an_exported_loss_has_all_gradients(options: dict[str, Any]) -> None:
    problem = Problem(options=options, class_weight=True)
    tensors = problem.tensors(torch.float32)
    leaves = {name: value.requires_grad_(name in NAMES) for name, value in tensors.items()}
    program = torch.export.export(Loss(problem), (), leaves, strict=False).module()
    upstream = torch.ones(problem.shape if "reduction" in options else ())
    ours = results(lambda given: program(**given), tensors, upstream)
    plain = results(by_plain(problem), tensors, upstream)
    truth = results(by_plain(problem), widened(tensors), upstream.double())
    for name, value in ours.items():
        assert_close_as_torch(name, value, plain[name], truth[name])


def test_a_fake_loss_is_none_of_a_real_one() -> None:
    """A fake run leaves the patched model as it was."""
    model = apply_patch(build("llama"))
    inputs = batch(model)
    expected = model(**inputs).loss
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss = model(**{name: mode.from_tensor(value) for name, value in inputs.items()}).loss
    assert isinstance(loss, FakeTensor)
    assert torch.equal(model(**inputs).loss, expected)
