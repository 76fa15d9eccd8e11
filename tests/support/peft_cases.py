"""Every tuner of PEFT on a tiny model: how it is put on, and what the report must say of the head.

Each trainable parameter is moved off its start, where most adapters do nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import pytest
import torch
from causal_loss import causal_loss
from peft import LoraConfig, get_peft_model
from tiny_models import build
from torch import nn
from trains_like import seeded

Wrap = Callable[[Any], Any]


class PeftCase(NamedTuple):
    """One way to wrap a model.

    Attributes:
        wrap: Puts the adapter on.
        wrapper: What the report calls the head's wrapper.
        kernel: How the report's kernel begins.
        tie: Whether the head is tied to the embeddings.
        switchable: Whether `disable_adapter` makes a difference.
        patch_first: Whether PEFT wraps a patched model.
    """

    wrap: Wrap
    wrapper: str
    kernel: str
    tie: bool = False
    switchable: bool = True
    patch_first: bool = True


TAKEN_APART, ITSELF = "torch", "the forward of"
HEAD = ["lm_head"]
BOTH = ["lm_head", "q_proj"]


def lora(**options: Any) -> Wrap:
    """LoRA of rank 4, on the head and a projection of the body."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": BOTH, **options}
    return lambda model: get_peft_model(model, LoraConfig(**settings))


def tuner(name: str, **options: Any) -> Wrap:
    """Any other method, by the name of its config."""
    config = getattr(peft, f"{name}Config", None)
    if config is None:

        def missing(model: Any) -> Any:
            pytest.skip(f"peft {peft.__version__} has no {name}Config")

        return missing
    return lambda model: get_peft_model(model, config(**options))


def two_adapters(model: Any) -> Any:
    """Two LoRA adapters, both active, of different rank, scale and targets."""
    first = LoraConfig(r=4, target_modules=BOTH)
    second = LoraConfig(r=3, use_rslora=True, target_modules=HEAD)
    model = get_peft_model(model, first, adapter_name="first")
    model.add_adapter("second", second)
    model.base_model.set_adapter(["first", "second"])
    return model


def one_of_two(model: Any) -> Any:
    model = two_adapters(model)
    model.set_adapter("second")
    return model


def low_rank_and_dora(model: Any) -> Any:
    model = get_peft_model(model, LoraConfig(r=4, target_modules=BOTH), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=3, use_dora=True, target_modules=HEAD))
    model.base_model.set_adapter(["first", "second"])
    return model


def disabled(model: Any) -> Any:
    model = filled(lora()(model))
    model.disable_adapter_layers()
    return model


def merged(model: Any) -> Any:
    model = filled(lora()(model))
    model.merge_adapter()
    return model


def merged_dora(model: Any) -> Any:
    model = filled(lora(use_dora=True)(model))
    model.merge_adapter()
    return model


def merged_then_disabled(model: Any) -> Any:
    model = merged(model)
    model.disable_adapter_layers()
    return model


def merged_and_back(model: Any) -> Any:
    model = merged(model)
    model.unmerge_adapter()
    return model


def _head(wrap: Wrap, wrapper: str, kernel: str = ITSELF, **more: Any) -> PeftCase:
    return PeftCase(wrap, wrapper, kernel, **more)


def _body(wrap: Wrap, **more: Any) -> PeftCase:
    return PeftCase(wrap, "none", TAKEN_APART, **more)


def _prompt(name: str, **options: Any) -> PeftCase:
    return _body(tuner(name, task_type="CAUSAL_LM", num_virtual_tokens=3, **options))


_SAVED, _TOKENS = "ModulesToSaveWrapper", "TrainableTokensWrapper"
_LOW_RANK = {"wrapper": "LoRA", "kernel": TAKEN_APART}
_CPT = {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}

CASES: dict[str, PeftCase] = {
    # The body alone: the head is stock.
    "body": _body(lora(target_modules=["q_proj"])),
    "body, dora": _body(lora(target_modules=["q_proj"], use_dora=True)),
    "body, rslora": _body(lora(target_modules=["q_proj"], use_rslora=True)),
    "body, ia3": _body(
        tuner("IA3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "body, vera": _body(tuner("Vera", target_modules=["q_proj"], r=4)),
    "body, road": _body(tuner("Road", target_modules=["q_proj"], group_size=8)),
    "body, layer norms": _body(tuner("LNTuning", target_modules=["input_layernorm"])),
    "body, activated lora": _body(
        lora(target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    ),
    "prompt": _prompt("PromptTuning"),
    "prefix": _prompt("PrefixTuning"),
    "p-tuning": _prompt("PromptEncoder", encoder_hidden_size=8),
    "context-aware prompt": _body(tuner("CPT", task_type="CAUSAL_LM", **_CPT)),
    # LoRA on the head: a low-rank pair beside the weight.
    "lora": _head(lora(), **_LOW_RANK),
    "lora, tied": _head(lora(), tie=True, **_LOW_RANK),
    "lora, tied adapters": _head(
        lora(target_modules=["lm_head", "embed_tokens"], ensure_weight_tying=True),
        tie=True,
        **_LOW_RANK,
    ),
    "lora, a name": _head(
        lambda model: get_peft_model(model, LoraConfig(target_modules=BOTH), adapter_name="mine"),
        **_LOW_RANK,
    ),
    "lora, own rank": _head(
        lora(rank_pattern={"lm_head": 3}, alpha_pattern={"lm_head": 5}), **_LOW_RANK
    ),
    "lora, pissa": _head(lora(target_modules=HEAD, init_lora_weights="pissa"), **_LOW_RANK),
    "rslora": _head(lora(use_rslora=True), **_LOW_RANK),
    "two adapters": _head(two_adapters, **_LOW_RANK),
    "one of two adapters": _head(one_of_two, **_LOW_RANK),
    "disabled": _head(disabled, switchable=False, **_LOW_RANK),
    "merged": _head(merged, **_LOW_RANK),
    "merged, disabled": _head(merged_then_disabled, switchable=False, **_LOW_RANK),
    "merged and back": _head(merged_and_back, **_LOW_RANK),
    # A copy of the head of its own, or of some of its rows.
    "saved": _head(
        lora(target_modules=["q_proj"], modules_to_save=HEAD), _SAVED, kernel=TAKEN_APART
    ),
    "saved, embeddings too": _head(
        lora(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
        _SAVED,
        kernel=TAKEN_APART,
    ),
    "saved, tied": _head(
        lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        _SAVED,
        kernel=TAKEN_APART,
        tie=True,
    ),
    "tokens": _head(
        lora(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 5]}), _TOKENS
    ),
    "tokens, tied": _head(
        lora(target_modules=["q_proj"], trainable_token_indices=[3, 5]), _TOKENS, tie=True
    ),
    # Layers that know themselves what they do: their own forward, on chunks of tokens.
    "dora": _head(lora(use_dora=True), "LoRA"),
    "lora and dora": _head(low_rank_and_dora, "LoRA"),
    "dora, merged": _head(merged_dora, **_LOW_RANK),
    "ia3": _head(tuner("IA3", target_modules=HEAD, feedforward_modules=[]), "ia3.Linear"),
    "ia3, inputs": _head(tuner("IA3", target_modules=HEAD, feedforward_modules=HEAD), "ia3.Linear"),
    "parameters": _head(
        lora(target_modules=[], target_parameters=["lm_head.weight"]), "lora.ParamWrapper"
    ),
    "adalora": _head(
        tuner("AdaLora", target_modules=HEAD, total_step=9, init_r=4, target_r=2),
        "adalora.SVDLinear",
    ),
    "boft": _head(tuner("BOFT", target_modules=HEAD, boft_block_size=4), "boft.Linear"),
    "c3a": _head(tuner("C3A", target_modules=HEAD, block_size=1), "c3a.C3ALinear"),
    "delora": _head(tuner("Delora", target_modules=HEAD), "delora.DeloraLinear"),
    "fourierft": _head(
        tuner("FourierFT", target_modules=HEAD, n_frequency=20), "fourierft.FourierFTLinear"
    ),
    "glora": _head(tuner("Glora", target_modules=HEAD), "glora.GloraLinear", patch_first=False),
    "gralora": _head(tuner("Gralora", target_modules=HEAD, r=4, gralora_k=1), "gralora.Linear"),
    "hra": _head(tuner("HRA", target_modules=HEAD), "hra.HRALinear"),
    "loha": _head(tuner("LoHa", target_modules=HEAD), "loha.Linear"),
    "lokr": _head(tuner("LoKr", target_modules=HEAD), "lokr.Linear"),
    "miss": _head(tuner("Miss", target_modules=HEAD, r=4), "miss.MissLinear"),
    "oft": _head(tuner("OFT", target_modules=HEAD, oft_block_size=4), "oft.Linear"),
    "osf": _head(tuner("OSF", target_modules=HEAD), "osf.Linear"),
    "randlora": _head(tuner("RandLora", target_modules=HEAD, r=4), "randlora.Linear"),
    "shira": _head(tuner("Shira", target_modules=HEAD, r=2), "shira.Linear"),
    "vblora": _head(
        tuner("VBLoRA", target_modules=HEAD, vector_length=1, num_vectors=8, r=2), "vblora.Linear"
    ),
    "vera": _head(tuner("Vera", target_modules=HEAD, r=4), "vera.Linear"),
}


def filled(model: nn.Module, std: float = 0.1) -> Any:
    """The model with noise on everything that is trained."""
    generator = seeded()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise.to(parameter.dtype), alpha=std)
    return model


def wrapped(wrap: Wrap, model: nn.Module) -> Any:
    """`wrap(model)`, the same one every time."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on ties, biases and target modules.
        return filled(wrap(model))


def truth_of(wrap: Wrap, model: nn.Module) -> Any:
    """The same in float64, wrapped anew: tied adapters cannot be copied."""
    exact = wrapped(wrap, copy.deepcopy(model)).double()
    exact.get_base_model().loss_function = causal_loss
    return exact


def body_of(case: PeftCase) -> Any:
    """The model that the case wraps."""
    return build("gemma2", tie_word_embeddings=case.tie)
