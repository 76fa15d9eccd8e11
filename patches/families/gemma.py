"""Gemma 2 and later, and their relatives: capped logits. Gemma 1 is plain.

Stands for these lines of `Gemma2ForCausalLM.forward` (and the same in Gemma 3, 3n, 4, T5Gemma 2,
VaultGemma and Beam; RecurrentGemma and the models with images spell them otherwise), read at the
version of transformers that each family names; the field may be None, then nothing is capped. Muse
Glimmer multiplies the logits by a constant before::

    logits = self.lm_head(hidden_states[:, slice_indices, :])
    if self.config.final_logit_softcapping is not None:
        logits = logits / self.config.final_logit_softcapping
        logits = torch.tanh(logits)
        logits = logits * self.config.final_logit_softcapping
    loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)

`Gemma3ForConditionalGeneration` has the field in its text config and never reads it: it is plain,
so it is not listed.
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="Gemma 2 / 3",
        classes=("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
        transformers="5.17",
        softcap_field="final_logit_softcapping",
    ),
    Family(
        name="Gemma 3n / 4",
        classes=(
            "Gemma3nForCausalLM",
            "Gemma3nForConditionalGeneration",
            "Gemma4ForCausalLM",
            "Gemma4ForConditionalGeneration",
            "Gemma4UnifiedForCausalLM",
            "Gemma4UnifiedForConditionalGeneration",
            "T5GemmaForConditionalGeneration",
            "T5Gemma2ForConditionalGeneration",
        ),
        transformers="5.17",
        softcap_field="final_logit_softcapping",
    ),
    Family(
        name="Muse Glimmer",
        classes=("MuseGlimmerForConditionalGeneration",),
        transformers="5.17",
        scale_field="output_multiplier",
        softcap_field="final_logit_softcapping",
    ),
    Family(
        name="Beam",
        classes=("BeamForCausalLM",),
        transformers="5.23",
        softcap_field="final_logit_softcapping",
    ),
    Family(
        name="VaultGemma",
        classes=("VaultGemmaForCausalLM",),
        transformers="5.17",
        softcap_field="final_logit_softcapping",
    ),
    Family(
        name="RecurrentGemma",
        classes=("RecurrentGemmaForCausalLM",),
        transformers="5.17",
        softcap_field="logits_soft_cap",
    ),
)
