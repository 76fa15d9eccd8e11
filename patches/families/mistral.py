"""Mistral, Ministral and Mixtral.

The dense ones are Llama's lines, Mixtral is Qwen-MoE's (see qwen.py), read at transformers 5.17.
Mistral Large 4, read at 5.23, caps its logits as gemma.py shows.
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
        name="Mistral Large 4",
        classes=("MistralLarge4ForConditionalGeneration",),
        transformers="5.23",
        softcap_field="final_logit_softcapping",
    ),
    Family(
        name="Mixtral",
        classes=("MixtralForCausalLM",),
        transformers="5.17",
    ),
)
