"""The mechanism: who it composes with, what it refuses by name, and what it leaves behind."""

from __future__ import annotations

import copy
import gc
import io
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, dispatch_model
from accelerate.hooks import remove_hook_from_module
from oracle import assert_close_as_torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from tiny_models import batch, build
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from trains_like import assert_gradients_like, assert_trains_like, same_modules
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_fused_head import (
    UnsupportedModelError,
    apply_patch,
    last_stats,
    patch_report,
    patched,
    remove_patch,
)
from hf_fused_head.patches import fused_forward
from hf_fused_head.patches.lazy_logits import LazyLogits, ReplicaLogits, UnavailableLogits

Llama = transformers.LlamaForCausalLM


def llama_with(forward: Callable[..., Any]) -> Any:
    """A Llama whose class has another forward."""
    return type("MyLlama", (Llama,), {"forward": forward})(build("llama").config)


def output_of(
    model: Any, input_ids: Tensor, change: Callable[[Tensor], Tensor], **loss: Any
) -> Any:
    """What most forwards do, with a change between the head and the loss."""
    logits = change(model.lm_head(model.model(input_ids=input_ids).last_hidden_state))
    vocab_size = loss.pop("vocab_size", model.config.vocab_size)
    value = model.loss_function(logits=logits, vocab_size=vocab_size, **loss)
    return CausalLMOutputWithPast(loss=value, logits=logits)


# What a forward does to its logits, and the word by which it must be refused.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + 0.5,
    "sub": lambda x: 1 - x,
    "mul": lambda x: x * torch.ones(101),
    "neg": lambda x: -x,
    "view": lambda x: x.view(1, -1, 101),
    "getitem": lambda x: x[:, :-1],
    "writes": lambda x: x.__setitem__((..., 3), 0.0) or x,
    "clamp": lambda x: x.clamp(-1, 1),
    "masked_fill": lambda x: torch.masked_fill(x, torch.zeros(101, dtype=torch.bool), 0.0),
    "log_softmax": lambda x: nn.functional.log_softmax(x, dim=-1),
    "detach": lambda x: x.detach(),
    "int64": lambda x: x.to(torch.int64),
    "scale 2": lambda x: x * 2,
    "softcap 2": lambda x: (x / 2).tanh() * 2,
    "twice": lambda x: x.tanh().tanh(),
}
# What changes nothing, in the many ways it can be spelled.
NO_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "casts": lambda x: x.to(torch.float64).to(dtype=torch.float32).type(torch.float32),
    "moves": lambda x: x.to(x.device).to("cpu").to("cpu", torch.float32).contiguous(),
    "shape": lambda x: x.view(*x.shape).reshape(x.size(0), -1, x.size(-1)),
    "there and back": lambda x: 2 * x / 4 * 2.0,
    "in place": lambda x: x.mul_(2).div_(2),
    "slices": lambda x: x[:, -x.size(1) :, :][:],
    "functions": lambda x: torch.div(torch.mul(x, 2.0), 2.0),
}


@pytest.mark.parametrize("word", CHANGES)
def test_a_change_of_the_logits_is_refused_by_name(word: str) -> None:
    def forward(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return output_of(self, input_ids, CHANGES[word], labels=labels)

    model = apply_patch(llama_with(forward))
    with pytest.raises(UnsupportedModelError, match=rf"{word}.*remove_patch"):
        model(**batch(model))
    assert not patch_report(model).fused and type(model).__name__ == "MyLlama"


@pytest.mark.parametrize("name", NO_CHANGES)
def test_no_change_of_the_logits_is_seen_as_none(name: str) -> None:
    def forward(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return output_of(self, input_ids, NO_CHANGES[name], labels=labels)

    stock = llama_with(forward)
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    assert_trains_like(fused, stock, inputs)
    with torch.no_grad():
        logits, expected = fused(**inputs).logits, stock(**inputs).logits
    assert logits.dtype == expected.dtype and torch.equal(logits, expected)


def other_labels(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    return output_of(self, input_ids, lambda x: x, labels=labels.clone())


def dropped_count(self: Any, input_ids: Tensor, labels: Any = None, **kwargs: Any) -> Any:
    return output_of(self, input_ids, lambda x: x, labels=labels)


def smaller_vocabulary(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    return output_of(self, input_ids, lambda x: x, labels=labels, vocab_size=100)


def head_twice(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
    return output_of(self, input_ids, lambda x: x, labels=labels)


def loss_twice(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    output = output_of(self, input_ids, lambda x: x, labels=labels)
    self.loss_function(output.logits, labels, 101)
    return output


def loss_of_other_logits(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    hidden = self.model(input_ids=input_ids).last_hidden_state
    logits = nn.functional.linear(hidden, self.lm_head.weight)
    return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, 101), logits=logits)


def own_loss(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    hidden = self.model(input_ids=input_ids).last_hidden_state
    logits = nn.functional.linear(hidden, self.lm_head.weight)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return CausalLMOutputWithPast(loss=loss, logits=logits)


def cut_tokens(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state[:, 1:])
    full = nn.functional.pad(logits, (0, 0, 1, 0))
    return CausalLMOutputWithPast(loss=self.loss_function(full, labels, 101), logits=full)


def head_with_keywords(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    logits = self.lm_head(input=self.model(input_ids=input_ids).last_hidden_state)
    return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, 101), logits=logits)


@pytest.mark.parametrize(
    ("forward", "reason", "extra"),
    [
        (other_labels, "`labels` that the forward was called with", {}),
        (dropped_count, "`num_items_in_batch` that", {"num_items_in_batch": 3}),
        (dropped_count, "`shift_labels` that", {"shift_labels": torch.zeros(2, 11).long()}),
        (smaller_vocabulary, "101 rows of the head, got vocab_size=100", {}),
        (head_twice, "once a forward, got a second", {}),
        (loss_twice, "loss function must be called once", {}),
        (loss_of_other_logits, "got logits from elsewhere", {}),
        (own_loss, "got a loss from elsewhere", {}),
        (cut_tokens, "got 20 for 22", {}),
        (head_with_keywords, "with the hidden states alone", {}),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_another_way_to_the_loss_is_refused(
    forward: Callable[..., Any], reason: str, extra: dict[str, Any], strict: bool
) -> None:
    stock = llama_with(forward)
    model = apply_patch(copy.deepcopy(stock), strict=strict)
    inputs = batch(model) | extra
    if strict:
        with pytest.raises(UnsupportedModelError, match=reason):
            model(**inputs)
    elif forward is not smaller_vocabulary:  # Which stock itself does not survive.
        with pytest.warns(UserWarning, match=reason):
            assert torch.equal(model(**inputs).loss, stock(**inputs).loss)
    if strict or forward is not smaller_vocabulary:
        assert reason.split()[-1] in patch_report(model).reason
        assert same_modules(model, stock)


def more_keywords(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    return output_of(
        self, input_ids, lambda x: x, labels=labels, label_smoothing=0.3, reduction="sum"
    )


def test_keywords_that_the_stock_loss_drops_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = llama_with(more_keywords)
    model = apply_patch(copy.deepcopy(stock))
    assert_trains_like(model, stock, batch(stock))
    monkeypatch.setattr(fused_forward, "_UNKNOWN_KEYWORDS", frozenset({"label_smoothing"}))
    with pytest.raises(UnsupportedModelError, match="must not get `label_smoothing`"):
        model(**batch(model))


def liger(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as if another library had defined it."""
    code, names = function.__code__, dict(function.__globals__)
    return types.FunctionType(code, names | {"__name__": "liger_kernel.transformers.model.llama"})


def stock_like(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    return output_of(self, input_ids, lambda x: x, labels=labels)


def liger_on_the_class(model: Any) -> None:
    model.__class__ = type("LlamaForCausalLM", (Llama,), {"forward": liger(stock_like)})


def liger_on_the_instance(model: Any) -> None:
    model.forward = types.MethodType(liger(stock_like), model)


def forward_on_the_instance(model: Any) -> None:
    model.forward = types.MethodType(stock_like, model)


def forward_on_the_head(model: Any) -> None:
    model.lm_head.forward = lambda hidden: hidden


def own_loss_function(model: Any) -> None:
    model.loss_function = stock_like


@pytest.mark.parametrize(
    ("touch", "reason"),
    [
        (liger_on_the_class, "liger_kernel.*without use_liger_kernel"),
        (liger_on_the_instance, "liger_kernel.*without use_liger_kernel"),
        (forward_on_the_instance, "a forward on LlamaForCausalLM, .*test_adapter.stock_like"),
        (forward_on_the_head, r"a forward on the head \(Linear\)"),
        (own_loss_function, "its loss function is stock_like"),
    ],
)
def test_other_hands_on_the_model_are_refused_at_once(
    touch: Callable[[Any], None], reason: str
) -> None:
    model = build("llama")
    touch(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        apply_patch(model)
    with pytest.warns(UserWarning, match=reason):
        apply_patch(model, strict=False)
    assert not patch_report(model).fused


@pytest.mark.parametrize(
    ("touch", "reason"),
    [
        (forward_on_the_head, r"a forward on the head \(Linear\)"),
        (own_loss_function, "must be a cross-entropy of transformers, got stock_like"),
        (
            lambda model: model.lm_head.register_full_backward_hook(lambda *args: None),
            "backward hook on the head",
        ),
    ],
)
def test_other_hands_after_the_patch_are_refused_by_the_next_forward(
    touch: Callable[[Any], None], reason: str
) -> None:
    model = apply_patch(build("llama"))
    model(**batch(model))
    if touch is forward_on_the_head:
        model.lm_head = nn.Linear(16, 101, bias=False)
    touch(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        model(**batch(model))
    assert type(model) is Llama and not patch_report(model).fused


class TakesNoLabels(transformers.PreTrainedModel):
    config_class = transformers.LlamaConfig

    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(101, 16)
        self.lm_head = nn.Linear(16, 101)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return self.lm_head(self.embed_tokens(input_ids))


def test_what_is_no_causal_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="takes no labels"):
        apply_patch(TakesNoLabels(build("llama").config))
    with pytest.raises(UnsupportedModelError, match="Linear is no transformers model"):
        apply_patch(nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"z_loss": -1.0}, ValueError, "z_loss"),
        ({"memory_budget_mib": 0}, ValueError, "memory_budget_mib"),
        ({"impl": "fast"}, ValueError, "impl"),
        ({"stats": ("perplexity",)}, ValueError, "stats"),
    ],
)
def test_options_are_checked_at_the_door(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build("llama")
    with pytest.raises(error, match=message):
        apply_patch(model, **options)
    assert type(model) is Llama


def test_a_named_engine_is_refused_where_it_cannot_run() -> None:
    """Not when the model is patched: it may move to another device first."""
    model = apply_patch(build("llama").double(), impl="triton")
    with pytest.raises(NotImplementedError, match="impl"):
        model(**batch(model))
    assert patch_report(model).kernel.startswith("none here")


def test_the_context_manager_gives_former_options_back() -> None:
    model = apply_patch(build("llama"), label_smoothing=0.1)
    inputs = batch(model)
    before = model(**inputs).loss
    with patched(model, stats=("accuracy",)):
        assert model(**inputs).loss.item() != before.item()
        assert last_stats(model) is not None
    assert torch.equal(model(**inputs).loss, before)
    with patched(build("llama")) as other:
        assert patch_report(other).fused
    assert not patch_report(other).fused and type(other) is Llama


def test_statistics_do_not_feel_what_the_model_adds_to_its_loss() -> None:
    model = apply_patch(build("qwen3_moe"), stats=("accuracy",))
    loss = model(**batch(model)).loss
    stats = last_stats(model)
    assert stats is not None and stats.entropy is None
    assert stats.loss.item() == pytest.approx((stats.nll.sum() / stats.num_valid).item())
    assert loss.item() > stats.loss.item()


def test_the_report_names_the_facts_for_people() -> None:
    model = apply_patch(build("gemma2"))
    assert "no forward with labels yet" in str(patch_report(model))
    model(**batch(model)).loss.backward()
    text = str(patch_report(model))
    for word in ("fused: yes", "Gemma 2 / 3", "softcap 3", "tied to", "torch:"):
        assert word in text
    assert patch_report(model).schedule
    remove_patch(model)
    assert str(patch_report(model)) == "fused: no, apply_patch has not been called on this model"


LOGITS_TO_KEEP: list[dict[str, Any]] = [
    {"logits_to_keep": 4},
    {"logits_to_keep": torch.arange(11).flip(0)},
    {"logits_to_keep": 0},
]


@pytest.mark.parametrize("index", range(len(LOGITS_TO_KEEP)))
def test_logits_to_keep_with_labels_of_its_own_shape(index: int) -> None:
    stock = build("llama")
    kept = LOGITS_TO_KEEP[index]
    inputs = batch(stock) | kept
    if kept["logits_to_keep"] is LOGITS_TO_KEEP[0]["logits_to_keep"]:
        inputs["labels"] = inputs["labels"][:, -4:]
    assert_trains_like(apply_patch(copy.deepcopy(stock)), stock, inputs)


@pytest.mark.parametrize(
    "change",
    [
        {"logits_to_keep": 4},
        {"shift_labels": torch.zeros(2, 5).long()},
        {"labels": torch.zeros(2, 5).long()},
    ],
    ids=str,
)
def test_labels_of_a_wrong_shape_raise_the_stock_error_and_leave_the_patch(
    change: dict[str, Any],
) -> None:
    stock = build("llama")
    fused = apply_patch(copy.deepcopy(stock))
    inputs = batch(stock) | change
    with pytest.raises(ValueError) as expected:
        stock(**inputs)
    with pytest.raises(ValueError) as error:
        fused(**inputs)
    assert str(error.value) == str(expected.value)
    assert isinstance(fused(**batch(fused)).logits, LazyLogits)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_loss_has_the_shape_that_the_count_gives_it(shape: tuple[int, ...]) -> None:
    stock = build("mixtral")
    inputs = batch(stock) | {"num_items_in_batch": torch.full(shape, 7)}
    assert_trains_like(apply_patch(copy.deepcopy(stock)), stock, inputs)


def test_labels_may_be_positional() -> None:
    stock = build("llama")
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    args = (inputs["input_ids"], None, None, None, None, inputs["labels"])
    output = fused(*args)
    assert isinstance(output.logits, LazyLogits)
    assert output.loss.item() == pytest.approx(stock(*args).loss.item())


def test_half_precision_and_ties_changed_after_the_patch() -> None:
    model = apply_patch(build("llama", tie_word_embeddings=False)).bfloat16()
    inputs = batch(model)
    assert model(**inputs).loss.dtype is torch.float32
    model.lm_head.weight = model.model.embed_tokens.weight
    assert patch_report(model).tied
    model(**inputs).loss.backward()
    stock = remove_patch(copy.deepcopy(model))
    assert_trains_like(model, stock, inputs)


def test_a_head_replaced_after_the_patch_is_adopted() -> None:
    model = apply_patch(build("llama", tie_word_embeddings=False))
    model(**batch(model))
    model.set_output_embeddings(nn.Linear(16, 101))
    stock = remove_patch(copy.deepcopy(model))
    assert_trains_like(model, stock, batch(model))
    assert patch_report(model).bias and type(stock.lm_head) is nn.Linear


def test_a_peft_model_survives_saving_and_copying() -> None:
    config = LoraConfig(target_modules=["q_proj", "lm_head"])
    model = apply_patch(get_peft_model(build("llama", tie_word_embeddings=False), config))
    inputs = batch(model)
    loss = model(**inputs).loss
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(other(**inputs).loss, loss) and patch_report(other).fused
        remove_patch(other)
        assert not patch_report(other).fused
    assert patch_report(model).fused


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} itself takes PEFT {MIN_PEFT_VERSION} or newer,"
    f" got {peft.__version__}",
)
def test_adapters_added_by_transformers_itself_are_followed() -> None:
    stock = build("llama", tie_word_embeddings=False)
    stock.add_adapter(LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    fused = apply_patch(copy.deepcopy(stock))
    assert_trains_like(fused, stock, batch(stock))
    assert patch_report(fused).wrapper == "LoRA"


def test_nothing_is_kept_alive_by_a_forward_that_is_over() -> None:
    model, kept = apply_patch(build("gemma2"), stats=("accuracy",)), []
    model.lm_head.register_forward_pre_hook(
        lambda module, args: kept.append(weakref.ref(args[0].untyped_storage()))
    )
    output = model(**batch(model))
    output.loss.backward()
    assert kept[0]() is not None
    gc.disable()  # Not even until the next collection.
    try:
        del output
        assert kept[0]() is None
    finally:
        gc.enable()


def prepared(model: nn.Module) -> nn.Module:
    return Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)


def hooked(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def with_adapter(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"]))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)


WRAPPERS = [prepared, hooked, with_adapter, compiled]


@pytest.mark.parametrize("patch_first", [True, False], ids=["patch first", "patch last"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_compose_in_both_orders(
    wrap: Callable[[nn.Module], nn.Module], patch_first: bool
) -> None:
    size = {"tie_word_embeddings": False, "num_hidden_layers": 1}
    stock, model = wrap(build("gemma2", **size)), build("gemma2", **size)
    if patch_first:
        model = wrap(apply_patch(model))
    else:
        model = wrap(model)
        assert apply_patch(apply_patch(model)) is model
    inputs = batch(build("gemma2"))
    output, expected = model(**inputs), stock(**inputs)
    assert patch_report(model).fused
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3)
    output.loss.backward()
    if wrap is compiled:
        assert isinstance(output.logits, UnavailableLogits)
    else:
        assert isinstance(output.logits, LazyLogits)
        assert output.logits.dtype == expected.logits.dtype
        assert torch.equal(output.logits, expected.logits)
    assert remove_patch(model) is model
    assert same_modules(model, stock)
    again = model(**inputs)
    assert torch.equal(again.loss, expected.loss) and type(again.logits) is Tensor


def test_unwrapping_mixed_precision_leaves_the_patch() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare_model(apply_patch(build("llama")))
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert patch_report(plain).fused
    assert isinstance(plain(**batch(plain)).logits, LazyLogits)


def test_forwards_that_removed_hooks_leave_behind_are_followed() -> None:
    stock = remove_hook_from_module(hooked(build("llama")), recurse=True)
    assert "forward" in stock.__dict__ and "forward" in stock.lm_head.__dict__
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    assert isinstance(fused(**inputs).logits, LazyLogits)
    remove_patch(fused)
    assert same_modules(fused, stock) and fused.lm_head.forward.__func__ is nn.Linear.forward


def test_a_forward_put_on_the_class_after_the_patch_is_the_one_that_runs() -> None:
    class MyLlama(Llama):
        pass

    model = apply_patch(MyLlama(build("llama").config))
    inputs = batch(model)
    before = model(**inputs).loss

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = Llama.forward(self, *args, **kwargs)
        output.loss = output.loss * 2
        return output

    MyLlama.forward = forward
    assert torch.equal(model(**inputs).loss, 2 * before)


@pytest.fixture
def one_process() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("output_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch first", "patch last"])
@pytest.mark.parametrize("own_group", [True, False], ids=["own group", "root group"])
def test_fsdp2_gathers_the_head_for_both_passes(
    own_group: bool, patch_first: bool, output_dtype: torch.dtype | None, one_process: Any
) -> None:
    stock = build("gemma2", tie_word_embeddings=not own_group)
    model, truth, inputs = copy.deepcopy(stock), copy.deepcopy(stock).double(), batch(stock)
    if patch_first:
        apply_patch(model)
    if own_group:
        policy = MixedPrecisionPolicy(output_dtype=output_dtype)
        fully_shard(model.lm_head, mesh=one_process, mp_policy=policy)
    fully_shard(model, mesh=one_process)
    if not patch_first:
        apply_patch(model)
    output = model(**inputs)
    assert isinstance(output.logits, LazyLogits) and output.logits._lazy._value is None
    if own_group:
        with pytest.raises(RuntimeError, match="sharded outside its forward"):
            output.logits.sum()
    output.loss.backward()
    losses = backwards((stock, truth), inputs)
    assert_close_as_torch("loss", output.loss, *losses)
    assert_gradients_like(model, stock, truth)
    assert patch_report(model).sharding == str(Shard(0))
    remove_patch(model)
    assert type(model).__name__ == "FSDPGemma2ForCausalLM" and not patch_report(model).fused
    assert isinstance(model(**inputs).logits, Tensor)


def test_a_head_cut_along_its_columns_is_refused(one_process: Any) -> None:
    model = apply_patch(build("llama", tie_word_embeddings=False))
    sharded = distribute_tensor(model.lm_head.weight.detach(), one_process, [Shard(1)])
    model.lm_head.weight = nn.Parameter(sharded)
    with pytest.raises(UnsupportedModelError, match="must be a DTensor with placement Shard"):
        model(**batch(model))


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_ddp_makes_no_logits(options: dict[str, bool], one_process: Any) -> None:
    stock = build("gemma2")
    model = DistributedDataParallel(apply_patch(copy.deepcopy(stock)), **options)
    inputs = batch(stock)
    for _ in range(2):
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        assert output.logits._lazy._value is None
    assert patch_report(model).fused
    truth = copy.deepcopy(stock).double()
    backwards((stock, truth), inputs)
    assert_gradients_like(model.module, stock, truth)


def replica_of(module: nn.Module, copies: dict[Tensor, Tensor]) -> nn.Module:
    """What `torch.nn.parallel.replicate` makes, which needs GPUs for it."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child, copies)
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, copies.setdefault(parameter, parameter.clone()))
    return replica


def test_replicas_of_data_parallel_run_in_threads() -> None:
    stock = build("gemma2").train()
    fused = apply_patch(copy.deepcopy(stock))
    parts = [batch(stock, seed=seed) for seed in (1, 2, 3)]
    replicas = [replica_of(fused, {}) for _ in parts]
    outputs: list[Any] = [None] * len(parts)

    def work(index: int) -> None:
        outputs[index] = replicas[index](**parts[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(output.logits, ReplicaLogits) for output in outputs)
    torch.stack([output.loss for output in outputs]).mean().backward()
    truth = copy.deepcopy(stock).double()
    for model in (stock, truth):
        torch.stack([model(**part).loss for part in parts]).mean().backward()
    assert_gradients_like(fused, stock, truth)
    with torch.no_grad():
        assert torch.equal(replicas[0](**parts[0]).logits, stock(**parts[0]).logits)


def backwards(models: Sequence[Any], inputs: dict[str, Any]) -> list[Tensor]:
    """The losses of some models, their gradients left behind."""
    losses = []
    for model in models:
        model.zero_grad()
        losses.append(model(**inputs).loss)
        losses[-1].backward()
    return losses
