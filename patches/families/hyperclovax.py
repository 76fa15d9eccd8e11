"""HyperCLOVA X: logits multiplied by the field that divides in Granite.

Stands for these lines of `HyperCLOVAXForCausalLM.forward`, read at transformers 5.17::

    logits = self.lm_head(hidden_states[:, slice_indices, :]) * self.config.logits_scaling
    loss = self.loss_function(logits=logits, labels=labels, vocab_size=..., **kwargs)

The model with images says the same in 5.23 of `self.config.text_config.logits_scaling`.
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="HyperCLOVA X",
        classes=("HyperCLOVAXForCausalLM",),
        transformers="5.17",
        scale_field="logits_scaling",
    ),
    Family(
        name="HyperCLOVA X Vision",
        classes=("HyperCLOVAXVisionV2ForConditionalGeneration",),
        transformers="5.23",
        scale_field="logits_scaling",
    ),
)
