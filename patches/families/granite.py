"""IBM Granite, dense, mixture of experts and hybrid: logits divided by a config constant.

Stands for these lines of `GraniteForCausalLM.forward`, read at transformers 5.17; the mixtures of
experts add their auxiliary loss afterwards, in place. The field of this name multiplies in
HyperCLOVA X, which is no member of this family::

    logits = self.lm_head(hidden_states[:, slice_indices, :])
    logits = logits / self.config.logits_scaling
    loss = self.loss_function(logits=logits, labels=labels, vocab_size=..., **kwargs)
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="Granite",
        classes=(
            "GraniteForCausalLM",
            "GraniteSWAForCausalLM",
            "Granite4VisionForConditionalGeneration",
        ),
        transformers="5.17",
        scale_field="logits_scaling",
        scale_divides=True,
    ),
    Family(
        name="Granite Docling",
        classes=("GraniteDoclingForConditionalGeneration",),
        transformers="5.23",
        scale_field="logits_scaling",
        scale_divides=True,
    ),
    Family(
        name="Granite MoE",
        classes=(
            "GraniteMoeForCausalLM",
            "GraniteMoeSharedForCausalLM",
            "GraniteMoeHybridForCausalLM",
            "GraniteMoeSWAForCausalLM",
        ),
        transformers="5.17",
        scale_field="logits_scaling",
        scale_divides=True,
    ),
)
