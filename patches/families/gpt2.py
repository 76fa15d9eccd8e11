"""GPT-2: Llama's lines around `self.transformer`; the head is a tied `nn.Linear`, no Conv1D.

Stands for these lines of `GPT2LMHeadModel.forward`, read at transformers 5.17::

    logits = self.lm_head(hidden_states[:, slice_indices, :])
    if labels is not None:
        loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)

`GPT2DoubleHeadsModel` calls `CrossEntropyLoss` itself and is refused on its first forward.
"""

from __future__ import annotations

from .family import Family

FAMILIES = (Family(name="GPT-2", classes=("GPT2LMHeadModel",), transformers="5.17"),)
