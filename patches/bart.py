"""Decoders of BART and its relatives, and others that call `CrossEntropyLoss` themselves.

Stands for these lines of `BartForCausalLM.forward` (the others say the same in other words), read
at transformers 5.17. The labels are not shifted, and `num_items_in_batch` and `shift_labels` have
no effect::

    logits = self.lm_head(hidden_states[:, slice_indices, :])
    loss_fct = CrossEntropyLoss()
    loss = loss_fct(logits.view(-1, self.config.vocab_size), labels.view(-1))
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="BART decoders",
        classes=(
            "BartForCausalLM",
            "BigBirdPegasusForCausalLM",
            "BlenderbotForCausalLM",
            "BlenderbotSmallForCausalLM",
            "MBartForCausalLM",
            "MarianForCausalLM",
            "MvpForCausalLM",
            "PLBartForCausalLM",
            "PegasusForCausalLM",
            "TrOCRForCausalLM",
            "WhisperForCausalLM",
        ),
        transformers="5.17",
        own_loss="CrossEntropyLoss",
    ),
    Family(
        name="CPM-Ant",
        classes=("CpmAntForCausalLM",),
        transformers="5.17",
        own_loss="CrossEntropyLoss",
    ),
)
