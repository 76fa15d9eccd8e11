"""Labels that a model renames or makes are fused; a loss outside the head is noticed."""

from __future__ import annotations

import copy
import functools
import io
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import batch, build
from torch import Tensor, nn
from trains_like import assert_trains_like, same_modules
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report, remove_patch
from hf_fused_head.patches.lazy_logits import LazyLogits

pytestmark = pytest.mark.newest

Llama = transformers.LlamaForCausalLM


class Renamed(Llama):
    def forward(self, input_ids: Any = None, targets: Any = None, **rest: Any) -> Any:
        return super().forward(input_ids=input_ids, labels=targets, **rest)


class Made(Llama):
    def forward(self, input_ids: Any = None, **rest: Any) -> Any:
        labels = input_ids.masked_fill(input_ids % 7 == 0, -100)
        return super().forward(input_ids=input_ids, labels=labels, **rest)


class Positional(Llama):
    def forward(self, input_ids: Any = None, targets: Any = None) -> Any:
        return super().forward(input_ids, None, None, None, None, targets)


class Changed(Llama):
    """Takes labels, gives others, and drops the count."""

    def forward(self, input_ids: Any = None, labels: Any = None, **rest: Any) -> Any:
        labels = None if labels is None else labels.roll(1, 0)
        output = super().forward(input_ids=input_ids, labels=labels)
        if output.loss is not None:
            output.loss = output.loss * 3
        return output


class Twice(Llama):
    """Two losses, both of which transformers' forward computes."""

    def forward(self, input_ids: Any = None, first: Any = None, second: Any = None) -> Any:
        one = super().forward(input_ids=input_ids, labels=first)
        two = super().forward(input_ids=input_ids, labels=second)
        return CausalLMOutput(loss=one.loss + two.loss, logits=one.logits)


class Mixin:
    def forward(self, input_ids: Any = None, targets: Any = None, **rest: Any) -> Any:
        return super().forward(input_ids=input_ids, labels=targets, **rest)  # type: ignore[misc]


class Mixed(Mixin, Llama):
    pass


class RenamedAgain(Renamed):
    def forward(self, input_ids: Any = None, gold: Any = None) -> Any:
        return super().forward(input_ids=input_ids, targets=gold)


def like(cls: type, **settings: Any) -> Any:
    """The tiny Llama as another class."""
    model = build("llama", tie_word_embeddings=False, **settings)
    model.__class__ = cls
    return model


def inputs_for(*names: str) -> dict[str, Any]:
    """Token ids, and labels under each of some names, other ones for each."""
    model = build("llama")
    inputs = {"input_ids": batch(model)["input_ids"]}
    for seed, name in enumerate(names):
        inputs[name] = batch(model, seed=seed)["labels"]
    return inputs


INSIDE: list[tuple[type, dict[str, Any]]] = [
    (Renamed, inputs_for("targets")),
    (Renamed, inputs_for("targets") | {"num_items_in_batch": 7}),
    (Made, inputs_for()),
    (Positional, inputs_for("targets")),
    (Changed, inputs_for("labels") | {"num_items_in_batch": 7}),
    (Twice, inputs_for("first", "second")),
    (Mixed, inputs_for("targets")),
    (RenamedAgain, inputs_for("gold")),
]


@pytest.mark.parametrize(("cls", "inputs"), INSIDE)
def test_labels_that_reach_the_forward_of_transformers_are_fused(
    cls: type, inputs: dict[str, Any]
) -> None:
    stock = like(cls)
    fused = apply_patch(copy.deepcopy(stock))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_trains_like(fused, stock, inputs)
        assert isinstance(fused(**inputs).logits, LazyLogits)
    assert patch_report(fused).last_loss == "fused"
    assert same_modules(remove_patch(fused), stock)
    assert torch.equal(fused(**inputs).loss, stock(**inputs).loss)


def test_copies_pickles_and_adapters_keep_renamed_labels() -> None:
    stock, inputs = like(Renamed), inputs_for("targets")
    fused = apply_patch(copy.deepcopy(stock))
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(fused), LoraConfig(target_modules=["lm_head"]))
    for model in (copy.deepcopy(fused), torch.load(file, weights_only=False), adapted):
        output = model(**inputs)
        assert output.loss.item() == pytest.approx(stock(**inputs).loss.item())
        assert isinstance(output.logits, LazyLogits)


def test_a_class_with_a_loss_of_its_own_is_fused_under_renamed_labels() -> None:
    class RenamedBart(transformers.BartForCausalLM):
        def forward(self, input_ids: Any = None, targets: Any = None) -> Any:
            return super().forward(input_ids=input_ids, labels=targets)

    config = transformers.BartConfig(
        vocab_size=101, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8
    )
    stock = RenamedBart(config).eval()
    fused, inputs = apply_patch(copy.deepcopy(stock)), inputs_for("targets")
    output = fused(**inputs)
    assert output.loss.item() == pytest.approx(stock(**inputs).loss.item())
    assert isinstance(output.logits, LazyLogits)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_renamed_labels_are_fused_when_compiled(fresh_compiler: None) -> None:
    stock = like(Renamed, num_hidden_layers=1)
    fused = apply_patch(copy.deepcopy(stock))
    model, inputs = torch.compile(fused, fullgraph=True), inputs_for("targets")
    for _ in range(2):
        output = model(**inputs)
        assert output.loss.item() == pytest.approx(stock(**inputs).loss.item())
        assert output.loss.requires_grad and not isinstance(output.logits, Tensor)


class PastTheClass(Llama):
    """Names the class whose forward it calls, so that none can come between."""

    def forward(self, input_ids: Any = None, targets: Any = None) -> Any:
        return Llama.forward(self, input_ids=input_ids, labels=targets)


class OwnCall(Llama):
    def forward(self, input_ids: Any = None, targets: Any = None, **rest: Any) -> Any:
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        loss = self.loss_function(logits, targets, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class OwnLoss(Llama):
    """A loss from the head's weight, without the head."""

    def forward(self, input_ids: Any = None, targets: Any = None) -> Any:
        hidden = self.model(input_ids=input_ids).last_hidden_state
        logits = nn.functional.linear(hidden, self.lm_head.weight)
        return CausalLMOutput(loss=shifted_loss(logits, targets), logits=logits)


class OwnTuple(Llama):
    def forward(self, input_ids: Any = None, targets: Any = None) -> Any:
        logits = super().forward(input_ids=input_ids).logits
        return (shifted_loss(logits, targets), logits)


class OwnTensor(Llama):
    def forward(self, input_ids: Any = None, targets: Any = None) -> Any:
        return shifted_loss(super().forward(input_ids=input_ids).logits, targets)


class OwnObject(Llama):
    def forward(self, input_ids: Any = None, targets: Any = None) -> Any:
        logits = super().forward(input_ids=input_ids).logits
        return types.SimpleNamespace(loss=shifted_loss(logits, targets), logits=logits)


class OwnKey(Llama):
    """A loss under a name of its own."""

    def forward(self, input_ids: Any = None, targets: Any = None) -> Any:
        logits = super().forward(input_ids=input_ids).logits
        return {"total": self.loss_function(logits, targets, self.config.vocab_size)}


class FusedAndOwn(Llama):
    """One loss in the head, and one more from its logits."""

    def forward(self, input_ids: Any = None, targets: Any = None) -> Any:
        output = super().forward(input_ids=input_ids, labels=targets)
        extra = self.loss_function(output.logits, targets.roll(1, 0), self.config.vocab_size)
        return CausalLMOutput(loss=output.loss + extra)


OUTSIDE = [PastTheClass, OwnCall, OwnLoss, OwnTuple, OwnTensor, OwnObject, OwnKey, FusedAndOwn]


def loss_of(output: Any) -> Tensor:
    if isinstance(output, dict) and "total" in output:
        return output["total"]
    if isinstance(output, tuple):
        return output[0]
    return output if isinstance(output, Tensor) else output.loss


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("cls", OUTSIDE)
def test_a_loss_outside_the_head_is_an_error(cls: type, grad: bool) -> None:
    stock = like(cls)
    model, inputs = apply_patch(copy.deepcopy(stock)), inputs_for("targets")
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(UnsupportedModelError, match="from elsewhere in a forward without `labels`"),
    ):
        model(**inputs)
    report = patch_report(model)
    assert not report.fused and "elsewhere" in report.reason
    assert same_modules(model, stock)
    assert torch.equal(loss_of(model(**inputs)), loss_of(stock(**inputs)))


@pytest.mark.parametrize("cls", OUTSIDE)
def test_a_loss_outside_the_head_warns_once_where_the_patch_is_not_strict(cls: type) -> None:
    stock = like(cls)
    model, inputs = apply_patch(copy.deepcopy(stock), strict=False), inputs_for("targets")
    with pytest.warns(UserWarning) as caught:
        losses = [loss_of(model(**inputs)) for _ in range(3)]
    assert ["without `labels`" in str(warning.message) for warning in caught] == [True]
    expected = loss_of(stock(**inputs))
    for loss in losses:
        if cls is FusedAndOwn:
            assert loss.item() == pytest.approx(expected.item())
        else:
            assert torch.equal(loss, expected)
    report = patch_report(model)
    assert report.last_loss.startswith("not fused: the loss of") and "not fused" in str(report)


def test_the_report_tells_of_the_last_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = apply_patch(like(OwnCall), strict=False)
    assert patch_report(model).last_loss == ""
    assert "last loss: none yet" in str(patch_report(model))
    with pytest.warns(UserWarning):
        model(**inputs_for("targets"))
    assert patch_report(model).last_loss.startswith("not fused")
    monkeypatch.setattr(OwnCall, "forward", Llama.forward)
    model(**inputs_for("labels"))
    assert patch_report(model).last_loss == "fused"
    assert "last loss: fused" in str(patch_report(model))


@pytest.mark.parametrize("strict", [True, False])
def test_a_loss_outside_the_head_is_noticed_when_compiled(
    strict: bool, fresh_compiler: None
) -> None:
    stock = like(OwnCall, num_hidden_layers=1)
    fused, inputs = apply_patch(copy.deepcopy(stock), strict=strict), inputs_for("targets")
    model = torch.compile(fused)
    if strict:
        with pytest.raises(UnsupportedModelError, match="without `labels`"):
            model(**inputs)
    else:
        with pytest.warns(UserWarning, match="without `labels`"):
            loss = model(**inputs).loss
        assert loss.item() == pytest.approx(stock(**inputs).loss.item())
        assert patch_report(model).last_loss.startswith("not fused")


def generates(model: Any) -> None:
    model.train().generate(inputs_for()["input_ids"], max_new_tokens=3, do_sample=False)


def evaluates(model: Any) -> None:
    with torch.no_grad():
        model.train()(**inputs_for())


def in_evaluation_mode(model: Any) -> None:
    model.eval()(**inputs_for())


def never_trains(model: Any) -> None:
    model.train().requires_grad_(False)(**inputs_for())


def asks_for_the_loss_function(model: Any) -> None:
    assert model.loss_function is not None


def reports_from_a_hook(model: Any) -> None:
    reports: list[Any] = []
    model.model.register_forward_hook(lambda *args: reports.append(patch_report(model)))
    model.eval()(**inputs_for())
    assert reports[0].fused


@pytest.mark.parametrize(
    "use",
    [
        *(generates, evaluates, in_evaluation_mode, never_trains),
        *(asks_for_the_loss_function, reports_from_a_hook),
    ],
)
def test_what_takes_no_loss_is_left_in_peace(use: Callable[[Any], None]) -> None:
    model = apply_patch(build("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(model)
    assert patch_report(model).last_loss == "" and patch_report(model).fused


def test_a_router_loss_without_labels_is_no_loss() -> None:
    model = apply_patch(build("mixtral")).eval()
    output = model(**inputs_for())
    assert output.aux_loss is not None and patch_report(model).fused


REMEDY = "FusedHeadTrainer, or label_smoothing= of apply_patch"


def unfused(caught: Any) -> list[str]:
    """The warnings that a loss is not fused."""
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "without labels" in text]


@pytest.mark.parametrize("strict", [True, False])
def test_a_training_forward_without_labels_warns_once_a_model(strict: bool) -> None:
    for _ in range(2):
        stock = build("llama")
        model, inputs = apply_patch(copy.deepcopy(stock), strict=strict), inputs_for("labels")
        labels = inputs.pop("labels")
        with pytest.warns(UserWarning) as caught:
            for _ in range(3):
                loss = model.loss_function(model(**inputs).logits, labels, 101)
        assert len(unfused(caught)) == 1 and REMEDY in unfused(caught)[0]
        assert torch.equal(loss, stock.loss_function(stock(**inputs).logits, labels, 101))
        assert patch_report(model).fused
        assert patch_report(model).last_loss.startswith("not fused: LlamaForCausalLM was called")
        model(**inputs, labels=labels)
        assert patch_report(model).last_loss == "fused"


def class_forward(model: Any, inputs: dict[str, Any]) -> Tensor:
    return Llama.forward(model, **inputs).loss


def head_alone(model: Any, inputs: dict[str, Any]) -> Tensor:
    hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
    return shifted_loss(model.lm_head(hidden), inputs["labels"])


@pytest.mark.parametrize("loss_of", [class_forward, head_alone])
def test_a_head_that_trains_outside_the_forward_of_its_model_warns_once(
    loss_of: Callable[[Any, dict[str, Any]], Tensor],
) -> None:
    stock = build("llama").train()
    model, inputs = apply_patch(copy.deepcopy(stock)), inputs_for("labels")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model, inputs)
    with pytest.warns(UserWarning) as caught:
        losses = [loss_of(model, inputs) for _ in range(3)]
    assert ["outside of its model's forward" in str(text.message) for text in caught] == [True]
    assert torch.equal(losses[-1], loss_of(stock, inputs))
    assert patch_report(model).last_loss.startswith("not fused: the head (Linear)")
    output = model(**inputs)
    assert output.logits.requires_grad and patch_report(model).last_loss == "fused"


def loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return 2 * shifted_loss(outputs.logits, labels)


class PopsLabels(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any
    ) -> Any:
        labels = inputs.pop("labels")
        output = model(**inputs)
        loss = shifted_loss(output.logits, labels)
        return (loss, output) if return_outputs else loss


TRAINERS: dict[str, tuple[Callable[..., Trainer], dict[str, Any]]] = {
    "label smoothing": (Trainer, {"label_smoothing_factor": 0.1}),
    "compiled": (Trainer, {"label_smoothing_factor": 0.1, "torch_compile": True}),
    "compute_loss_func": (functools.partial(Trainer, compute_loss_func=loss_func), {}),
    "pops labels": (PopsLabels, {}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_the_stock_trainer_that_takes_labels_away(
    name: str, tmp_path: Path, fresh_compiler: None
) -> None:
    """It trains as ever, with one warning that names the remedy."""
    make, changes = TRAINERS[name]
    rows = [{key: value[0] for key, value in batch(build("llama"), rows=1).items()}] * 8
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        max_steps=3,
        logging_steps=1,
        disable_tqdm=True,
        per_device_train_batch_size=2,
        save_strategy="no",
        **changes,
    )
    histories = []
    for patch in (lambda model: model, apply_patch):
        torch._dynamo.reset()
        model = patch(build("llama", num_hidden_layers=1))
        trainer = make(model, arguments, train_dataset=rows, eval_dataset=rows)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
            trainer.evaluate()
        keys = ("loss", "eval_loss", "grad_norm")
        histories.append([[e[key] for key in keys if key in e] for e in trainer.state.log_history])
        texts = unfused(caught)
    assert histories[0] == histories[1]
    assert len(texts) == 1 and REMEDY in texts[0]
    assert patch_report(model).fused and patch_report(model).last_loss.startswith("not fused")
