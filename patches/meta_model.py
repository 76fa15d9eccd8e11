"""Causal models on the meta device: the shapes of a training step, without its memory.

Tensors of the meta device have sizes and no values, so that the stock forward and backward of any
model of transformers run at once, whatever the batch, and allocate what they would on a GPU.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_fused_head.patches.head_shape import check_causal_head
from hf_fused_head.patches.registry import facts_of, family_of

# A name with "flash" in it would have transformers look for a kernel on the hub.
_ATTENTION = "shapes_alone"


class _FlashShapes(torch.autograd.Function):
    """What a flash attention kernel allocates and keeps: no scores, one float32 row statistic."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1])
        lse = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, lse = ctx.saved_tensors
        # The kernels sum the gradient of the queries in float32, and make those of keys and values
        # once a query head, which are alive together.
        working = (
            torch.empty_like(query, dtype=torch.float32),
            torch.empty_like(lse),
            *(kept.new_empty(*query.shape[:2], *kept.shape[2:]) for kept in (key, value)),
        )
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del working
        return gradients


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    return _FlashShapes.apply(query, key, value), None  # pyright: ignore[reportReturnType]


@contextmanager
def flash_shapes() -> Iterator[None]:
    """Models made by `meta_model` find their attention while this is open."""
    ALL_ATTENTION_FUNCTIONS[_ATTENTION] = _attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_ATTENTION]


def config_of(source: str) -> PreTrainedConfig:
    """The config of a hub name, a folder or a config file.

    Raises:
        ValueError: If there is no such config or it describes no causal model.
    """
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"no config of a known model at {source!r}: {first}") from error
    check_causal_head(source, config.to_dict())
    return config


def config_from(model_type: str, settings: dict[str, Any]) -> PreTrainedConfig:
    """A config from its settings."""
    return CONFIG_MAPPING[model_type](**settings)


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The stock causal model of a config on the meta device, in training mode."""
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForCausalLM if known else AutoModelForImageTextToText
    with flash_shapes(), torch.device("meta"):
        # The model writes its attention into its config.
        model = auto.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=_ATTENTION)
    return model.train()


def add_lora(model: PreTrainedModel, rank: int) -> None:
    """Freezes the model and puts adapters on every linear layer but its head, as PEFT does.

    Raises:
        ImportError: If PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("a plan of LoRA training needs peft: pip install 'hf-fused-head[train]'")
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(
        r=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with torch.device("meta"):
        peft.get_peft_model(model, config)


def has_softcap(model: PreTrainedModel) -> bool:
    """Whether the model caps its logits."""
    return facts_of(model, family_of(model)).softcap is not None


def linear_weights(model: PreTrainedModel) -> list[Tensor]:
    """Frozen weights of the linear layers but the head: what 4-bit loading quantises."""
    head = model.get_output_embeddings()
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    ]
