"""Decoders of BART and its relatives, and others that call `CrossEntropyLoss` themselves.

Stands for these lines of `BartForCausalLM.forward` (the others say the same in other words), read
at transformers 5.17. The labels are not shifted, and `num_items_in_batch` and `shift_labels` have
no effect::

    logits = self.lm_head(hidden_states[:, slice_indices, :])
    loss_fct = CrossEntropyLoss()
    loss = loss_fct(logits.view(-1, self.config.vocab_size), labels.view(-1))

Florence-2, a BART under images, does not shift either, but uses the loss function of the model::

    loss = self.loss_function(logits=logits, labels=labels, shift_labels=labels, ...)
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
        name="Florence-2",
        classes=("Florence2ForConditionalGeneration",),
        transformers="5.17",
        unshifted=True,
    ),
    Family(
        name="Pix2Struct / UDOP",
        classes=("Pix2StructForConditionalGeneration", "UdopForConditionalGeneration"),
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
