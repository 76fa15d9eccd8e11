"""The life of a patched model: patched twice, copied, pickled, saved, hooked, unpatched."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from pathlib import Path

import pytest
import torch
import transformers
from causal_loss import in_float64
from oracle import assert_close_as_torch
from tiny_models import batch, build
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_fused_head import (
    UnsupportedModelError,
    apply_patch,
    last_stats,
    patch_report,
    patched,
    remove_patch,
)

pytestmark = pytest.mark.newest


def fingerprint(model: nn.Module) -> list[tuple[str, type, list[str]]]:
    """What patching may change: the class and the attributes of every module."""
    return [(name, type(m), sorted(m.__dict__)) for name, m in model.named_modules()]


def test_apply_patch_returns_the_same_object_and_is_idempotent() -> None:
    model = build("llama")
    assert apply_patch(model) is model
    once = fingerprint(model)
    assert apply_patch(model) is model
    assert fingerprint(model) == once


def test_a_second_patch_takes_its_options() -> None:
    model = build("llama")
    inputs = batch(model)
    plain = apply_patch(model)(**inputs).loss
    smooth = apply_patch(model, label_smoothing=0.2)(**inputs).loss
    assert plain.item() != smooth.item()
    assert apply_patch(model)(**inputs).loss.item() == plain.item()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_remove_patch_restores_exactly_what_came_in(family: str) -> None:
    model = build(family)
    before = fingerprint(model)
    state = set(model.state_dict())
    apply_patch(model)
    model(**batch(model)).loss.backward()
    assert remove_patch(model) is model
    assert fingerprint(model) == before
    assert set(model.state_dict()) == state


def test_remove_patch_of_a_stock_model_changes_nothing() -> None:
    model = build("llama")
    before = fingerprint(model)
    assert remove_patch(model) is model
    assert fingerprint(model) == before


def test_other_instances_classes_and_functions_are_untouched() -> None:
    other, model = build("llama"), build("llama")
    before = fingerprint(other)
    classes = (type(model), type(model.lm_head), nn.Linear)
    attributes = [dict(vars(cls)) for cls in classes]
    cross_entropy = torch.nn.functional.cross_entropy
    apply_patch(model)
    model(**batch(model)).loss.backward()
    assert fingerprint(other) == before
    assert [dict(vars(cls)) for cls in classes] == attributes
    assert torch.nn.functional.cross_entropy is cross_entropy
    assert not patch_report(other).fused


def test_class_names_and_signature_are_kept() -> None:
    model = build("llama")
    cls, signature = type(model), inspect.signature(type(model).forward)
    apply_patch(model)
    swapped = type(model)
    assert isinstance(model, cls)
    assert (swapped.__name__, swapped.__qualname__, swapped.__module__) == (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )
    assert inspect.signature(swapped.forward) == signature


def test_a_deep_copy_is_independent() -> None:
    model = apply_patch(build("llama"))
    inputs = batch(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    stock = remove_patch(copy.deepcopy(copied))
    assert copied(**inputs).loss.item() == pytest.approx(stock(**inputs).loss.item())
    copied(**inputs).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    remove_patch(copied)
    model(**inputs)
    assert patch_report(model).fused


def test_pickle_round_trip_keeps_the_patch() -> None:
    model = apply_patch(build("llama"))
    inputs = batch(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)
    assert patch_report(loaded).fused
    assert type(remove_patch(loaded)) is transformers.LlamaForCausalLM


def test_save_pretrained_round_trip_is_stock(tmp_path: Path) -> None:
    model = build("llama")
    inputs = batch(model)
    expected = model(**inputs).loss
    apply_patch(model).save_pretrained(tmp_path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert torch.equal(loaded(**inputs).loss, expected)


def test_hooks_on_the_head_and_the_model_fire() -> None:
    model = apply_patch(build("llama"))
    fired = []
    model.lm_head.register_forward_pre_hook(lambda module, args: fired.append("head pre"))
    model.lm_head.register_forward_hook(lambda module, args, out: fired.append("head"))
    model.register_forward_hook(lambda module, args, out: fired.append("model"))
    model(**batch(model))
    assert fired == ["head pre", "head", "model"]


def test_a_pre_hook_that_changes_the_hidden_states_is_honoured() -> None:
    stock = build("llama")
    fused = apply_patch(copy.deepcopy(stock))
    for model in (stock, fused):
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    inputs = batch(stock)
    assert fused(**inputs).loss.item() == pytest.approx(stock(**inputs).loss.item())


def test_the_context_manager_undoes_the_patch_after_an_exception() -> None:
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises(KeyError, match="stop"), patched(model) as same:
        assert same is model
        model(**batch(model))
        assert patch_report(model).fused
        raise KeyError("stop")
    assert fingerprint(model) == before


def test_a_failing_forward_leaves_no_call_behind() -> None:
    model = apply_patch(build("llama"))
    inputs = batch(model)
    with pytest.raises(Exception, match=r".+"):
        model(**(inputs | {"input_ids": inputs["input_ids"] + 10_000}))
    logits = model(input_ids=inputs["input_ids"]).logits
    assert type(logits) is torch.Tensor
    assert torch.isfinite(model(**inputs).loss)


@pytest.mark.parametrize("field", ["logits_scaling", "final_logit_softcapping"])
def test_a_wrong_fact_is_refused_and_the_model_left_stock(field: str) -> None:
    """The config says one thing and the forward does another: the pass itself gives it away."""
    family = {"logits_scaling": "granite", "final_logit_softcapping": "gemma2"}[field]
    model = build(family)
    stock = type(model)

    class Other(stock):
        def forward(self, *args: object, **kwargs: object) -> object:
            head = self.get_output_embeddings()
            handle = head.register_forward_hook(lambda module, inputs, out: out * 1.25)
            try:
                return super().forward(*args, **kwargs)
            finally:
                handle.remove()

    model.__class__ = Other
    inputs = batch(model)
    expected = model(**inputs).loss
    apply_patch(model)
    with pytest.raises(UnsupportedModelError):
        model(**inputs)
    assert torch.equal(model(**inputs).loss, expected)
    assert not patch_report(model).fused


class VocabularyPenalty(transformers.LlamaForCausalLM):
    """A forward that uses the logits in a way that no fused loss can know."""

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 1e-3 * output.logits.logsumexp(-1).mean()
        return output


class AddsToTheLogits(transformers.LlamaForCausalLM):
    """Post-processing outside the whitelist, between the head and the loss."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        logits = logits + 0.01
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_an_unknown_operation_is_refused_by_name_and_the_model_left_stock() -> None:
    model = AddsToTheLogits(build("llama").config)
    inputs = batch(model)
    expected = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
    apply_patch(model)
    with pytest.raises(UnsupportedModelError, match="add"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"])
    assert type(model) is AddsToTheLogits
    again = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
    assert torch.equal(again, expected)


def test_not_strict_warns_once_and_stays_stock() -> None:
    model = apply_patch(AddsToTheLogits(build("llama").config), strict=False)
    inputs = batch(model)
    with pytest.warns(UserWarning, match="add"):
        loss = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
    assert torch.isfinite(loss)
    assert not patch_report(model).fused and "add" in patch_report(model).reason


def test_a_penalty_on_the_logits_after_the_loss_keeps_its_value_and_gradient() -> None:
    stock = VocabularyPenalty(build("llama").config)
    fused = apply_patch(copy.deepcopy(stock))
    inputs = batch(stock)
    truth = in_float64(stock)
    losses = [model(**inputs).loss for model in (fused, stock, truth)]
    assert_close_as_torch("loss", *losses)
    for loss in losses:
        loss.backward()
    assert_close_as_torch("head", *(m.lm_head.weight.grad for m in (fused, stock, truth)))


def test_a_model_without_a_head_is_refused() -> None:
    model = transformers.LlamaModel(build("llama").config)
    with pytest.raises(UnsupportedModelError, match="LlamaModel"):
        apply_patch(model)
    with pytest.warns(UserWarning, match="LlamaModel"):
        assert apply_patch(model, strict=False) is model


def test_two_threads_on_one_model_do_not_mix_their_labels() -> None:
    model = apply_patch(build("llama"))
    parts = [batch(model, length=length, seed=length) for length in (5, 9, 13, 17)]
    with torch.no_grad():
        expected = [model(**part).loss.item() for part in parts]
        found: dict[int, float] = {}

        def work(index: int) -> None:
            for _ in range(20):
                with torch.no_grad():
                    found[index] = model(**parts[index]).loss.item()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[index] for index in range(len(parts))] == pytest.approx(expected)


def test_resized_embeddings_stay_fused_and_right() -> None:
    model = apply_patch(build("llama"))
    model(**batch(model)).loss.backward()
    model.resize_token_embeddings(model.config.vocab_size + 8)
    inputs = batch(model)
    loss = model(**inputs).loss
    assert patch_report(model).fused
    stock = remove_patch(copy.deepcopy(model))
    assert loss.item() == pytest.approx(stock(**inputs).loss.item())


def test_last_stats_are_those_of_the_logits() -> None:
    model = build("llama")
    inputs = batch(model)
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    labels = inputs["labels"][:, 1:].flatten()
    logits, labels = logits[labels != -100], labels[labels != -100]
    apply_patch(model, stats=("accuracy", "entropy"))
    assert last_stats(model) is None
    model(**inputs)
    stats = last_stats(model)
    assert stats is not None and int(stats.num_valid) == labels.numel()
    accuracy = (logits.argmax(-1) == labels).sum()
    assert int(stats.correct.sum()) == int(accuracy)
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy().sum()
    assert stats.entropy.sum().item() == pytest.approx(entropy.item(), rel=1e-5)
    # They are not those of an earlier forward once nothing is asked for.
    apply_patch(model)(**inputs)
    assert last_stats(model) is None


def trainer(model: nn.Module, folder: Path, **options: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        per_device_eval_batch_size=2,
        disable_tqdm=True,
        **options,
    )
    rows = [
        {key: value[0] for key, value in batch(model, rows=1, length=9, seed=seed).items()}
        for seed in range(5)
    ]
    return Trainer(model=model, args=arguments, eval_dataset=rows)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_predict_of_the_stock_trainer_returns_stock_arrays(family: str, tmp_path: Path) -> None:
    stock = build(family)
    fused = apply_patch(copy.deepcopy(stock))
    theirs, ours = (
        trainer(model, tmp_path).predict(trainer(model, tmp_path).eval_dataset)
        for model in (stock, fused)
    )
    assert type(ours.predictions) is type(theirs.predictions)
    assert ours.predictions.dtype == theirs.predictions.dtype
    assert (ours.predictions == theirs.predictions).all()
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"])


def test_logits_read_in_evaluation_are_stock_bits() -> None:
    stock = build("gemma2").eval()
    fused = apply_patch(copy.deepcopy(stock))
    inputs = batch(stock)
    with torch.no_grad():
        expected = stock(**inputs)
        output = fused(**inputs)
        for logits in (output.logits, output["logits"], output[1], output.to_tuple()[1]):
            assert isinstance(logits, torch.Tensor)
            assert logits.shape == expected.logits.shape and logits.dtype == expected.logits.dtype
            assert torch.equal(logits, expected.logits)
            assert torch.equal(logits[:, -1].argmax(-1), expected.logits[:, -1].argmax(-1))
            assert (logits.numpy() == expected.logits.numpy()).all()


def test_logits_read_in_training_carry_their_gradient() -> None:
    stock = build("gemma2").train()
    fused, truth = apply_patch(copy.deepcopy(stock)), in_float64(stock)
    inputs = batch(stock)
    for model in (stock, fused, truth):
        output = model(**inputs)
        (output.loss + output.logits.square().mean()).backward()
    gradients = (dict(model.named_parameters()) for model in (fused, stock, truth))
    ours, theirs, true = gradients
    for name in true:
        assert_close_as_torch(name, ours[name].grad, theirs[name].grad, true[name].grad)


def test_logits_read_after_an_optimizer_step_are_refused_with_the_remedy() -> None:
    model = apply_patch(build("llama")).train()
    output = model(**batch(model))
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="logits"):
        output.logits.sum()
