"""The size of a model's head from its config alone, without weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

_CAUSAL: dict[str, Any] = {
    **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


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
        ValueError: If there is no such config or it describes no causal head.
    """
    try:
        whole = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"no config of a known model at {source!r}: {first}") from error
    check_causal_head(source, whole.to_dict())
    config = whole.get_text_config()
    hidden_size = getattr(config, "hidden_size", None)
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(hidden_size, int) or not isinstance(vocab_size, int):
        raise ValueError(
            f"the config of {source!r} ({type(config).__name__}) has no hidden_size and vocab_size"
        )
    dtype = getattr(config, "dtype", None)
    return HeadSize(hidden_size, vocab_size, dtype if isinstance(dtype, torch.dtype) else None)


def check_causal_head(source: str, config: dict[str, Any]) -> None:
    """Refuses a config whose model predicts no next token.

    Args:
        source: For the message.
        config: What the file states. A model type that transformers does not know is not judged.

    Raises:
        ValueError: If the model is an encoder, or translates one sequence into another.
    """
    model_type, architectures = config.get("model_type", ""), config.get("architectures") or ()
    if model_type not in CONFIG_MAPPING or any(map(_is_causal, architectures)):
        return
    if not {model_type, model_type.removesuffix("_text")} & _CAUSAL.keys():
        raise ValueError(
            f"`MODEL_OR_CONFIG` must describe a causal language model, got {source!r} of type "
            f"{model_type!r}, which has none: pass the config of a model with an LM head"
        )
    default = CONFIG_MAPPING[model_type]
    is_decoder = config.get("is_decoder", getattr(default, "is_decoder", True))
    two_parts = config.get("is_encoder_decoder", getattr(default, "is_encoder_decoder", False))
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (is_decoder or two_parts):
        raise ValueError(
            f"`MODEL_OR_CONFIG` must describe a causal language model, got {source!r} of type "
            f"{model_type!r} with is_decoder={is_decoder}, an encoder for masked tokens: pass the "
            "config of a model with an LM head"
        )


def _is_causal(architecture: str) -> bool:
    """Whether the class with this name predicts the next token."""
    return any(
        architecture == names if isinstance(names, str) else architecture in names
        for names in _CAUSAL.values()
    )
