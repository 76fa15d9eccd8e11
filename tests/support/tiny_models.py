"""Tiny random models of every family, with each transform of the logits switched on and felt.

Weights are ten times larger than transformers makes them, so that logits spread over several units:
a forgotten scale or cap then moves the loss by far more than rounding does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from places import generator
from torch import nn

VOCAB_SIZE = 101  # prime: no multiple of any tile


class TinyFamily(NamedTuple):
    """How a family is built small."""

    config: type
    model: type
    settings: dict[str, Any]


_DECODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The grouped products of the other implementations take no float64, which the oracle needs.
_EAGER = {"experts_implementation": "eager"}
_EXPERTS = {
    **_EAGER,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
}
_LOCAL_EXPERTS = {
    **_EAGER,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
}
_CAP = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": None, "sliding_window": 32}


def _family(name: str, **settings: Any) -> TinyFamily:
    config = getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")
    return TinyFamily(config, model, {**_DECODER, **settings})


_FAMILIES: dict[str, Callable[[], TinyFamily]] = {
    "llama": lambda: _family("Llama"),
    "qwen2": lambda: _family("Qwen2"),
    "qwen3": lambda: _family("Qwen3"),
    "qwen2_moe": lambda: _family("Qwen2Moe", **_EXPERTS, shared_expert_intermediate_size=12),
    "qwen3_moe": lambda: _family("Qwen3Moe", **_EXPERTS),
    "mistral": lambda: _family("Mistral", sliding_window=None),
    "mixtral": lambda: _family("Mixtral", **_LOCAL_EXPERTS, sliding_window=None),
    "gemma": lambda: _family("Gemma"),
    "gemma2": lambda: _family("Gemma2", **_CAP),
    "gemma3": lambda: TinyFamily(
        transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, {**_DECODER, **_CAP}
    ),
    "cohere": lambda: _family("Cohere", logit_scale=0.4),
    "cohere2": lambda: _family("Cohere2", logit_scale=1.7, sliding_window=32),
    "granite": lambda: _family("Granite", logits_scaling=3.0, embedding_multiplier=2.0),
    # Asked for its auxiliary loss, stock GraniteMoe fails in 5.17: it has no router logits to sum.
    "granite_moe": lambda: _family(
        "GraniteMoe", **_LOCAL_EXPERTS | {"output_router_logits": False}, logits_scaling=0.7
    ),
    "phi": lambda: _family("Phi"),
    "phi3": lambda: _family("Phi3"),
    "gpt2": lambda: TinyFamily(
        transformers.GPT2Config,
        transformers.GPT2LMHeadModel,
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 512,
            "initializer_range": 0.2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)


def build(family: str, seed: int = 0, **settings: Any) -> Any:
    """A tiny model of the family, the same one for the same seed.

    Args:
        family: One of `FAMILIES`.
        seed: Of its weights.
        settings: Fields of its config, over those of this file.
    """
    tiny = _FAMILIES[family]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tiny.model(tiny.config(**{**tiny.settings, **settings}))
        head = model.get_output_embeddings()
        if head.bias is not None:
            # Initialised to zero, which would hide a forgotten bias.
            nn.init.normal_(head.bias, std=0.5)
    return model


def batch(model: nn.Module, rows: int = 2, length: int = 11, seed: int = 0) -> dict[str, Any]:
    """Token ids and labels, [rows, length]; a part of the labels is -100, another in every row."""
    vocab_size = model.config.get_text_config().vocab_size
    input_ids = torch.randint(3, vocab_size, (rows, length), generator=generator(seed))
    input_ids = input_ids.to(model.device)
    labels = input_ids.clone()
    for row in range(rows):
        labels[row, : row + 1] = -100
    labels[:, length // 2] = -100
    return {"input_ids": input_ids, "labels": labels}
