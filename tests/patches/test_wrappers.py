"""Who else works on the model: casts, sizes, ties, devices, quantisers, others' kernels."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator, dispatch_model
from causal_loss import causal_loss
from oracle import assert_close_as_torch
from peft import LoraConfig, get_peft_model
from places import SUPPORT
from tiny_models import batch, build
from torch import Tensor, nn
from trains_like import assert_trains_like, loss_and_gradients, same_modules

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report, remove_patch
from hf_fused_head.patches.lazy_logits import LazyLogits

pytestmark = pytest.mark.newest


def untied(**settings: Any) -> Any:
    return build("llama", tie_word_embeddings=False, **settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch, cast", "cast, patch"])
def test_a_model_of_another_dtype(dtype: torch.dtype, patch_first: bool) -> None:
    stock = build("llama").to(dtype)
    fused = apply_patch(build("llama")).to(dtype) if patch_first else apply_patch(stock_copy(stock))
    inputs = batch(stock)
    (loss, grads), (stock_loss, stock_grads), (true_loss, true_grads) = (
        loss_and_gradients(model, inputs) for model in (fused, stock, stock_copy(stock).double())
    )
    assert loss.dtype == stock_loss.dtype
    assert_close_as_torch("loss", loss, stock_loss, true_loss, arithmetic=dtype)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert_close_as_torch(name, grad, stock_grads[name], true_grads[name])
    assert patch_report(fused).fused


def stock_copy(model: Any) -> Any:
    return copy.deepcopy(model)


def resized(model: Any) -> None:
    model.resize_token_embeddings(120, mean_resizing=False)


def shrunk(model: Any) -> None:
    model.resize_token_embeddings(90, mean_resizing=False)


def padded(model: Any) -> None:
    """What follows `tokenizer.add_tokens` in most recipes."""
    model.resize_token_embeddings(103, pad_to_multiple_of=8, mean_resizing=False)


def tied(model: Any) -> None:
    model.config.tie_word_embeddings = True
    model.tie_weights()


def torn_apart(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() * 1.5)


def replaced(model: Any) -> None:
    model.set_output_embeddings(nn.Linear(16, 101))


CHANGES: dict[str, tuple[bool, Callable[[Any], None]]] = {
    "resized": (False, resized),
    "resized, tied": (True, resized),
    "shrunk": (True, shrunk),
    "padded": (True, padded),
    "tied later": (False, tied),
    "torn apart": (True, torn_apart),
    "replaced": (False, replaced),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_head_changed_after_the_patch_trains_like_stock(name: str) -> None:
    tie, change = CHANGES[name]
    model = apply_patch(build("llama", tie_word_embeddings=tie))
    model(**batch(build("llama"))).loss.backward()
    torch.manual_seed(0)
    change(model)
    stock = remove_patch(copy.deepcopy(model))
    inputs = batch(stock)
    for key in inputs:
        inputs[key] = inputs[key].clamp(max=stock.config.vocab_size - 1)
    assert_trains_like(model, stock, inputs)
    head = model.get_output_embeddings()
    report = patch_report(model)
    assert report.fused and report.bias == (head.bias is not None)
    assert report.tied == (head.weight is model.get_input_embeddings().weight)
    assert isinstance(model(**inputs).logits, LazyLogits)


@pytest.mark.parametrize("head", ["cpu", "disk"])
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch first", "patch last"])
def test_a_device_map_over_two_devices(head: str, patch_first: bool, tmp_path: Path) -> None:
    """Weights on disk come for the forward of their module alone; they cannot be trained there."""
    stock = untied()
    model = copy.deepcopy(stock)
    if patch_first:
        apply_patch(model)
    model = dispatch_model(
        model,
        {"model": "cpu", "lm_head": head},
        main_device="cpu",
        offload_dir=str(tmp_path),
        force_hooks=True,
    )
    if not patch_first:
        apply_patch(model)
    inputs = batch(stock)
    if head == "cpu":
        assert_trains_like(model, stock, inputs)
    with torch.no_grad():
        output, expected = model(**inputs), stock(**inputs)
    assert output.loss.item() == pytest.approx(expected.loss.item())
    assert isinstance(output.logits, LazyLogits)
    assert torch.equal(output.logits, expected.logits)
    assert patch_report(model).fused


@pytest.mark.parametrize("patch_at", [0, 1, 2])
def test_mixed_precision_over_device_hooks(patch_at: int) -> None:
    stock, model = untied(), untied()
    steps = [
        lambda m: dispatch_model(m, {"": "cpu"}, main_device="cpu", force_hooks=True),
        Accelerator(cpu=True, mixed_precision="bf16").prepare_model,
    ]
    for step in steps:
        stock = step(stock)
    for step in (*steps[:patch_at], apply_patch, *steps[patch_at:]):
        model = step(model)
    inputs = batch(untied())
    output, expected = model(**inputs), stock(**inputs)
    assert isinstance(output.logits, LazyLogits) and patch_report(model).fused
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3)
    remove_patch(model)
    assert torch.equal(model(**inputs).loss, expected.loss)


def test_data_parallel_without_a_second_device_is_the_model() -> None:
    stock = build("llama")
    fused = nn.DataParallel(apply_patch(copy.deepcopy(stock)))
    inputs = batch(stock)
    assert fused(**inputs).loss.item() == pytest.approx(stock(**inputs).loss.item())
    assert patch_report(fused).fused
    assert same_modules(remove_patch(fused).module, stock)


def kernel_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """What a kernel of the hub does to a layer, on torch."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


def linear_kernel(self: Any, input: Tensor) -> Tensor:
    return nn.functional.linear(input, self.weight, self.bias)


def kernelized(model: Any, names: tuple[str, ...]) -> Any:
    """Layers get the forward of a kernel on the instance, as `use_kernels=True` leaves them."""
    kernels = {"LlamaRMSNorm": kernel_forward, "Linear": linear_kernel}
    for module in model.modules():
        if type(module).__name__ in names:
            module.forward = types.MethodType(kernels[type(module).__name__], module)
    return model


def test_kernels_of_the_hub_compose_but_not_on_the_head() -> None:
    stock = kernelized(untied(), ("LlamaRMSNorm",))
    assert_trains_like(apply_patch(copy.deepcopy(stock)), stock, batch(stock))
    fused = kernelized(apply_patch(untied()), ("LlamaRMSNorm",))
    assert isinstance(fused(**batch(fused)).logits, LazyLogits)
    with pytest.raises(UnsupportedModelError, match=r"on the head \(Linear\), .*linear_kernel"):
        apply_patch(kernelized(untied(), ("Linear",)))
    with pytest.raises(UnsupportedModelError, match=r"on the head \(Linear\), .*linear_kernel"):
        kernelized(fused, ("Linear",))(**batch(fused))


def in_process(code: str) -> None:
    """Runs code in an interpreter of its own, which other libraries may change for good."""
    prelude = f"import sys; sys.path.insert(0, {str(SUPPORT)!r})\n"
    result = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}, which is not installed")


@needs("liger_kernel")
def test_liger_itself() -> None:
    in_process(
        """
        import pytest
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from tiny_models import batch, build
        from hf_fused_head import UnsupportedModelError, apply_patch, patch_report

        before, after, rest = build("llama"), apply_patch(build("llama")), build("llama")
        inputs = batch(before)
        after(**inputs)
        _apply_liger_kernel_to_instance(model=before)
        with pytest.raises(UnsupportedModelError, match="liger_kernel.*without use_liger_kernel"):
            apply_patch(before)
        _apply_liger_kernel_to_instance(model=after)
        assert not patch_report(after).fused
        with pytest.raises(UnsupportedModelError, match="liger_kernel.*without use_liger_kernel"):
            after(**inputs)
        _apply_liger_kernel_to_instance(
            model=rest, fused_linear_cross_entropy=False, cross_entropy=False
        )
        assert patch_report(apply_patch(rest)).fused
        """
    )


def with_lora(model: Any, targets: list[str]) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config)


def exact_loss(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return causal_loss(logits.double(), labels, *args, **kwargs)


def exact(model: Any) -> Any:
    """The model with its loss in float64: what rounds there can be seen, quantised as it is."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.loss_function = exact_loss
    return model


def quantised(folder: Path, bits: int, head_too: bool) -> list[Any]:
    """Three equal models as bitsandbytes loads them; the head is left out unless asked for."""
    untied().save_pretrained(folder)
    skipped = {"llm_int8_skip_modules": ["none"]} if head_too else {}
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **skipped)
    device = {"": 0 if torch.cuda.is_available() else "cpu"}
    return [
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map=device
        )
        for _ in range(3)
    ]


@needs("bitsandbytes")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head", "q_proj"]], ids=["body", "head"])
@pytest.mark.parametrize("head_too", [False, True], ids=["plain head", "quantised head"])
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_bitsandbytes(
    bits: int, head_too: bool, targets: list[str], tmp_path: Path
) -> None:
    stock, fused, truth = (with_lora(m, targets) for m in quantised(tmp_path, bits, head_too))
    inputs = {key: value.to(stock.device) for key, value in batch(stock).items()}
    assert_trains_like(apply_patch(fused), stock, inputs, exact(truth))
    report = patch_report(fused)
    kernels = ("the forward of",) if head_too else ("torch", "triton")
    assert report.fused and report.kernel.startswith(kernels)


@needs("torchao")
def test_torchao_weights_run_in_their_own_layer() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    stock = untied()
    quantize_(stock, Int8WeightOnlyConfig())
    fused, truth = apply_patch(copy.deepcopy(stock)), exact(copy.deepcopy(stock))
    assert_trains_like(fused, stock, batch(stock), truth)
    assert patch_report(fused).kernel.startswith("the forward of")


def test_activations_quantised_over_all_tokens_are_refused() -> None:
    """Dynamic quantisation in torch takes one scale from all rows: chunks would take others."""
    model = untied()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is deprecated.
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    apply_patch(model)
    with pytest.raises(UnsupportedModelError, match="must not depend on other tokens"):
        model(**batch(untied()))
    assert not patch_report(model).fused
