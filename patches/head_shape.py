"""The size of a model's head from its config alone, without weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import AutoConfig


class HeadSize(NamedTuple):
    """Columns and rows of a head, and the dtype that the config states (None if it does not)."""

    hidden_size: int
    vocab_size: int
    dtype: torch.dtype | None


def head_size(source: str) -> HeadSize:
    """Reads the config of a model; the text model's where there are several.

    Args:
        source: Hub name, folder, or config file.

    Raises:
        ValueError: If there is no such config or it describes no head.
    """
    try:
        config = AutoConfig.from_pretrained(source).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"no config of a known model at {source!r}: {first}") from error
    hidden_size = getattr(config, "hidden_size", None)
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(hidden_size, int) or not isinstance(vocab_size, int):
        raise ValueError(
            f"the config of {source!r} ({type(config).__name__}) has no hidden_size and vocab_size"
        )
    dtype = getattr(config, "dtype", None)
    return HeadSize(hidden_size, vocab_size, dtype if isinstance(dtype, torch.dtype) else None)
