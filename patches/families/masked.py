"""Masked language models that hide their loss or a bias from their forward.

XLM and FlauBERT call it in their head, here as `XLMPredLayer.forward` does, read at transformers
5.17; `labels` are not shifted, since the models are trained on masked tokens. With `config.asm` the
head is an adaptive softmax and is refused::

    scores = self.proj(x)
    loss = nn.functional.cross_entropy(scores.view(-1, self.n_words), y.view(-1), reduction="mean")

DistilBERT and LUKE keep a `CrossEntropyLoss` that they made before (and LUKE adds the loss of its
entities, if those have labels)::

    mlm_loss = self.mlm_loss_fct(prediction_logits.view(...), labels.view(-1))

ESM's head adds its bias itself, `EsmLMHead.forward`::

    x = self.decoder(x) + self.bias
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="XLM / FlauBERT",
        classes=("FlaubertWithLMHeadModel", "XLMWithLMHeadModel"),
        transformers="5.17",
        own_loss="cross_entropy",
    ),
    Family(
        name="DistilBERT / LUKE",
        classes=("DistilBertForMaskedLM", "LukeForMaskedLM"),
        transformers="5.17",
        own_loss="cross_entropy",
    ),
    Family(
        name="ESM",
        classes=("EsmForMaskedLM",),
        transformers="5.17",
        bias_field="lm_head.bias",
    ),
)
