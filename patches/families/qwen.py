"""Qwen 2 and 3, dense and mixture of experts.

The dense ones are Llama's lines. The others stand for these of `Qwen3MoeForCausalLM.forward` (and
the same in Qwen2-MoE), read at transformers 5.17; the sum is the stock forward's own, in place::

    logits = self.lm_head(hidden_states[:, slice_indices, :])
    loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
    if output_router_logits:
        aux_loss = load_balancing_loss_func(outputs.router_logits, ...)
        loss += self.router_aux_loss_coef * aux_loss.to(loss.device)
"""

from __future__ import annotations

from .family import Family

FAMILIES = (
    Family(name="Qwen", classes=("Qwen2ForCausalLM", "Qwen3ForCausalLM"), transformers="5.17"),
    Family(
        name="Qwen MoE",
        classes=("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"),
        transformers="5.17",
    ),
)
