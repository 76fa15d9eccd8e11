"""Llama: the plain case that most families share.

Stands for these lines of `LlamaForCausalLM.forward`, read at transformers 5.17::

    logits = self.lm_head(hidden_states[:, slice_indices, :])
    if labels is not None:
        loss = self.loss_function(logits=logits, labels=labels,
                                  vocab_size=self.config.vocab_size, **kwargs)
"""

from __future__ import annotations

from .family import Family

FAMILIES = (Family(name="Llama", classes=("LlamaForCausalLM",), transformers="5.17"),)
