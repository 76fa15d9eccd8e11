"""xLSTM: float32 logits, capped.

Stands for these lines of `xLSTMForCausalLM.forward`, read at transformers 5.17, where `soft_cap` is
`cap * tanh(logits / cap)`::

    logits = self.lm_head(hidden_states.to(self.lm_head.weight.dtype)).float()
    logits = soft_cap(logits, self.config.output_logit_soft_cap)
    loss = self.loss_function(logits=logits, labels=labels, vocab_size=..., **kwargs)
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="xLSTM",
        classes=("xLSTMForCausalLM",),
        transformers="5.17",
        softcap_field="output_logit_soft_cap",
    ),
)
