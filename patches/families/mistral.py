"""Mistral Large 4, which caps its logits as gemma.py shows, read at transformers 5.23."""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="Mistral Large 4",
        classes=("MistralLarge4ForConditionalGeneration",),
        transformers="5.23",
        softcap_field="final_logit_softcapping",
    ),
)
