"""A loss or a forward that somebody has replaced is obeyed or refused by name, never ignored."""

from __future__ import annotations

import copy
import functools
import inspect
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from places import SUPPORT
from tiny_models import batch, build
from torch import Tensor, nn
from trains_like import assert_trains_like
from transformers.loss import loss_utils
from transformers.pytorch_utils import Conv1D

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report, remove_patch
from hf_fused_head.patches.lazy_logits import LazyLogits

pytestmark = pytest.mark.newest

Put = Callable[[Any, pytest.MonkeyPatch], None]


class Llama(transformers.LlamaForCausalLM):
    """A class of the test's own, which it may change."""


def untied() -> Any:
    return Llama(build("llama", tie_word_embeddings=False).config)


def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Another loss that looks like the one that it was made from."""

    @functools.wraps(function)
    def twice(*args: Any, **kwargs: Any) -> Tensor:
        return 2 * function(*args, **kwargs)

    return twice


def other_loss(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return logits.float().square().mean()


def other_cross_entropy(source: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return source.float().square().mean()


def fixed_cross_entropy(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setattr(loss_utils, "fixed_cross_entropy", other_cross_entropy)


def wrapped_cross_entropy(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setattr(loss_utils, "fixed_cross_entropy", doubled(loss_utils.fixed_cross_entropy))


def code_of_cross_entropy(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setattr(loss_utils.fixed_cross_entropy, "__code__", other_cross_entropy.__code__)


def compiled_into_the_module(model: Any, put: pytest.MonkeyPatch) -> None:
    """How source is edited at run time."""
    put.setattr(loss_utils, "fixed_cross_entropy", loss_utils.fixed_cross_entropy)
    source = "def fixed_cross_entropy(source, *args, **kwargs): return source.square().mean()"
    exec(source, vars(loss_utils))


def defaults_of_cross_entropy(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setattr(nn.functional.cross_entropy, "__defaults__", (None, None, -100, None, "mean", 0.5))


def defaults_of_the_loss(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setattr(loss_utils.ForCausalLMLoss, "__defaults__", (7, -100, None))


def functional(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setattr(nn.functional, "cross_entropy", doubled(nn.functional.cross_entropy))


def namespace_of_the_module(model: Any, put: pytest.MonkeyPatch) -> None:
    functional = types.SimpleNamespace(pad=nn.functional.pad, cross_entropy=other_cross_entropy)
    put.setattr(loss_utils, "nn", types.SimpleNamespace(functional=functional))


def mapping(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", doubled(loss_utils.ForCausalLMLoss))


def other_mapping(model: Any, put: pytest.MonkeyPatch) -> None:
    others = dict.fromkeys(loss_utils.LOSS_MAPPING, other_loss)
    put.setattr(transformers.modeling_utils, "LOSS_MAPPING", others)


def mapping_and_module(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", other_loss)
    put.setattr(loss_utils, "ForCausalLMLoss", other_loss)


def property_of_the_class(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setattr(Llama, "loss_function", property(lambda self: other_loss), raising=False)


def property_of_every_model(model: Any, put: pytest.MonkeyPatch) -> None:
    other = property(lambda self: other_loss)
    put.setattr(transformers.PreTrainedModel, "loss_function", other)


def property_by_the_type(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setattr(type(model), "loss_function", property(lambda self: other_loss), raising=False)


def method_of_the_class(model: Any, put: pytest.MonkeyPatch) -> None:
    def loss_function(self: Any, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
        return other_loss(logits, labels)

    put.setattr(Llama, "loss_function", loss_function, raising=False)


def attribute_of_the_instance(model: Any, put: pytest.MonkeyPatch) -> None:
    model.loss_function = other_loss


LOSSES: list[Put] = [
    fixed_cross_entropy,
    wrapped_cross_entropy,
    code_of_cross_entropy,
    compiled_into_the_module,
    defaults_of_cross_entropy,
    defaults_of_the_loss,
    functional,
    namespace_of_the_module,
    mapping,
    other_mapping,
    mapping_and_module,
    property_of_the_class,
    property_of_every_model,
    property_by_the_type,
    method_of_the_class,
    attribute_of_the_instance,
]
NAMES = "cross_entropy|ForCausalLMLoss|other_loss|loss_function"


@pytest.mark.parametrize("replace", LOSSES)
def test_a_loss_replaced_before_the_patch_is_refused(
    replace: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = untied()
    before = model(**batch(model)).loss
    replace(model, monkeypatch)
    with pytest.raises(UnsupportedModelError, match=NAMES):
        apply_patch(model)
    with pytest.warns(UserWarning, match=f"stays stock.*({NAMES})"):
        apply_patch(model, strict=False)
    assert not patch_report(model).fused
    assert model(**batch(model)).loss.item() != before.item()


@pytest.mark.parametrize("replace", LOSSES)
@pytest.mark.parametrize("strict", [True, False])
def test_a_loss_replaced_after_the_patch_is_refused(
    strict: bool, replace: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = apply_patch(untied(), strict=strict)
    inputs = batch(model)
    before = model(**inputs).loss
    replace(model, monkeypatch)
    assert not patch_report(model).fused
    if strict:
        with pytest.raises(UnsupportedModelError, match=NAMES):
            model(**inputs)
    else:
        with pytest.warns(UserWarning, match=f"stays stock.*({NAMES})"):
            loss = model(**inputs).loss
        assert torch.equal(loss, model(**inputs).loss)
        assert loss.item() != before.item()
    assert type(model) is Llama and not patch_report(model).fused


@pytest.mark.parametrize("replace", [property_by_the_type, property_of_the_class])
def test_a_loss_that_is_put_back_is_fused_again(replace: Put) -> None:
    model = apply_patch(untied())
    inputs = batch(model)
    expected = model(**inputs).loss
    with pytest.MonkeyPatch.context() as put:
        replace(model, put)
        assert not patch_report(model).fused
    assert torch.equal(model(**inputs).loss, expected) and patch_report(model).fused
    assert "loss_function" not in Llama.__dict__


class Doubled(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


def test_the_loss_of_a_class_that_computes_it_itself_is_obeyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.bart import modeling_bart

    config = transformers.BartConfig(
        vocab_size=101, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8
    )
    stock = transformers.BartForCausalLM(config).eval()
    fused = apply_patch(copy.deepcopy(stock))
    monkeypatch.setattr(modeling_bart, "CrossEntropyLoss", Doubled)
    output, expected = fused(**batch(stock)), stock(**batch(stock))
    assert isinstance(output.logits, LazyLogits)
    assert output.loss.item() == pytest.approx(expected.loss.item())
    monkeypatch.setattr(nn.functional, "cross_entropy", doubled(nn.functional.cross_entropy))
    with pytest.raises(UnsupportedModelError, match=r"torch.nn.functional.cross_entropy was"):
        fused(**batch(stock))


def scaled(self: Any, input: Tensor) -> Tensor:
    """Another forward of a linear layer."""
    return nn.functional.linear(input, self.weight, self.bias) * 1.5


def linear_forward(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setattr(nn.Linear, "forward", scaled)


def linear_forward_by_the_type(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setattr(type(model.get_output_embeddings()), "forward", scaled)


def linear_function(model: Any, put: pytest.MonkeyPatch) -> None:
    linear = nn.functional.linear
    put.setattr(nn.functional, "linear", lambda *args: linear(*args) * 1.5)


def conv1d_forward(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setattr(Conv1D, "forward", lambda self, x: x @ self.weight - self.bias)


def lora_forward(model: Any, put: pytest.MonkeyPatch) -> None:
    layer = peft.tuners.lora.layer.Linear
    put.setattr(layer, "forward", lambda self, x: self.base_layer(x) * 1.5)


def subclass_forward(model: Any, put: pytest.MonkeyPatch) -> None:
    put.setattr(OwnHead, "forward", scaled, raising=False)


class OwnHead(nn.Linear):
    """A head without a forward of its own, for now."""


def own_head() -> Any:
    model = untied()
    model.lm_head = OwnHead(16, 101)
    return model


def conv1d_head() -> Any:
    model = untied()
    model.lm_head = Conv1D(101, 16)
    nn.init.normal_(model.lm_head.bias)
    return model


def lora_head() -> Any:
    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    return get_peft_model(untied(), config)


HEADS: list[tuple[Callable[[], Any], Put]] = [
    (untied, linear_forward),
    (untied, linear_forward_by_the_type),
    (untied, linear_function),
    (own_head, subclass_forward),
    (own_head, linear_forward),
    (conv1d_head, conv1d_forward),
    (lora_head, lora_forward),
    (lora_head, linear_forward),
]


@pytest.mark.parametrize("after", [True, False], ids=["patch, replace", "replace, patch"])
@pytest.mark.parametrize(("make", "replace"), HEADS)
def test_a_replaced_forward_of_the_head_is_obeyed(
    make: Callable[[], Any], replace: Put, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = make()
    fused, inputs = copy.deepcopy(stock), batch(untied())
    if after:
        before = apply_patch(fused)(**inputs).loss
        assert patch_report(fused).kernel.startswith("torch")
        replace(fused, monkeypatch)
        assert fused(**inputs).loss.item() != before.item()
    else:
        replace(fused, monkeypatch)
        apply_patch(fused)
    assert_trains_like(fused, stock, inputs)
    assert "itself, in chunks" in patch_report(fused).kernel


def test_a_linear_function_that_computes_the_same_is_taken_for_torchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed's ZeRO-3 replaces it for good."""

    def zero3_linear_wrap(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return input @ weight.t() if bias is None else input @ weight.t() + bias

    names = {**globals(), "__name__": "deepspeed.runtime.zero.linear"}
    linear = types.FunctionType(zero3_linear_wrap.__code__, names, argdefs=(None,))
    stock = untied()
    fused = apply_patch(copy.deepcopy(stock))
    monkeypatch.setattr(nn.functional, "linear", linear)
    assert_trains_like(fused, stock, batch(stock))
    assert patch_report(fused).kernel.startswith("torch")


def centred(self: Any, input: Tensor) -> Tensor:
    """A forward that mixes tokens."""
    return nn.functional.linear(input - input.mean(-2, keepdim=True), self.weight, self.bias)


def test_a_replaced_forward_that_mixes_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = untied()
    model.lm_head = nn.Sequential(model.lm_head)
    apply_patch(model)(**batch(model))
    monkeypatch.setattr(nn.Linear, "forward", centred)
    with pytest.raises(UnsupportedModelError, match="other tokens"):
        model(**batch(model))


def stock_like(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = transformers.LlamaForCausalLM.forward(self, *args, **kwargs)
    output.loss = 2 * output.loss
    return output


def test_a_forward_set_on_the_type_of_a_patched_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which looks like the stock class, so that its forward is what is meant."""
    model = apply_patch(untied())
    inputs = batch(model)
    before = model(**inputs).loss
    with pytest.MonkeyPatch.context() as put:
        put.setattr(type(model), "forward", stock_like)
        assert torch.equal(model(**inputs).loss, 2 * before)
        assert isinstance(model(**inputs).logits, LazyLogits)
    assert torch.equal(model(**inputs).loss, before) and "forward" not in Llama.__dict__
    type(model).forward = stock_like
    assert Llama.__dict__["forward"] is stock_like
    assert torch.equal(remove_patch(model)(**inputs).loss, 2 * before)
    del Llama.forward


def test_a_later_patch_shows_the_signature_of_the_replaced_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stock Trainer keeps the columns of the data that it names."""
    apply_patch(untied())

    def forward(self: Any, input_ids: Any = None, labels: Any = None, weights: Any = None) -> Any:
        return transformers.LlamaForCausalLM.forward(self, input_ids=input_ids, labels=labels)

    monkeypatch.setattr(Llama, "forward", forward, raising=False)
    assert "weights" in inspect.signature(apply_patch(untied()).forward).parameters


REPLACED_FIRST = {
    "the loss": """
        from transformers.loss import loss_utils
        loss_utils.fixed_cross_entropy = lambda *args, **kwargs: torch.zeros(())
    """,
    "every name of the loss": """
        from transformers.loss import loss_utils
        def ForCausalLMLoss(logits, labels, vocab_size, **kwargs):
            return torch.zeros(())
        loss_utils.ForCausalLMLoss = ForCausalLMLoss
        for name in loss_utils.LOSS_MAPPING:
            loss_utils.LOSS_MAPPING[name] = ForCausalLMLoss
    """,
    "a function without a signature": """
        from transformers.loss import loss_utils
        loss_utils.fixed_cross_entropy = torch._C._nn.cross_entropy_loss
    """,
    "torch's function": """
        def cross_entropy(*args, **kwargs):
            return torch.zeros(())
        torch.nn.functional.cross_entropy = cross_entropy
    """,
}


@pytest.mark.parametrize("name", REPLACED_FIRST)
def test_a_loss_replaced_before_our_import_is_refused(name: str) -> None:
    prelude = f"import sys, torch\nsys.path.insert(0, {str(SUPPORT)!r})\n"
    code = """
        import pytest
        from tiny_models import batch, build
        from hf_fused_head import UnsupportedModelError, apply_patch
        with pytest.raises(UnsupportedModelError, match="cross_entropy|ForCausalLMLoss"):
            apply_patch(build("llama"))
    """
    program = prelude + textwrap.dedent(REPLACED_FIRST[name]) + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("after", [True, False], ids=["compile, replace", "replace, compile"])
def test_compiled_models_see_what_was_replaced(
    after: bool, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None
) -> None:
    """Losses are refused, forwards of the head run."""
    stock = Llama(build("llama", num_hidden_layers=1, tie_word_embeddings=False).config)
    fused = apply_patch(copy.deepcopy(stock))
    inputs = batch(stock)
    fused.compile()
    if after:
        fused(**inputs)
    with monkeypatch.context() as put:
        linear_forward(fused, put)
        assert_trains_like(fused, stock, inputs)
    with monkeypatch.context() as put:
        functional(fused, put)
        with pytest.raises(UnsupportedModelError, match="cross_entropy was replaced"):
            fused(**inputs)


def test_what_nobody_replaced_is_fused_without_a_word() -> None:
    model = untied()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(apply_patch(model)(**batch(model)).logits, LazyLogits)
