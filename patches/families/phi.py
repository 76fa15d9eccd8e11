"""Microsoft Phi: Llama's lines; the head of Phi 1 and 2 has a bias, that of Phi 3 has none.

Stands for these lines of `PhiForCausalLM`, read at transformers 5.17::

    self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
    logits = self.lm_head(hidden_states[:, slice_indices, :])
    loss = self.loss_function(logits=logits, labels=labels, vocab_size=..., **kwargs)
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(name="Phi", classes=("PhiForCausalLM",), transformers="5.17"),
    Family(name="Phi 3", classes=("Phi3ForCausalLM",), transformers="5.17"),
)
