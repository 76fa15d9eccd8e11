"""`model(..., labels, fused_lm_head=True)` of a patched model: TRL's output, from our head."""

from __future__ import annotations

import copy
import functools
import importlib
import types
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs trl (pip install trl)")

import conformance
import tiny_classes
import torch
from causal_loss import in_float64
from oracle import assert_close_as_torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, batch, build
from torch import Tensor, nn
from trains_like import assert_gradients_close, seeded

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report, remove_patch

utils: Any = importlib.import_module("trl.trainer.utils")
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TEMPERATURE = 0.7


def with_trls_head(model: Any, outputs: tuple[str, ...] = FIELDS, **options: Any) -> Any:
    """The model with TRL's head, on the base model as its trainers put it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    utils.add_fused_lm_head(base, TEMPERATURE, outputs=outputs, **options)
    return model


def from_logits(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same fields, out of the logits of a stock model."""
    output = model(input_ids=inputs["input_ids"])
    logits = output.logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE
    if "shift_labels" in inputs:
        fields = from_given_logits(logits, inputs["shift_labels"])
    else:
        fields = from_given_logits(logits[:, :-1], inputs["labels"][:, 1:])
    count = inputs.get("num_items_in_batch", fields["label_mask"].sum().clamp(min=1))
    fields["loss"] = -fields["log_probs"].sum() / count
    aux_loss = output.get("aux_loss")
    if aux_loss is not None:
        config = model.config.get_text_config()
        fields["aux_loss"] = aux_loss
        fields["loss"] = fields["loss"] + config.router_aux_loss_coef * aux_loss
    return fields


def from_given_logits(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The fields per token of logits at the labels' positions, divided by the temperature."""
    keep, index = labels != -100, labels.clamp(min=0)
    probs = logits.log_softmax(-1)
    log_probs = probs.gather(-1, index[..., None])[..., 0].masked_fill(~keep, 0)
    return {
        "log_probs": log_probs,
        "entropy": -(probs.exp() * probs).sum(-1).masked_fill(~keep, 0),
        "log_sum_sq_probs": (2 * probs).logsumexp(-1).masked_fill(~keep, 0).detach(),
        "mean_logits": logits.mean(-1).masked_fill(~keep, 0).detach(),
        "is_top1": (logits.argmax(-1) == index) & keep,
        "label_mask": keep,
    }


def gradients(model: nn.Module, fields: Any) -> dict[str, Tensor | None]:
    """Of any upstream gradients on what has one."""
    model.zero_grad(set_to_none=True)
    values = [fields["log_probs"], fields["entropy"], fields["loss"]]
    drawn = [torch.randn(value.shape, generator=seeded(3)) for value in values]
    upstreams = [upstream.to(values[0].device) for upstream in drawn]
    torch.autograd.backward(
        [(v * u).sum() for v, u in zip(values, upstreams, strict=True) if v.requires_grad]
    )
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_fields_close(ours: Any, plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name in plain:
        if exact[name].dtype == torch.bool:
            assert torch.equal(ours[name], exact[name]), name
            continue
        assert ours[name].dtype == torch.float32
        found = [fields[name] for fields in (ours, plain, exact)]
        if name == "mean_logits":
            # They nearly cancel, and have the rounding of the logits.
            found = [torch.stack([f[name], f["log_probs"]]) for f in (ours, plain, exact)]
        assert_close_as_torch(name, *found)


def assert_like_logits(fused: Any, stock: Any, inputs: dict[str, Any]) -> None:
    """Every field and every gradient, within what the logits themselves reach in this dtype."""
    truth = in_float64(stock)
    output = fused(**inputs, fused_lm_head=True)
    assert type(output) is utils.FusedCausalLMOutput
    assert patch_report(fused).last_loss == "fused"
    plain, exact = from_logits(stock, inputs), from_logits(truth, inputs)
    assert set(output.keys()) == plain.keys()
    assert_fields_close(output, plain, exact)
    found = [gradients(m, f) for m, f in ((fused, output), (stock, plain), (truth, exact))]
    assert_gradients_close(*found)


@pytest.mark.parametrize("order", ["patch first", "trl first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, order: str) -> None:
    """The values are those of the model's own logits, scales and caps and experts included."""
    model, stock = build(family), build(family)
    if order == "patch first":
        with_trls_head(apply_patch(model))
    else:
        apply_patch(with_trls_head(model))
    assert_like_logits(model, stock, batch(model))


# Their forward needs more than text.
NEEDS_MORE = {
    *("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM", "GitForCausalLM"),
    *("MusicgenForCausalLM", "MusicgenMelodyForCausalLM"),
}
REFUSED = {"ProphetNetForCausalLM": "must get a hidden state for each label"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*conformance.class_names("classes")} - NEEDS_MORE))
def test_every_causal_class_is_equal_or_refused_by_name(name: str) -> None:
    model, stock = tiny_classes.build(name), tiny_classes.build(name)
    inputs = tiny_classes.batch(stock)
    with_trls_head(apply_patch(model))
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
            model(**inputs, fused_lm_head=True)
        return
    ours = result_of(model, model(**inputs, fused_lm_head=True))
    assert patch_report(model).last_loss == "fused"
    # Copied before they run: some classes keep states from one forward to the next.
    exact = copy.deepcopy(stock).double()
    samples = [conformance.within_rounding(stock, seed) for seed in range(conformance.SAMPLES)]
    plain = [result_of(each, from_logits(each, inputs)) for each in (stock, *samples)]
    with conformance.in_double():
        truth = result_of(exact, from_logits(exact, inputs))
    conformance.compare(ours, plain, truth, autocast=False)


def result_of(model: Any, fields: Any) -> conformance.Result:
    """Values and gradients as the sweep of the classes compares them."""
    values = {name: fields[name].detach() for name in ("log_probs", "entropy")}
    return conformance.Result(fields["loss"].detach(), {**gradients(model, fields), **values}, ())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    model, stock = (build(family).to("cuda", dtype) for _ in range(2))
    assert_like_logits(with_trls_head(apply_patch(model)), stock, batch(stock))


def shifted(inputs: dict[str, Any]) -> dict[str, Any]:
    labels = inputs["labels"]
    return {**inputs, "shift_labels": nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]}


def counted(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "num_items_in_batch": torch.tensor(5)}


def without_any(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "labels": torch.full_like(inputs["labels"], -100)}


@pytest.mark.parametrize("change", [shifted, counted, without_any])
def test_what_the_call_may_hold(change: Any) -> None:
    model, stock = build("llama"), build("llama")
    inputs = change(batch(model))
    assert_like_logits(with_trls_head(apply_patch(model)), stock, inputs)


def test_shift_labels_alone_are_enough() -> None:
    """As asynchronous GRPO calls the model."""
    model = with_trls_head(apply_patch(build("llama")))
    inputs = shifted(batch(model))
    both = model(**inputs, fused_lm_head=True)
    del inputs["labels"]
    alone = model(**inputs, fused_lm_head=True)
    assert alone.log_probs.shape == inputs["input_ids"].shape
    assert all(torch.equal(alone[name], both[name]) for name in both)


def lora(**options: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    return lambda model: get_peft_model(model, LoraConfig(**{**settings, **options}))


HEADS = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "saved": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": lora(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 7]}),
}


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_heads_in_adapters(kind: str, patch_first: bool) -> None:
    """TRL's own head ignores them, or fails."""

    def made(patch: bool) -> Any:
        model = build("llama", tie_word_embeddings=False)
        if patch and patch_first:
            apply_patch(model)
        torch.manual_seed(1)
        model = HEADS[kind](model)
        return apply_patch(with_trls_head(model)) if patch else model

    assert_like_logits(made(True), made(False), batch(build("llama")))


def test_a_head_that_is_not_taken_apart_makes_nothing_unasked() -> None:
    models = [HEADS["dora"](build("llama", tie_word_embeddings=False)) for _ in range(2)]
    outputs: list[Any] = []
    for model, fields in zip(models, (FIELDS, ("log_probs",)), strict=True):
        model.load_state_dict(models[0].state_dict())
        apply_patch(with_trls_head(model, outputs=fields))
        outputs.append(model(**batch(build("llama")), fused_lm_head=True))
    assert set(outputs[1].keys()) == {"loss", "log_probs", "label_mask"}
    assert torch.equal(outputs[0].log_probs, outputs[1].log_probs)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_head_that_is_not_taken_apart_runs_in_chunks(impl: str) -> None:
    """Two tokens at a time, in bfloat16, where gradients are summed in float32."""
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = build("llama", tie_word_embeddings=False)
        models.append(HEADS["dora"](model).to(torch.bfloat16))
    fused, stock = models
    apply_patch(with_trls_head(fused), impl=impl, memory_budget_mib=0.004)
    assert_like_logits(fused, stock, batch(stock.get_base_model(), rows=4, length=23))


def test_adapters_are_switched_off_for_the_reference() -> None:
    model, stock = (lora()(build("llama", tie_word_embeddings=False)) for _ in range(2))
    apply_patch(with_trls_head(model))
    inputs = batch(build("llama"))
    with torch.no_grad(), model.disable_adapter(), stock.disable_adapter():
        found = model(**inputs, fused_lm_head=True)
        wanted = from_logits(stock, inputs)
        exact = from_logits(stock.double(), inputs)
    assert not found.log_probs.requires_grad
    assert_fields_close(found, wanted, exact)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_in_float32(autocast: bool) -> None:
    """`cast_lm_head_to_fp32` of TRL, on hidden states and on a head of lower precision."""
    model, trls = build("phi").bfloat16(), build("phi").bfloat16()
    inputs = batch(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = trls.model(inputs["input_ids"])[0]
        for each in (apply_patch(model), trls):
            with_trls_head(each, cast_lm_head_to_fp32=True)
        output, wanted = (each(**inputs, fused_lm_head=True) for each in (model, trls))
    truth = copy.deepcopy(trls.lm_head).double()(hidden.double())[:, :-1] / TEMPERATURE
    exact = from_given_logits(truth, inputs["labels"][:, 1:])
    for name in ("log_probs", "entropy"):
        assert output[name].dtype == torch.float32
        assert_close_as_torch(name, output[name], wanted[name], exact[name])
    output.loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


def test_the_report_tells_what_trl_is_given() -> None:
    model = with_trls_head(apply_patch(build("llama")), outputs=("log_probs", "entropy"))
    assert "those of TRL log_probs and entropy at temperature 0.7" in patch_report(model).reason


def test_only_what_trl_asked_for_is_computed() -> None:
    model = with_trls_head(apply_patch(build("llama")), outputs=("is_top1",))
    output = model(**batch(model), fused_lm_head=True)
    assert set(output.keys()) == {"loss", "log_probs", "is_top1", "label_mask"}
    assert set(output.keys()) == set(
        with_trls_head(build("llama"), outputs=("is_top1",))(
            **batch(model), fused_lm_head=True
        ).keys()
    )


def test_without_the_keyword_the_model_is_the_patched_one() -> None:
    model, stock = with_trls_head(apply_patch(build("llama"))), build("llama")
    inputs = batch(model)
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    ids = inputs["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))


def test_a_label_that_is_no_class_is_an_error() -> None:
    """TRL's head returns a number."""
    model = with_trls_head(apply_patch(build("llama")))
    inputs = batch(model)
    inputs["labels"][0, -1] = model.config.vocab_size
    with pytest.raises(ValueError, match="must hold class ids"):
        model(**inputs, fused_lm_head=True)


def test_a_class_without_mass_counts_nothing_in_the_entropy() -> None:
    """TRL's head returns nan."""
    model, stock = build("phi"), build("phi")
    for each in (model, stock):
        each.lm_head.bias.data[5] = -torch.inf
    output = with_trls_head(apply_patch(model))(**batch(model), fused_lm_head=True)
    assert output.entropy.isfinite().all()
    gradient = gradients(model, output)["lm_head.weight"]
    assert gradient is not None and gradient.isfinite().all()


def test_hooks_of_the_head_run() -> None:
    """TRL's head never calls the module."""
    model = with_trls_head(apply_patch(build("llama")))
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(**batch(model), fused_lm_head=True)
    assert seen == [(2, 11, 16)]


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
def test_losses_that_trl_does_not_make_are_refused(name: str) -> None:
    model = with_trls_head(apply_patch(build("llama"), **{name: 0.1}))
    with pytest.raises(UnsupportedModelError, match=f"`{name}` must be 0"):
        model(**batch(model), fused_lm_head=True)


def test_the_head_of_the_last_trainer_counts() -> None:
    model = with_trls_head(apply_patch(build("llama")))
    utils.add_fused_lm_head(model, 1.0)
    other = with_trls_head(build("llama"))
    utils.add_fused_lm_head(other, 1.0)
    output = model(**batch(model), fused_lm_head=True)
    assert output.entropy is None
    wanted = other(**batch(model), fused_lm_head=True)
    torch.testing.assert_close(output.log_probs, wanted.log_probs)


@pytest.mark.parametrize("order", ["patch first", "trl first"])
def test_remove_patch_gives_back_trls_wrapper(order: str) -> None:
    model, stock = build("llama"), with_trls_head(build("llama"))
    if order == "patch first":
        with_trls_head(apply_patch(model))
    else:
        before = with_trls_head(model).__dict__["forward"]
        apply_patch(model)
    remove_patch(model)
    forward = model.__dict__["forward"]
    assert type(forward) is types.MethodType and forward.__self__ is model
    assert forward.__func__.__code__ is stock.__dict__["forward"].__func__.__code__
    assert order == "patch first" or forward is before
    inputs = batch(model)
    for keywords in ({}, {"fused_lm_head": True}):
        found, wanted = model(**inputs, **keywords), stock(**inputs, **keywords)
        assert type(found) is type(wanted) and torch.equal(found.loss, wanted.loss)


def test_a_model_that_may_stay_stock_keeps_trls_head() -> None:
    model = with_trls_head(apply_patch(build("llama"), strict=False))
    model.lm_head.register_full_backward_hook(lambda *_: None)
    inputs = batch(model)
    with pytest.warns(UserWarning, match="stays stock: a backward hook on the head"):
        found = model(**inputs, fused_lm_head=True)
    wanted = with_trls_head(build("llama"))(**inputs, fused_lm_head=True)
    assert torch.equal(found.log_probs, wanted.log_probs)


def test_a_copy_is_no_silent_stand_in_for_its_original() -> None:
    """TRL's wrapper on a deep copy runs the forward of the original."""
    model = with_trls_head(apply_patch(build("llama")))
    other = copy.deepcopy(model)
    inputs = batch(model)
    with pytest.raises(UnsupportedModelError, match="a copy of a model with TRL's fused head"):
        other(**inputs, fused_lm_head=True)
    model(**inputs, fused_lm_head=True)


def like_trls(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
    raise AssertionError("must not run")


def test_trls_head_is_known_by_its_code_alone() -> None:
    """`functools.wraps` copies a function's attributes to whatever it wraps."""
    model = with_trls_head(build("llama"))
    own = model.__dict__["forward"].__func__
    model.forward = types.MethodType(functools.wraps(own)(like_trls), model)
    with pytest.raises(UnsupportedModelError, match="there is a forward on LlamaForCausalLM"):
        apply_patch(model)


def test_another_head_of_trl_is_refused_by_name() -> None:
    """A version of TRL without this protocol, before the patch and after."""
    code = like_trls.__code__.replace(co_name="_fused_forward")
    other = types.FunctionType(code, {"__name__": "trl.trainer.utils"})
    model, patched = build("llama"), apply_patch(build("llama"))
    for each in (model, patched):
        each.forward = types.MethodType(other, each)
    named = r"trl\.trainer\.utils.*install a TRL with the fused head of 1\.16"
    with pytest.raises(UnsupportedModelError, match=named):
        apply_patch(model)
    assert not patch_report(patched).fused
    with pytest.raises(UnsupportedModelError, match=named):
        patched(**batch(model))


@pytest.mark.parametrize("order", ["patch first", "trl first"])
def test_compiled_as_one_graph(order: str) -> None:
    model, stock = build("llama"), build("llama")
    if order == "patch first":
        with_trls_head(apply_patch(model))
    else:
        apply_patch(with_trls_head(model))
    compiled: Any = torch.compile(model, fullgraph=True)
    inputs = batch(model)
    output, wanted = compiled(**inputs, fused_lm_head=True), from_logits(stock, inputs)
    exact_model = in_float64(stock)
    exact = from_logits(exact_model, inputs)
    assert_fields_close(output, wanted, exact)
    found = [gradients(m, f) for m, f in ((model, output), (stock, wanted), (exact_model, exact))]
    assert_gradients_close(*found)
