"""BART and its relatives, with a bias on the logits; other encoder-decoders.

Stands for these lines of `BartForConditionalGeneration.forward` (the others say the same in other
words), read at transformers 5.17. The bias is a buffer; that of Marian's checkpoints is not zero.
The loss is a `CrossEntropyLoss` of the model's own, on labels that are not shifted (registry.py)::

    lm_logits = self.lm_head(outputs[0])
    lm_logits = lm_logits + self.final_logits_bias.to(lm_logits.device)

The others do not shift either, since the inputs of their decoder are the shifted labels, but use
the loss function of the model::

    loss = self.loss_function(logits=logits, labels=labels, shift_labels=labels, ...)

Pix2Struct leaves its loss to a decoder that calls `CrossEntropyLoss`.
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="BART",
        classes=(
            "BartForConditionalGeneration",
            "BigBirdPegasusForConditionalGeneration",
            "BlenderbotForConditionalGeneration",
            "BlenderbotSmallForConditionalGeneration",
            "LEDForConditionalGeneration",
            "MBartForConditionalGeneration",
            "MarianMTModel",
            "MvpForConditionalGeneration",
            "PLBartForConditionalGeneration",
            "PegasusForConditionalGeneration",
        ),
        transformers="5.17",
        bias_field="final_logits_bias",
    ),
    Family(
        name="Florence-2 / Canary / Moonshine",
        classes=(
            "CanaryForConditionalGeneration",
            "CohereAsrForConditionalGeneration",
            "Florence2ForConditionalGeneration",
            "MoonshineForConditionalGeneration",
            "MoonshineStreamingForConditionalGeneration",
            "PPFormulaNetForConditionalGeneration",
        ),
        transformers="5.17",
        unshifted=True,
    ),
    Family(
        name="Pix2Struct",
        classes=("Pix2StructForConditionalGeneration",),
        transformers="5.17",
        own_loss="CrossEntropyLoss",
    ),
)
