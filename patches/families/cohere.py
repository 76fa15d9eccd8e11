"""Cohere Command: logits multiplied by a config constant.

Stands for these lines of `CohereForCausalLM.forward` (and the same in Cohere2, its mixture of
experts and Cohere Compass), read at transformers 5.17, where `self.logit_scale =
config.logit_scale`::

    logits = self.lm_head(hidden_states[:, slice_indices, :])
    logits = logits * self.logit_scale
    loss = self.loss_function(logits=logits, labels=labels, vocab_size=..., **kwargs)
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="Cohere",
        classes=(
            "CohereForCausalLM",
            "Cohere2ForCausalLM",
            "Cohere2MoeForCausalLM",
            "CohereCompassForCausalLM",
            "CohereCompassForConditionalGeneration",
        ),
        transformers="5.17",
        scale_field="logit_scale",
    ),
)
