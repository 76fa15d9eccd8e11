"""Am I fused? What is done to a model after its patch stays fused, or is an error by name."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny_models import batch, build
from torch import Tensor, nn
from trains_like import assert_trains_like
from transformers import TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_fused_head import (
    FusedHeadTrainer,
    UnsupportedModelError,
    apply_patch,
    patch_report,
    remove_patch,
)
from hf_fused_head.patches import require_fused
from hf_fused_head.patches.lazy_logits import LazyLogits

pytestmark = pytest.mark.newest

Llama = transformers.LlamaForCausalLM


def like_stock(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    """A forward that somebody else wrote, and that does what stock does."""
    logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
    loss = None
    if labels is not None:
        loss = self.loss_function(logits, labels, self.config.vocab_size)
    return CausalLMOutputWithPast(loss=loss, logits=logits)


def own_loss(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    """A forward with a loss of its own, from the head's weight, as the fused ones of others."""
    hidden = self.model(input_ids=input_ids).last_hidden_state
    logits = nn.functional.linear(hidden, self.get_output_embeddings().weight)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return CausalLMOutputWithPast(loss=loss, logits=logits)


def put(model: nn.Module, forward: Callable[..., Any]) -> None:
    model.forward = types.MethodType(forward, model)


def with_adapter(model: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def plain(model: Any) -> Any:
    return model


@pytest.mark.parametrize("wrap", [plain, with_adapter])
def test_a_forward_put_on_a_patched_model_stays_fused_if_it_is_like_stock(
    wrap: Callable[[Any], Any],
) -> None:
    """PEFT calls the `forward` of what it wraps, past every hook."""
    stock, model = build("llama"), apply_patch(build("llama"))
    for target in (stock, model):
        put(target, like_stock)
    fused, stock = wrap(model), wrap(stock)
    inputs = batch(stock)
    assert patch_report(fused).fused
    assert isinstance(fused(**inputs).logits, LazyLogits)
    with torch.no_grad():
        assert torch.equal(fused(**inputs).logits, stock(**inputs).logits)
    remove_patch(fused)
    assert model.__dict__["forward"].__func__ is like_stock and type(model) is Llama
    assert torch.equal(fused(**inputs).loss, stock(**inputs).loss)


@pytest.mark.parametrize("wrap", [plain, with_adapter])
@pytest.mark.parametrize("strict", [True, False])
def test_a_forward_with_another_loss_put_on_a_patched_model_is_an_error(
    strict: bool, wrap: Callable[[Any], Any]
) -> None:
    model = apply_patch(build("llama"), strict=strict)
    fused, inputs = wrap(model), batch(build("llama"))
    fused(**inputs)
    put(model, own_loss)
    if strict:
        with pytest.raises(UnsupportedModelError, match="got a loss from elsewhere"):
            fused(**inputs)
    else:
        with pytest.warns(UserWarning, match="stays stock.*got a loss from elsewhere"):
            fused(**inputs)
    assert not patch_report(fused).fused and "elsewhere" in patch_report(fused).reason
    assert model.__dict__["forward"].__func__ is own_loss


def test_wrappers_that_do_not_tell_what_they_wrap_stay_fused() -> None:
    model, stock = apply_patch(build("llama")), build("llama")
    inner, inputs = model.forward, batch(stock)
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert_trains_like(model, stock, inputs)
    assert isinstance(model(**inputs).logits, LazyLogits)


@pytest.mark.parametrize("strict", [True, False])
def test_a_wrapper_that_only_looks_like_ours_is_held_to_the_head(strict: bool) -> None:
    """`functools.wraps` copies attributes of the forward and calls nothing."""
    model, stock = apply_patch(build("llama"), strict=strict), build("llama")
    other = functools.wraps(type(model).forward)(copied(own_loss))
    put(model, other)
    put(stock, own_loss)
    inputs = batch(stock)
    if strict:
        with pytest.raises(UnsupportedModelError, match="got a loss from elsewhere"):
            model(**inputs)
    else:
        with pytest.warns(UserWarning, match="stays stock.*got a loss from elsewhere"):
            assert torch.equal(model(**inputs).loss, stock(**inputs).loss)
    assert model.__dict__["forward"].__func__ is other and type(model) is Llama
    assert torch.equal(model(**inputs).loss, stock(**inputs).loss)


def test_a_wrapper_that_looks_like_ours_and_calls_it_stays_fused() -> None:
    model, stock = apply_patch(build("llama")), build("llama")
    inner = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    put(model, forward)
    assert_trains_like(model, stock, batch(stock))
    assert isinstance(model(**batch(stock)).logits, LazyLogits)
    remove_patch(model)
    assert model.__dict__["forward"].__func__ is forward and type(model) is Llama
    assert torch.equal(model(**batch(stock)).loss, stock(**batch(stock)).loss)


def test_a_wrapper_may_change_the_labels() -> None:
    model, stock = apply_patch(build("llama")), build("llama")

    def first_row_only(self: Any, input_ids: Tensor, labels: Tensor) -> Any:
        labels = labels.clone()
        labels[1:] = -100
        return inner(input_ids=input_ids, labels=labels)

    inner, inputs = model.forward, batch(stock)
    put(model, first_row_only)
    expected = {key: value[:1] for key, value in inputs.items()}
    assert model(**inputs).loss.item() == pytest.approx(stock(**expected).loss.item())
    assert isinstance(model(**inputs).logits, LazyLogits)


def test_a_stock_forward_kept_from_before_the_patch_and_put_back() -> None:
    """What accelerate's `unwrap_model(keep_fp32_wrapper=False)` does."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare_model(build("llama"))
    apply_patch(model)
    inner = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert patch_report(inner).fused
    assert_trains_like(inner, build("llama"), batch(inner))
    assert isinstance(inner(**batch(inner)).logits, LazyLogits)


def copied(function: Callable[..., Any], module: str = __name__) -> Callable[..., Any]:
    """The function as if another library had defined it."""
    code, names = function.__code__, dict(function.__globals__)
    return types.FunctionType(code, names | {"__name__": module}, argdefs=function.__defaults__)


CONFLICTING = {
    "liger_kernel.transformers.model.llama": "load the model without use_liger_kernel",
    "trl.trainer.utils": "train with FusedHeadTrainer",
    "unsloth.models.llama": "load the model with transformers",
    "unsloth_compiled_module_llama": "load the model with transformers",
    "cut_cross_entropy.transformers.llama": "leave out cce_patch",
}


@pytest.mark.parametrize("place", ["instance", "class"])
@pytest.mark.parametrize("module", CONFLICTING)
def test_conflicting_patches_are_named_before_and_after_the_patch(module: str, place: str) -> None:
    class MyLlama(Llama):
        pass

    model = MyLlama(build("llama").config)
    forward, inputs = copied(own_loss, module), batch(model)
    apply_patch(model)(**inputs)
    if place == "class":
        MyLlama.forward = forward
    else:
        put(model, forward)
    assert not patch_report(model).fused and CONFLICTING[module] in patch_report(model).reason
    with pytest.raises(UnsupportedModelError, match=f"{module}.*{CONFLICTING[module]}"):
        model(**inputs)
    with pytest.raises(UnsupportedModelError, match=f"{module}.*{CONFLICTING[module]}"):
        apply_patch(model)
    assert type(model) is MyLlama


def test_a_head_whose_forward_is_replaced_is_an_error() -> None:
    model = apply_patch(build("llama", tie_word_embeddings=False))
    model(**batch(model))
    model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, model.lm_head.weight)
    assert not patch_report(model).fused and "take it off" in patch_report(model).reason
    with pytest.raises(UnsupportedModelError, match=r"a forward on the head \(Linear\).*take it"):
        model(**batch(model))


def test_a_loss_function_set_later_is_an_error() -> None:
    model = apply_patch(build("llama"))
    model.loss_function = own_loss
    assert "its loss function is own_loss" in patch_report(model).reason
    with pytest.raises(UnsupportedModelError, match="got own_loss"):
        model(**batch(model))


def test_attributes_of_a_patched_model_are_set_as_ever() -> None:
    model = apply_patch(build("llama"))
    model.note, model.extra, model.lm_head = "text", nn.Linear(2, 3), nn.Linear(16, 101)
    assert model.note == "text" and model.extra in model.children()
    assert isinstance(model(**batch(model)).logits, LazyLogits)


def without_labels(model: Any, inputs: Any) -> None:
    logits = model(input_ids=inputs["input_ids"]).logits
    model.loss_function(logits, inputs["labels"], 101).backward()


def past_the_instance(model: Any, inputs: Any) -> None:
    Llama.forward(model, **inputs).loss.backward()


def another_model(model: Any, inputs: Any) -> None:
    build("llama")(**inputs).loss.backward()


def unpatched(model: Any, inputs: Any) -> None:
    remove_patch(model)(**inputs).loss.backward()


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (without_labels, "give it the labels"),
        (past_the_instance, "call the model itself"),
        (another_model, "no forward with labels has reached it"),
        (unpatched, "apply_patch has not been called"),
    ],
)
def test_a_pass_beside_the_head_is_seen(step: Callable[..., None], reason: str) -> None:
    model = apply_patch(build("llama"))
    inputs = batch(model)
    with require_fused(model):
        model(**inputs).loss.backward()
    refused = pytest.raises(UnsupportedModelError, match=f"was not fused: .*{reason}")
    with refused, require_fused(model):
        step(model, inputs)
    with pytest.raises(KeyError, match="stop"), require_fused(model):
        raise KeyError("stop")


def test_compiled_passes_are_seen(fresh_compiler: None, device: str) -> None:
    fused = apply_patch(build("llama", num_hidden_layers=1).to(device))
    model = torch.compile(fused, fullgraph=True)
    inputs = batch(fused)
    for _ in range(2):
        with require_fused(model):
            model(**inputs)
    assert "compiled" in patch_report(model).schedule
    with pytest.raises(UnsupportedModelError), require_fused(model):
        model(input_ids=inputs["input_ids"])


def on_the_instance(model: Any) -> None:
    put(model, own_loss)


def on_the_class(model: Any) -> None:
    type(model).__mro__[1].forward = own_loss


def on_the_head(model: Any) -> None:
    weight = model.lm_head.weight
    model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, weight)


def in_place_of_the_head(model: Any) -> None:
    model.lm_head = nn.Linear(16, 101)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [on_the_instance, on_the_class, on_the_head, in_place_of_the_head]
)
def test_what_is_changed_after_compilation_is_an_error(
    change: Callable[[Any], None], fresh_compiler: None, backend: str
) -> None:
    class LlamaForCausalLM(Llama):
        pass

    fused = apply_patch(LlamaForCausalLM(build("llama", num_hidden_layers=1).config))
    model = torch.compile(fused, fullgraph=True, backend=backend)
    model(**batch(fused))
    change(fused)
    # The compiler reports the error as its own, with ours inside.
    with pytest.raises(torch._dynamo.exc.Unsupported, match="UnsupportedModelError"):
        model(**batch(fused))


def test_the_report_after_a_step_tells_schedule_and_bytes() -> None:
    for head, words in ((plain, "workspace"), (nn.Sequential, "chunks of 16 tokens")):
        model = build("llama", tie_word_embeddings=False)
        model.lm_head = head(model.lm_head)
        apply_patch(model)
        assert patch_report(model).schedule == ""
        model(**batch(model)).loss.backward()
        report = patch_report(model)
        assert report.fused and words in report.schedule and "MiB" in report.schedule


class OwnLossTrainer(FusedHeadTrainer):
    """A trainer that takes the loss from logits, as many subclasses do."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        logits = model(input_ids=inputs["input_ids"]).logits
        return nn.functional.cross_entropy(logits[:, :-1].mT, inputs["labels"][:, 1:])


def trainer(cls: type, folder: Path, **head_options: Any) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, max_steps=1, disable_tqdm=True
    )
    model = build("llama")
    rows = [{key: value[0] for key, value in batch(model, rows=1).items()}] * 8
    return cls(model, arguments, train_dataset=rows, head_options=head_options)


def test_a_training_step_that_was_not_fused_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="this pass was not fused"):
        trainer(OwnLossTrainer, tmp_path).train()
    trainer(OwnLossTrainer, tmp_path, strict=False).train()
    trainer(FusedHeadTrainer, tmp_path).train()


def test_a_model_unpatched_on_the_way_ends_the_training(tmp_path: Path) -> None:
    fused = trainer(FusedHeadTrainer, tmp_path)
    remove_patch(fused.model)
    with pytest.raises(UnsupportedModelError, match="apply_patch has not been called"):
        fused.train()


def test_copies_guard_themselves() -> None:
    model = copy.deepcopy(apply_patch(build("llama")))
    put(model, own_loss)
    with pytest.raises(UnsupportedModelError, match="elsewhere"):
        model(**batch(model))
