"""Hooks on the head and inside a labelled forward: obeyed or refused by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import batch, build
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from trains_like import assert_trains_like

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report
from hf_fused_head.patches.lazy_logits import LazyLogits

pytestmark = pytest.mark.newest


def untied() -> Any:
    return build("llama", tie_word_embeddings=False)


def bart() -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=101, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8
    )
    return transformers.BartForCausalLM(config).eval()


def with_lora() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(untied(), config)


def once(call: Callable[[], Any]) -> Callable[..., None]:
    """A hook that makes a call inside the first forward that it sees, and none inside that."""
    results: list[Any] = []

    def hook(*args: Any) -> None:
        if not results:
            results.append(None)
            results[0] = call()

    hook.results = results
    return hook


# What a hook may do with the whole model while that is running.
INNER_CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "forward": lambda model, inputs: model(input_ids=inputs["input_ids"]).logits,
    "half": lambda model, inputs: model(input_ids=inputs["input_ids"][:1, :4]).logits,
    "generate": lambda model, inputs: model.generate(inputs["input_ids"], max_new_tokens=3),
    "labels": lambda model, inputs: model(**{k: v[:1] for k, v in inputs.items()}).loss,
}


@pytest.mark.parametrize("name", INNER_CALLS)
@pytest.mark.parametrize("make", [untied, bart, with_lora])
def test_the_model_may_be_called_by_a_hook_in_its_labelled_forward(
    make: Callable[[], Any], name: str, recwarn: pytest.WarningsRecorder
) -> None:
    stock = make()
    fused, inputs = copy.deepcopy(stock), batch(untied())
    apply_patch(fused)
    recwarn.clear()
    hooks = []
    for model in (stock, fused):
        call = functools.partial(INNER_CALLS[name], model, inputs)
        hooks.append(once(call))
        model.get_input_embeddings().register_forward_hook(hooks[-1])
    output, expected = fused(**inputs), stock(**inputs)
    assert isinstance(output.logits, LazyLogits)
    assert output.loss.item() == pytest.approx(expected.loss.item())
    ours, theirs = (hook.results[0] for hook in hooks)
    if name == "labels":
        assert ours.item() == pytest.approx(theirs.item())
    else:
        assert torch.equal(ours, theirs)
    assert_trains_like(fused, stock, inputs)
    assert patch_report(fused).last_loss == "fused" and not recwarn.list


def test_a_loss_taken_by_another_call_does_not_count_for_the_outer_one() -> None:
    """A labelled call of a hook is no excuse for a forward that computes its own loss."""

    class Own(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            if len(input_ids) == 1:
                return super().forward(input_ids=input_ids, labels=labels)
            hidden = self.model(input_ids=input_ids).last_hidden_state
            return (of_its_own(self.lm_head, (hidden,), None).square().mean(),)

    model = apply_patch(Own(untied().config))
    inputs = batch(model)
    hook = once(functools.partial(INNER_CALLS["labels"], model, inputs))
    model.model.register_forward_hook(hook)
    with pytest.raises(UnsupportedModelError, match="got a loss from elsewhere"):
        model(**inputs)
    assert hook.results[0] is not None


def whole(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A hook that changes every tensor of whatever a module returns."""
    return lambda module, args, output: pytree.tree_map_only(Tensor, change, output)


def of_its_own(module: Any, args: Any, output: Any) -> Tensor:
    return nn.functional.linear(args[0], module.weight, module.bias)


REFUSED_HOOKS: dict[str, tuple[Callable[..., Any], str]] = {
    "detach": (lambda module, args, output: output.detach(), "does `detach`"),
    "detach every tensor": (whole(Tensor.detach), "from a hook on the head"),
    "scale every tensor": (whole(lambda tensor: tensor * 0.5), "from a hook on the head"),
    "replace": (of_its_own, "elsewhere"),
    "scale": (lambda module, args, output: output * 0.5, "got scale 0.5"),
    "read": (lambda module, args, output: print(output.sum()), "does `sum`"),
}


@pytest.mark.parametrize("make", [untied, bart])
@pytest.mark.parametrize("name", REFUSED_HOOKS)
def test_a_hook_that_changes_the_output_of_the_head_is_refused(
    name: str, make: Callable[[], Any]
) -> None:
    hook, reason = REFUSED_HOOKS[name]
    for strict in (True, False):
        stock = make()
        stock.get_output_embeddings().register_forward_hook(hook)
        fused, inputs = apply_patch(copy.deepcopy(stock), strict=strict), batch(stock)
        if strict:
            with pytest.raises(UnsupportedModelError, match=reason):
                fused(**inputs)
        else:
            with pytest.warns(UserWarning, match=reason):
                loss = fused(**inputs).loss
            expected = stock(**inputs).loss
            assert torch.equal(loss, expected) and loss.requires_grad == expected.requires_grad
        assert not patch_report(fused).fused


@pytest.mark.parametrize("grad", [True, False])
def test_changed_tensors_are_seen_without_gradients_too(grad: bool) -> None:
    model = apply_patch(untied())
    model.lm_head.register_forward_hook(whole(lambda tensor: tensor * 0.5))
    with torch.set_grad_enabled(grad), pytest.raises(UnsupportedModelError, match="a hook"):
        model(**batch(model))


OBEYED_HOOKS: dict[str, Callable[..., Any]] = {
    "detach": lambda module, args: (args[0].detach(),),
    "scale": lambda module, args: (args[0] * 0.5,),
}


@pytest.mark.parametrize("name", OBEYED_HOOKS)
def test_a_hook_that_changes_what_the_head_gets_is_obeyed(name: str) -> None:
    stock = untied()
    stock.lm_head.register_forward_pre_hook(OBEYED_HOOKS[name])
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    assert_trains_like(fused, stock, inputs)
    assert patch_report(fused).fused
    trunk = fused.model.layers[0].mlp.up_proj.weight
    assert (trunk.grad is None) == (name == "detach")


def test_copies_of_the_output_change_nothing() -> None:
    stock = untied()
    stock.lm_head.register_forward_hook(whole(Tensor.clone))
    fused = apply_patch(copy.deepcopy(stock))
    assert_trains_like(fused, stock, batch(stock))
    with torch.no_grad():
        assert isinstance(fused(**batch(stock)).logits, LazyLogits)


def test_a_head_that_is_run_without_gradients_is_refused() -> None:
    """Reentrant checkpointing runs it so, and gives the gradients back by itself."""

    class Wrapped(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            hidden = self.model(input_ids=input_ids).last_hidden_state
            logits = checkpoint(self.lm_head, hidden, use_reentrant=True)
            loss = self.loss_function(logits, labels, self.config.vocab_size)
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    model = apply_patch(Wrapped(untied().config))
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        model(**batch(model))


@pytest.fixture
def global_hook() -> Iterator[Callable[..., None]]:
    """Registers a hook for all modules of the process, for the time of the test."""
    handles = []
    yield lambda register, hook: handles.append(register(hook))
    for handle in handles:
        handle.remove()


def test_hooks_of_all_modules(global_hook: Callable[..., None]) -> None:
    stock = untied()
    fused, inputs = apply_patch(copy.deepcopy(stock)), batch(stock)
    seen: list[str] = []
    modules = nn.modules.module
    global_hook(
        modules.register_module_forward_hook,
        lambda module, args, output: seen.append(type(module).__name__),
    )
    assert_trains_like(fused, stock, inputs)
    assert "Linear" in seen
    global_hook(modules.register_module_full_backward_hook, lambda module, grads, outputs: None)
    with pytest.raises(UnsupportedModelError, match="a backward hook on the head"):
        fused(**inputs)
