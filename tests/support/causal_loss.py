"""The causal loss in the dtype of its logits, for truths in float64.

The loss functions of transformers cast logits to float32, down from float64 too, so that a model in
float64 shares their rounding with the one in float32 and is no truth for either.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def causal_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What `transformers.loss.loss_utils.ForCausalLMLoss` means, without the cast."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    mean = num_items_in_batch is None
    loss = nn.functional.cross_entropy(
        logits.flatten(0, -2),
        shift_labels.flatten(),
        ignore_index=ignore_index,
        reduction="mean" if mean else "sum",
    )
    return loss if mean else loss / num_items_in_batch


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of a stock model, inside PEFT or not, in float64 up to its loss."""
    exact = copy.deepcopy(model).double()
    inner = exact.get_base_model() if hasattr(exact, "get_base_model") else exact
    inner.loss_function = causal_loss
    return exact
