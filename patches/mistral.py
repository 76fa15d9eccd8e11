"""Mistral, Ministral and Mixtral.

The dense ones are Llama's lines, Mixtral is Qwen-MoE's (see qwen.py), read at transformers 5.17.
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="Mistral",
        classes=("MistralForCausalLM", "MinistralForCausalLM", "Ministral3ForCausalLM"),
        transformers="5.17",
    ),
    Family(
        name="Mixtral",
        classes=("MixtralForCausalLM",),
        transformers="5.17",
        extras="router auxiliary loss",
    ),
)
