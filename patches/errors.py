"""What patching raises."""

from __future__ import annotations


class UnsupportedModelError(NotImplementedError):
    """The model cannot be fused; the message says why, and the model is the stock one again."""


class RowCountError(UnsupportedModelError):
    """The head got another number of hidden states than there are labels.

    Either the caller's mistake, which stock names as well, or a model that cuts or repeats tokens.
    """


class LogitsUnavailableError(RuntimeError, AttributeError):
    """Logits are read that were never made and can no longer be made.

    An `AttributeError` too, so that `hasattr` and `getattr` with a default ask without harm.
    """
