"""Falcon-H1: logits multiplied by a config constant. The other Falcons are plain.

Stands for these lines of `FalconH1ForCausalLM.forward`, read at transformers 5.17::

    logits = self.lm_head(hidden_states[:, slice_indices, :]) * self.model.lm_head_multiplier
    loss = self.loss_function(logits=logits, labels=labels, vocab_size=..., **kwargs)
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="Falcon-H1",
        classes=("FalconH1ForCausalLM",),
        transformers="5.17",
        scale_field="lm_head_multiplier",
    ),
)
