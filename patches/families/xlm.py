"""XLM and XLNet: heads with a bias whose loss is a `cross_entropy` of the model's own.

Stands for these lines of `XLMPredLayer.forward`, read at transformers 5.17; `labels` are not
shifted, since the models are trained on masked or permuted tokens. XLNet's are those of bart.py.
With `config.asm` the head of XLM is an adaptive softmax and is refused::

    scores = self.proj(x)
    loss = nn.functional.cross_entropy(scores.view(-1, self.n_words), y.view(-1), reduction="mean")
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(
        name="XLM",
        classes=("XLMWithLMHeadModel",),
        transformers="5.17",
        own_loss="cross_entropy",
    ),
    Family(
        name="XLNet",
        classes=("XLNetLMHeadModel",),
        transformers="5.17",
        own_loss="CrossEntropyLoss",
    ),
)
