"""nanochat: Gemma 2's capped logits.

Stands for the lines of `NanoChatForCausalLM.forward` that gemma.py shows, read at transformers
5.17; the cap is 15 by default.
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="nanochat",
        classes=("NanoChatForCausalLM",),
        transformers="5.17",
        softcap_field="final_logit_softcapping",
    ),
)
