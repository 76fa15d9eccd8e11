"""Every class of transformers with an LM head as a tiny random model, by rules and exceptions.

A class is built small by rules on the names of its config's fields (`SIZES`), with every transform
of the logits forced on and felt (`TRANSFORMS`). Where the rules do not fit a class, `SETTINGS` says
what it needs. A class that nobody has seen yet is built by the rules alone.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import tiny_multimodal
import tiny_seq2seq
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB_SIZE = 101  # prime: no multiple of any tile
MAX_PARAMETERS = 10**7

# Fields of configs that make a model small, by name; applied to nested configs as well.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCAB_SIZE),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"), 16
    ),
    "hidden_size_global": 16,
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "embedding_dim"), 16),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2
    ),
    **dict.fromkeys(
        ("encoder_layers", "num_encoder_layers", "num_decoder_layers", "num_blocks"), 2
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 2
    ),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "swa_num_attention_heads"), 2),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 1),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "dim_head", "d_head"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "dff", "dim_ff", "n_inner"), 24),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "mlp_dim"), 24),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "feed_forward_size"), 24),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 12),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 12),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "moe_top_k"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "model_max_length"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "index_head_dim"), 4),
    "qk_head_dim": 12,
    **dict.fromkeys(("index_n_heads", "index_topk"), 2),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    "linear_num_heads": 2,
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "keep_window_size"), 8),
    "mamba_num_heads": 2,
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    "router_hidden_size": 8,
    "query_pre_attn_scalar": 8,
    "hidden_size_per_layer_input": 4,
    "num_kv_shared_layers": 0,
    "num_nextn_predict_layers": 0,
    "mask_time_prob": 0.0,
    # Of towers for images.
    **dict.fromkeys(("depth", "vision_layers"), 2),
    **dict.fromkeys(("out_hidden_size", "projection_dim"), 16),
}
# Whatever transforms the logits or adds to the loss, at values that move the loss by more than
# rounding ever could.
TRANSFORMS: dict[str, Any] = {
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0,
    "logit_scale": 0.4,
    "logits_scaling": 3.0,
    "lm_head_multiplier": 0.4,
    "router_aux_loss_coef": 0.1,
    "aux_loss_coef": 0.1,
}
NEUTRAL: dict[str, Any] = {
    "final_logit_softcapping": None,
    "logits_soft_cap": 1e9,
    "output_logit_soft_cap": 1e9,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "router_aux_loss_coef": 0.0,
    "aux_loss_coef": 0.0,
}
"""The same fields as if somebody had forgotten them."""

FELT: dict[str, tuple[str, ...]] = {
    "final_logit_softcapping": ("Gemma2ForCausalLM", "Gemma4ForCausalLM", "NanoChatForCausalLM"),
    "logits_soft_cap": ("RecurrentGemmaForCausalLM",),
    "output_logit_soft_cap": ("xLSTMForCausalLM",),
    "logit_scale": ("CohereForCausalLM", "CohereCompassForCausalLM"),
    "logits_scaling": ("GraniteForCausalLM", "HyperCLOVAXForCausalLM"),
    "lm_head_multiplier": ("FalconH1ForCausalLM",),
    "router_aux_loss_coef": ("MixtralForCausalLM", "Qwen3MoeForCausalLM"),
    "aux_loss_coef": ("JetMoeForCausalLM",),
}
"""Classes that must feel them."""

SCALES = {"initializer_range": 0.2, "init_std": 0.2, "embed_init_std": 0.2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# The grouped products of the other implementations take no float64, which the oracle needs.
EAGER = {"experts_implementation": "eager"}

SETTINGS: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "BltForCausalLM": {
        # With a cache, stock looks for a number of layers that its config does not have.
        "use_cache": False,
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [2, 3],
        "patcher_config.num_key_value_heads": 2,
    },
    "CodeGenForCausalLM": {"n_head": 4, "n_embd": 32},
    "CohereCompassForCausalLM": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            }
        },
    },
    "DbrxForCausalLM": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "DiffLlamaForCausalLM": {"num_key_value_heads": 2},
    "Dots1ForCausalLM": {"n_shared_experts": 1},
    "FalconH1ForCausalLM": {"mamba_d_ssm": None},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma4AssistantForCausalLM": {"text_config": lambda: _assisting("Gemma4TextConfig")},
    "Gemma4UnifiedAssistantForCausalLM": {
        "text_config": lambda: _assisting("Gemma4UnifiedTextConfig")
    },
    "GitForCausalLM": {"vision_config.image_size": 16, "vision_config.patch_size": 8},
    "Granite4VisionForConditionalGeneration": {
        "text_config": lambda: tiny_config(transformers.Granite4VisionTextConfig, {}),
        "deepstack_layer_map": [],
        "spatial_target_layers": [],
        "downsample_rate": "1/2",
    },
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeForCausalLM": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "Mamba2ForCausalLM": {"head_dim": 16, "n_groups": 1},
    "NemotronHForCausalLM": {"n_groups": 1, "moe_shared_expert_intermediate_size": 12},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ReformerModelWithLMHead": {
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "local_attn_chunk_length": 11,
        "lsh_attn_chunk_length": 11,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "RoCBertForCausalLM": {"pronunciation_vocab_size": 32, "shape_vocab_size": 32},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "n_mamba_heads": 2,
    },
    "Zamba2ForCausalLM": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_key_value_heads": 2,
        "n_mamba_heads": 2,
    },
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    # Stock rounds the sizes of its states up to multiples of 64.
    "xLSTMForCausalLM": {
        "hidden_size": 128,
        "embedding_dim": 128,
        "mode": "train",
        "chunk_size": 11,
        "use_cache": False,
    },
}
"""Fields of a class's config over those of the rules; a dotted name is a field of a nested one."""


def _image(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Pixels of the size that the vision model takes."""
    size = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(1)
    rows = inputs["input_ids"].shape[0]
    dtype = model.get_output_embeddings().weight.dtype
    return {"pixel_values": torch.randn(rows, 3, size, size, generator=generator).to(dtype)}


def _codebooks(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Every codebook gets the same tokens."""
    count = model.config.num_codebooks
    labels = inputs["labels"][..., None].expand(-1, -1, count)
    return {"input_ids": inputs["input_ids"].repeat_interleave(count, 0), "labels": labels}


INPUTS: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    "GitForCausalLM": _image,
    "MusicgenForCausalLM": _codebooks,
    "MusicgenMelodyForCausalLM": _codebooks,
}
"""What the forward of a class needs beside token ids and labels."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "BambaForCausalLM": {"z_loss_coefficient": {"z_loss_coefficient": 0.1}},
    "InklingForCausalLM": {"unpadded_vocab_size": {"unpadded_vocab_size": VOCAB_SIZE - 4}},
}
"""Other settings of a class that change what it does to its logits, by the name of the variant."""


_SETTINGS = (SETTINGS, tiny_seq2seq.SETTINGS, tiny_multimodal.SETTINGS)
_INPUTS = (INPUTS, tiny_seq2seq.INPUTS, tiny_multimodal.INPUTS)
_DECODERS = {
    *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
}


def build(name: str, seed: int = 0, **settings: Any) -> Any:
    """A tiny random model of the class, the same one for the same seed."""
    cls = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        own = {"is_decoder": False} if _is_encoder(name, cls) else {}
        own |= next((table[name] for table in _SETTINGS if name in table), {})
        config = tiny_config(cls.config_class, own | settings)
        with _text_alone():
            _check_size(cls, config)
            model = cls(config)
        _make_head_felt(model)
    return model.train()


def _is_encoder(name: str, cls: Any) -> bool:
    """Whether tokens may attend to later ones, which some configs have to say."""
    causal = name in _DECODERS or "CausalLM" in name
    return not causal and hasattr(cls.config_class, "is_decoder")


def _check_size(cls: type, config: Any) -> None:
    """Refuses what the rules did not make small, before it takes memory."""
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    except (NotImplementedError, RuntimeError):
        # It looks at values while it is built.
        return
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size} parameters: SIZES does not know the fields of its config")


@contextlib.contextmanager
def _text_alone() -> Iterator[None]:
    """Towers for images and sound that need a library which is not here are left empty."""
    stock = transformers.AutoModel.from_config

    def from_config(*args: Any, **kwargs: Any) -> Any:
        try:
            return stock(*args, **kwargs)
        except ImportError:
            return nn.Identity()

    transformers.AutoModel.from_config = from_config
    try:
        yield
    finally:
        del transformers.AutoModel.from_config


def _assisting(name: str) -> Any:
    settings = {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    }
    return tiny_config(getattr(transformers, name), settings)


def tiny_config(config_class: type, settings: dict[str, Any]) -> Any:
    """The config with the smallest sizes that the rules know of."""
    try:
        default = config_class()
    except (StrictDataclassError, ValueError):
        # Some have no default: what they cannot do without is among the settings.
        default = config_class(**_own(settings))
    return config_class(**_tiny_fields(default, settings))


def _own(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config itself; those of nested ones have dotted names."""
    own = {name: value for name, value in settings.items() if "." not in name}
    return {name: value() if callable(value) else value for name, value in own.items()}


def _tiny_fields(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        prefix = f"{name}."
        nested = {k[len(prefix) :]: v for k, v in settings.items() if k.startswith(prefix)}
        if isinstance(value, PreTrainedConfig):
            fields[name] = {**_tiny_fields(value, nested), "model_type": value.model_type}
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            fields[name] = 0.0
    rules = {**SIZES, **TRANSFORMS, **SCALES, **TOKENS}
    if "kv_lora_rank" in vars(config):
        rules["num_key_value_heads"] = rules["num_attention_heads"]
        rules["head_dim"] = rules["qk_rope_head_dim"]
    rules |= _one_layer_of_each_kind(config) | _small_sections(config)
    known = set(vars(config)) | set(type(config).attribute_map)
    fields |= {
        name: _for_each_stage(config, vars(config)[name], value)
        for name, value in rules.items()
        if name in vars(config)
    }
    if any("expert" in name for name in known):
        fields |= EAGER
    if "is_decoder" in vars(config):
        fields["is_decoder"] = True
    return fields | _own(settings)


def _for_each_stage(config: Any, default: Any, value: Any) -> Any:
    """`value` once for each stage of a tower, where that is how its field is written."""
    if not isinstance(default, (list, tuple)) or not isinstance(value, int):
        return value
    layers = vars(config).get("num_hidden_layers")
    return value if len(default) == layers else [value] * len(default)


def _one_layer_of_each_kind(config: Any) -> dict[str, Any]:
    """As few layers as show every kind that the default has, two at least."""
    fields = {}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        value = vars(config).get(name)
        if isinstance(value, list):
            fields[name] = list(dict.fromkeys(value))
    if not fields:
        return {}
    count = max(2, *map(len, fields.values()))
    every = {name: [*kinds, *[kinds[-1]] * count][:count] for name, kinds in fields.items()}
    return {**every, "num_hidden_layers": count}


def _small_sections(config: Any) -> dict[str, Any]:
    """Multimodal rotary positions share the pairs of a head of 8 among three axes."""
    rope = vars(config).get("rope_parameters")
    known = getattr(config, "ignore_keys_at_rope_validation", ())
    if not isinstance(rope, dict) or "mrope_section" not in (*rope, *known):
        return {}
    pairs = int(SIZES["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
    third = pairs // 3
    sections = [pairs - 2 * third, third, third]
    return {"rope_parameters": {**rope, "mrope_section": sections}}


def _make_head_felt(model: Any) -> None:
    """Logits that spread over several units; no bias of them, and no matrix, is zero."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            # Whatever lies behind a product with zero would be seen by no gradient.
            nn.init.normal_(parameter, std=0.1)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.shape in ((VOCAB_SIZE,), (1, VOCAB_SIZE)) and tensor.is_floating_point():
            # A bias of the logits, wherever it is kept.
            nn.init.normal_(tensor, std=0.5)
    head = model.get_output_embeddings()
    for name, parameter in () if head is None else head.named_parameters():
        nn.init.normal_(parameter, std=0.5 if name.endswith("bias") else 0.3)


def batch(model: Any, rows: int = 2, length: int = 11, seed: int = 0) -> dict[str, Any]:
    """Token ids and labels, [rows, length]; some labels are ignored, other ones in every row."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE - 5, (rows, length), generator=generator)
    labels = input_ids.clone()
    for row in range(rows):
        labels[row, : row + 1] = -100
    labels[:, length // 2] = -100
    inputs = {"input_ids": input_ids, "labels": labels}
    name = type(model).__name__
    extra = next((table[name] for table in _INPUTS if name in table), None)
    inputs |= {} if extra is None else extra(model, inputs)
    return {key: value for key, value in inputs.items() if value is not None}
