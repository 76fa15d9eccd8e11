"""A family of models as frozen data. A plain one, which states no fact, has no file.

Plain is a class whose forward does as that of `LlamaForCausalLM` does, read at transformers 5.17
(what is added to the loss afterwards, as by a mixture of experts, is the stock forward's)::

    logits = self.lm_head(hidden_states[:, slice_indices, :])
    if labels is not None:
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=..., **kwargs)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What the loss must know of a family of models; everything else is the stock forward's.

    Attributes:
        name: Name for people.
        classes: Names of the classes that share these facts, subclasses included.
        transformers: The version whose source they were read from.
        scale_field: Config field of the factor on the logits; None for none.
        scale_divides: The logits are divided by the field, not multiplied.
        softcap_field: Config field of the cap (its value may be None); None for no cap.
        own_loss: Where the forward itself does not name the loss that it calls (registry.py):
            "cross_entropy", on labels that are not shifted; it knows neither `num_items_in_batch`
            nor `shift_labels`.
        unshifted: The forward gives its labels to `self.loss_function` as `shift_labels`.
        bias_field: Path of the buffer or parameter that is added to the head's output, [1, vocab]
            or [vocab]; "" for none.
    """

    name: str
    classes: tuple[str, ...]
    transformers: str
    scale_field: str | None = None
    scale_divides: bool = False
    softcap_field: str | None = None
    own_loss: str = ""
    unshifted: bool = False
    bias_field: str = ""
