"""What patching raises."""

from __future__ import annotations


class UnsupportedModelError(NotImplementedError):
    """The model cannot be fused; the message says why, and the model is the stock one again."""


class LogitsUnavailableError(RuntimeError, AttributeError):
    """Somebody reads logits that were never made and can no longer be made.

    An `AttributeError` too, so that `hasattr` and `getattr` with a default ask without harm.
    """
