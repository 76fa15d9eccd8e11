"""Masked and sequence-to-sequence models: what they do beside the ways that the sweep compares.

tests/patches/test_conformance.py holds loss and gradients of every class to stock.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import tiny_classes
import torch
import transformers
from oracle import assert_close_as_torch
from tiny_classes import batch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from trains_like import assert_trains_like, same_modules

from hf_fused_head import (
    UnsupportedModelError,
    apply_patch,
    last_stats,
    patch_report,
    remove_patch,
)
from hf_fused_head.patches import registry
from hf_fused_head.patches.eligibility import shifts_labels
from hf_fused_head.patches.heads import LinearOperands

T5, BART, BERT = "T5ForConditionalGeneration", "BartForConditionalGeneration", "BertForMaskedLM"
MARIAN, ESM, DISTILBERT = "MarianMTModel", "EsmForMaskedLM", "DistilBertForMaskedLM"
MODELS = (T5, BART, MARIAN, BERT, ESM, DISTILBERT)


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    """The fused and the stock model."""
    stock = tiny_classes.build(name)
    return apply_patch(copy.deepcopy(stock), **options), stock


def on(device: str, model: Any) -> tuple[Any, dict[str, Any]]:
    """The model there, and its inputs."""
    return model.to(device), {key: value.to(device) for key, value in batch(model).items()}


@pytest.mark.parametrize("name", MODELS)
def test_training_is_stocks(name: str, device: str) -> None:
    stock, inputs = on(device, tiny_classes.build(name))
    fused = apply_patch(copy.deepcopy(stock))
    assert_trains_like(fused, stock, inputs)
    assert patch_report(fused).fused


def expected_loss(model: Any, inputs: dict[str, Any], smoothing: float, z_loss: float) -> Tensor:
    logits = model(**inputs).logits.flatten(0, -2)
    labels = inputs["labels"].flatten()
    loss = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    return loss + z_loss * logits[labels >= 0].logsumexp(-1).square().mean()


@pytest.mark.parametrize("name", MODELS)
def test_smoothing_and_z_loss_are_in_the_loss_and_its_gradients(name: str) -> None:
    fused, stock = pair(name, label_smoothing=0.2, z_loss=0.01)
    inputs = batch(stock)
    truth = copy.deepcopy(stock).double()
    losses = [
        fused(**inputs).loss,
        *(expected_loss(model, inputs, 0.2, 0.01) for model in (stock, truth)),
    ]
    for loss in losses:
        loss.backward()
    assert_close_as_torch("loss", *losses)
    # The embeddings' gradient has that of a tied head in it.
    grads = [m.get_input_embeddings().weight.grad for m in (fused, stock, truth)]
    assert_close_as_torch("gradient", *grads)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_of_labels_that_are_not_shifted(name: str) -> None:
    fused, stock = pair(name, stats=("accuracy", "entropy"))
    inputs = batch(stock)
    fused(**inputs)
    stats = last_stats(fused)
    assert stats is not None and stats.entropy is not None and stats.correct is not None
    valid = inputs["labels"] >= 0
    logits, truth = (m(**inputs).logits for m in (stock, copy.deepcopy(stock).double()))
    assert torch.equal(stats.correct, (logits.argmax(-1) == inputs["labels"]) & valid)
    entropies = [
        torch.distributions.Categorical(logits=z).entropy() * valid for z in (logits, truth)
    ]
    assert_close_as_torch("entropy", stats.entropy, *entropies)
    assert int(stats.num_valid) == int(valid.sum())


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_a_fused_forward_are_stocks(name: str) -> None:
    fused, stock = pair(name)
    inputs = batch(stock)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(fused(**inputs).logits * 1, stock(**inputs).logits)
    for model in (fused, stock):
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
    weights = zip(fused.named_parameters(), stock.parameters(), strict=True)
    for (parameter, ours), theirs in weights:
        assert (ours.grad is None) == (theirs.grad is None), parameter
        if theirs.grad is not None:
            assert torch.equal(ours.grad, theirs.grad), parameter


@pytest.mark.parametrize("name", [T5, BART, MARIAN])
def test_generation_is_stocks(name: str) -> None:
    fused, stock = pair(name)
    fused(**batch(stock)).loss.backward()
    for beams in (1, 2):
        tokens = [
            model.eval().generate(
                batch(stock)["input_ids"], max_new_tokens=6, num_beams=beams, do_sample=False
            )
            for model in (fused, stock)
        ]
        assert torch.equal(*tokens)
    assert patch_report(fused).fused


@pytest.mark.parametrize("name", MODELS)
def test_the_patch_is_pickled_copied_and_taken_off(name: str) -> None:
    fused, stock = pair(name)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_trains_like(copied, stock, batch(stock))
        assert patch_report(copied).fused
    assert same_modules(remove_patch(fused), stock)


@pytest.mark.parametrize("name", [T5, BART, BERT])
def test_a_head_that_is_resized_after_the_patch(name: str) -> None:
    fused, stock = pair(name)
    for model in (fused, stock):
        torch.manual_seed(0)
        model.resize_token_embeddings(113, mean_resizing=False)
    assert_trains_like(fused, stock, batch(stock))
    assert patch_report(fused).fused


@pytest.mark.parametrize("name", [T5, BERT])
def test_checkpointed_layers(name: str) -> None:
    fused, stock = pair(name)
    for model in (fused, stock):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_trains_like(fused, stock, batch(stock))
    assert patch_report(fused).fused


class Scaled(nn.Linear):
    """A head of the user, which runs in chunks."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


@pytest.mark.parametrize("name", [BART, ESM])
def test_a_head_that_runs_in_chunks_has_the_bias_of_its_model(name: str) -> None:
    stock = tiny_classes.build(name)
    stock.get_output_embeddings().__class__ = Scaled
    fused = apply_patch(copy.deepcopy(stock), memory_budget_mib=0.005)
    assert_trains_like(fused, stock, batch(stock))
    assert "chunks of" in patch_report(fused).schedule


def test_a_head_that_is_spread_over_ranks_takes_no_other_bias() -> None:
    operands = LinearOperands([(torch.ones(2, 3), torch.ones(5, 3))], None, 10, group="ranks")
    assert operands.plus_bias(None) is operands
    with pytest.raises(UnsupportedModelError, match="must have no bias beside its own"):
        operands.plus_bias(torch.ones(1, 10))


@pytest.mark.parametrize("targets", [["q"], ["q", "lm_head"]])
def test_lora_on_a_sequence_to_sequence_model(targets: list[str]) -> None:
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    torch.manual_seed(0)
    stock = peft.get_peft_model(tiny_classes.build(T5, tie_word_embeddings=False), config)
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    fused = apply_patch(copy.deepcopy(stock))
    assert_trains_like(fused, stock, batch(stock.get_base_model()))
    assert patch_report(fused).fused


@pytest.mark.parametrize("name", [BART, ESM])
def test_a_forgotten_bias_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", ())
    fused, stock = pair(name)
    with pytest.raises(UnsupportedModelError, match=r"no bias, got .* a bias by"):
        fused(**batch(stock))
    assert not patch_report(fused).fused


Change = Callable[[Tensor, Tensor], Tensor]


class ChangedLogits(transformers.BartForConditionalGeneration):
    """A BART that does something to its logits, and `changed` to what it does it with."""

    change: Change

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        decoder_input_ids = labels.roll(1, -1).clamp_min(0)
        hidden = self.model(input_ids, decoder_input_ids=decoder_input_ids)[0]
        logits = type(self).change(self.lm_head(hidden), self.final_logits_bias)
        loss_fct = nn.CrossEntropyLoss()
        return (loss_fct(logits.view(-1, self.config.vocab_size), labels.view(-1)),)


def in_place(logits: Tensor, bias: Tensor) -> Tensor:
    same = logits
    logits += bias
    return same


def method_in_place(logits: Tensor, bias: Tensor) -> Tensor:
    logits.add_(bias)
    return logits


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda logits, bias: torch.add(logits, bias), None),
        (lambda logits, bias: logits.add(bias), None),
        (in_place, None),
        (method_in_place, None),
        (lambda logits, bias: logits, r"a bias, got .* no bias"),
        (lambda logits, bias: logits + bias * 2, r"a bias, got .* a bias"),
        (lambda logits, bias: logits + bias + bias, "at most one bias"),
        (lambda logits, bias: logits * 2.0 + bias, "at most one bias"),
        (lambda logits, bias: logits.add(bias, alpha=2), "does `add` to the logits"),
        (lambda logits, bias: torch.add(logits, bias, alpha=2), "does `add` to the logits"),
        (lambda logits, bias: logits + bias.new_ones(()), "does `add` to the logits"),
        (lambda logits, bias: bias + logits, "does `add` to the logits"),
    ],
)
def test_what_is_added_to_the_logits_is_seen(
    change: Change, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChangedLogits, "change", change, raising=False)
    stock = tiny_classes.build(BART)
    stock.__class__ = ChangedLogits
    fused = apply_patch(copy.deepcopy(stock))
    if words is None:
        assert_trains_like(fused, stock, batch(stock))
        return
    with pytest.raises(UnsupportedModelError, match=words):
        fused(**batch(stock))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("FSMTForConditionalGeneration", {}, "an embedding of tokens, which makes no logits"),
        ("PerceiverForMaskedLM", {}, "has no output embeddings"),
        # What it names is a layer below its logits.
        ("DebertaV2ForMaskedLM", {"legacy": False}, "make 16 logits for 101 classes"),
    ],
)
def test_what_can_be_known_is_refused_by_the_patch(
    name: str, settings: dict[str, Any], words: str
) -> None:
    model = tiny_classes.build(name, **settings)
    with pytest.raises(UnsupportedModelError, match=words):
        apply_patch(model)
    assert words in patch_report(model).reason


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("MobileBertForMaskedLM", {}, "made without a call of that module"),
        ("ReformerForMaskedLM", {"chunk_size_lm_head": 1}, "a hidden state for each label"),
        ("ModernBertForMaskedLM", {"sparse_prediction": True}, "a hidden state for each label"),
        ("ProphetNetForConditionalGeneration", {}, "a hidden state for each label"),
    ],
)
def test_another_use_of_the_head_is_refused_by_the_forward(
    name: str, settings: dict[str, Any], words: str
) -> None:
    stock = tiny_classes.build(name, **settings)
    fused = apply_patch(copy.deepcopy(stock))
    with pytest.raises(UnsupportedModelError, match=words):
        fused(**batch(stock))
    assert same_modules(fused, stock)


def test_a_forward_that_wants_other_labels_too() -> None:
    """BERT's pretraining has a loss if the next sentence is judged as well, else none."""
    fused, stock = pair("BertForPreTraining")
    inputs = batch(stock)
    assert_trains_like(fused, stock, inputs)
    del inputs["next_sentence_label"]
    with pytest.raises(UnsupportedModelError, match=r"no loss at all.* more than `labels`"):
        fused(**inputs)


def test_what_the_labels_are_compared_with() -> None:
    unshifted = (*MODELS, "ModernBertForMaskedLM", "T5GemmaForConditionalGeneration")
    unshifted = (*unshifted, "Florence2ForConditionalGeneration", "BartForCausalLM")
    for name in unshifted:
        assert not shifts_labels(apply_patch(tiny_classes.build(name))), name
    for name in ("LlamaForCausalLM", "BertLMHeadModel"):
        assert shifts_labels(apply_patch(tiny_classes.build(name))), name


@pytest.mark.parametrize("name", [BERT, T5])
def test_a_module_of_torch_is_no_single_graph(name: str) -> None:
    fused, stock = pair(name)
    with pytest.raises(Unsupported, match=r"calls `CrossEntropyLoss` itself.*without fullgraph"):
        torch.compile(fused, fullgraph=True)(**batch(stock))


@pytest.mark.slow
@pytest.mark.parametrize("name", [BERT, T5, MARIAN])
def test_a_module_of_torch_is_fused_between_graphs(name: str) -> None:
    fused, stock = pair(name)
    fused.compile()
    assert_trains_like(fused, stock, batch(stock))
    assert patch_report(fused).fused


def test_one_graph(device: str) -> None:
    stock, inputs = on(device, tiny_classes.build(DISTILBERT))
    fused = apply_patch(copy.deepcopy(stock))
    fused.compile(fullgraph=True)
    assert_trains_like(fused, stock, inputs)
    assert patch_report(fused).fused


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ModernBertForMaskedLM", "T5GemmaForConditionalGeneration"])
def test_one_graph_with_the_loss_function_of_the_model(name: str) -> None:
    fused, stock = pair(name)
    fused.compile(fullgraph=True)
    assert fused(**batch(stock)).loss.item() == pytest.approx(stock(**batch(stock)).loss.item())


class ChangedLabels(transformers.DistilBertForMaskedLM):
    """Labels that a compiled forward cannot be asked for, since only their values tell."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        hidden = self.distilbert(input_ids)[0]
        logits = self.vocab_projector(self.vocab_layer_norm(self.vocab_transform(hidden)))
        labels = torch.where(labels == 7, -100, labels)
        loss = nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))
        return (loss,)


@pytest.mark.parametrize("compiled", [False, True])
def test_labels_that_are_changed_on_the_way(compiled: bool) -> None:
    stock = tiny_classes.build(DISTILBERT)
    stock.__class__ = ChangedLabels
    fused = apply_patch(copy.deepcopy(stock))
    model = torch.compile(fused, fullgraph=True) if compiled else fused
    inputs = batch(stock)
    inputs["labels"][inputs["labels"] == 7] = 8
    # Within the rule it is the same loss; values alone show that it is not.
    assert model(**inputs)[0].item() == pytest.approx(stock(**inputs)[0].item())
    inputs["labels"][-1, -1] = 7
    error = RuntimeError if compiled else UnsupportedModelError
    with pytest.raises(error, match="the loss must get the `labels` that the forward"):
        model(**inputs)
