"""What the multimodal classes need beside the rules of tiny_classes.py to be built small.

Their text path is swept, so the towers are as small as their code allows; a dotted name is a field
of a nested config. Where a forward cannot do without images or sound, `INPUTS` makes them up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]

_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN_INDEXER = {
    "text_config.indexer_n_heads": 2,
    "text_config.indexer_kv_heads": 1,
    "text_config.indexer_head_dim": 8,
    "text_config.indexer_budget": 4,
    "text_config.indexer_compress_ratio": 2,
}
_KOSMOS_TEXT = {"text_config.embed_dim": 16, "text_config.layers": 2, "latent_query_num": 4}
_GRANITE_SPEECH = {
    "encoder_config.hidden_dim": 16,
    "encoder_config.output_dim": 8,
    "projector_config.encoder_hidden_size": 16,
}
_SMALL_IMAGE = {"vision_config.image_size": 16, "vision_config.patch_size": 8}
_BLIP = {**_SMALL_IMAGE, "image_token_index": 99, "num_query_tokens": 3}
_VOCABULARY_MAP = {"<image>": 90, "<|extra_200|>": 91, "IMGIMGBA": 92, "<|visual token 0|>": 93}

SETTINGS: dict[str, dict[str, Any]] = {
    "Blip2ForConditionalGeneration": _BLIP,
    "ChameleonForConditionalGeneration": {
        "vocabulary_map": _VOCABULARY_MAP,
        "vq_config.base_channels": 32,
        "vq_config.num_embeddings": 32,
        "vq_config.embed_dim": 16,
        "vq_config.latent_channels": 16,
        "vq_config.channel_multiplier": [1, 1],
    },
    "CohereCompassForConditionalGeneration": {
        "text_config.rope_parameters": {"full_attention": _SECTIONS},
        "vision_config.deepstack_visual_indexes": [],
    },
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "vision_config.sam_config.global_attn_indexes": [1],
    },
    "Emu3ForConditionalGeneration": {
        "vocabulary_map": _VOCABULARY_MAP,
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.codebook_size": 32,
        "vq_config.embed_dim": 16,
        "vq_config.latent_channels": 16,
    },
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config.rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 2]},
    },
    "Florence2ForConditionalGeneration": {
        "vision_config.embed_dim": [16] * 4,
        "vision_config.num_groups": [2] * 4,
        "vision_config.depths": [1] * 4,
    },
    "FunAsrNanoForConditionalGeneration": {"adaptor_config.intermediate_size": 4},
    "Glm5NextForConditionalGeneration": {
        "text_config.index_topk": 16,
        "text_config.qk_rope_head_dim": 0,
        "text_config.head_dim": 0,
        "vision_config.projection_intermediate_size": 24,
    },
    "GraniteSpeechForConditionalGeneration": _GRANITE_SPEECH,
    "GraniteSpeechPlusForConditionalGeneration": _GRANITE_SPEECH,
    "HunYuanVLForConditionalGeneration": {"text_config.rope_parameters": _SECTIONS},
    "InstructBlipForConditionalGeneration": _BLIP,
    "InstructBlipVideoForConditionalGeneration": _BLIP | {"video_token_index": 99},
    "IdeficsForVisionText2Text": _SMALL_IMAGE,
    "JanusForConditionalGeneration": {
        "vq_config.num_embeddings": 32,
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.latent_channels": 32,
        "vq_config.image_token_embed_dim": 16,
        "vq_config.projection_dim": 16,
    },
    "Kosmos2ForConditionalGeneration": {**_KOSMOS_TEXT, **_SMALL_IMAGE},
    "Kosmos2_5ForConditionalGeneration": _KOSMOS_TEXT,
    "KyutaiSpeechToTextForConditionalGeneration": {
        "codec_config.upsample_groups": 16,
        "codec_config.num_filters": 4,
        "audio_pad_token_id": 100,
        "codebook_vocab_size": 32,
        "num_codebooks": 2,
    },
    "Llama4ForConditionalGeneration": {
        "vision_config.vision_output_dim": 16,
        "vision_config.projector_input_dim": 16,
        "vision_config.projector_output_dim": 16,
    },
    "Mistral4ForCausalLM": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
    "MuseGlimmerForConditionalGeneration": {"projector_hidden_size": 16},
    "PaddleOCRVLForConditionalGeneration": {"text_config.rope_parameters": _SECTIONS},
    "PPFormulaNetForConditionalGeneration": {
        "vision_config.image_size": 64,
        "vision_config.post_conv_out_channels": 16,
        "vision_config.post_conv_mid_channels": 16,
        "vision_config.decoder_hidden_size": 16,
    },
    "Pix2StructForConditionalGeneration": {
        "text_config.d_kv": 8,
        "text_config.decoder_start_token_id": 0,
        "vision_config.d_kv": 8,
    },
    "PerceptionLMForConditionalGeneration": {"vision_config.model_args": {"embed_dim": 16}},
    "Qwen2_5OmniForConditionalGeneration": {"enable_audio_output": False},
    "Qwen2VLForConditionalGeneration": {"vision_config.embed_dim": 16},
    "Qwen3OmniMoeForConditionalGeneration": {"enable_audio_output": False},
    "Qwen4ExpForConditionalGeneration": _QWEN_INDEXER,
    "UdopForConditionalGeneration": {"decoder_start_token_id": 0},
    "VibeVoiceAsrForConditionalGeneration": {
        f"{name}_tokenizer_encoder_config.{field}": value
        for name in ("acoustic", "semantic")
        for field, value in (("depths", [1, 1]), ("downsampling_ratios", [2]), ("num_filters", 4))
    },
}


def _pixels(model: Any, inputs: Inputs) -> Tensor:
    """Pixels of the size that the vision model takes."""
    size = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(1)
    shape = (inputs["input_ids"].shape[0], 3, size, size)
    return torch.randn(shape, generator=generator).to(model.get_output_embeddings().weight.dtype)


def _with_pixels(model: Any, inputs: Inputs) -> Inputs:
    return {"pixel_values": _pixels(model, inputs)}


def _with_queries(model: Any, inputs: Inputs) -> Inputs:
    """An image a row; the tokens that stand for it come first and carry no label."""
    count, token = model.config.num_query_tokens, 99
    input_ids, labels = inputs["input_ids"].clone(), inputs["labels"].clone()
    input_ids[:, :count], labels[:, :count] = token, -100
    return {"input_ids": input_ids, "labels": labels, "pixel_values": _pixels(model, inputs)}


def _with_instruction(model: Any, inputs: Inputs) -> Inputs:
    return _with_queries(model, inputs) | {"qformer_input_ids": inputs["input_ids"]}


def _with_video(model: Any, inputs: Inputs) -> Inputs:
    """Each row sees one frame."""
    given = _with_instruction(model, inputs)
    return given | {"pixel_values": given["pixel_values"][:, None]}


def _one_image_for_every_token(model: Any, inputs: Inputs) -> Inputs:
    mask = torch.ones(*inputs["input_ids"].shape, 1, dtype=torch.long)
    return {"pixel_values": _pixels(model, inputs)[:, None], "image_attention_mask": mask}


def _first_tokens_are_images(model: Any, inputs: Inputs) -> Inputs:
    position = torch.arange(inputs["input_ids"].shape[1]) < model.config.latent_query_num
    mask = position.expand(inputs["input_ids"].shape).long()
    return {"pixel_values": _pixels(model, inputs), "image_embeds_position_mask": mask}


def _boxes(model: Any, inputs: Inputs) -> Inputs:
    del model
    return {"bbox": torch.zeros(*inputs["input_ids"].shape, 4)}


def _codebooks(model: Any, inputs: Inputs) -> Inputs:
    """A text token and one of each codebook at every place."""
    input_ids = inputs["input_ids"]
    sound = (input_ids % 7)[..., None].expand(*input_ids.shape, model.config.num_codebooks)
    return {"input_ids": torch.cat([input_ids[..., None], sound], -1)}


def _noise(model: Any, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = model.get_output_embeddings().weight.dtype
    return torch.randn(shape, generator=generator).to(dtype)


def _patches(model: Any, inputs: Inputs) -> Inputs:
    """Four patches, each led by its row and its column."""
    rows, size = inputs["input_ids"].shape[0], model.config.vision_config.patch_embed_hidden_size
    return {"flattened_patches": _noise(model, rows, 4, 2 + size).abs()}


def _sound(model: Any, inputs: Inputs) -> Inputs:
    """As many frames as the tokens stand for."""
    rows, length = inputs["input_ids"].shape
    frames = length * model.config.downsample_factor
    embeds = _noise(model, rows, frames, model.config.audio_config.hidden_size)
    return {"encoder_inputs_embeds": embeds, "num_delay_tokens": 2}


INPUTS: dict[str, Callable[[Any, Inputs], Inputs]] = {
    "Blip2ForConditionalGeneration": _with_queries,
    "IdeficsForVisionText2Text": _one_image_for_every_token,
    "InstructBlipForConditionalGeneration": _with_instruction,
    "InstructBlipVideoForConditionalGeneration": _with_video,
    "Kosmos2ForConditionalGeneration": _first_tokens_are_images,
    "KyutaiSpeechToTextForConditionalGeneration": _codebooks,
    "PPFormulaNetForConditionalGeneration": _with_pixels,
    "Pix2StructForConditionalGeneration": _patches,
    "UdopForConditionalGeneration": _boxes,
    "VoxtralRealtimeForConditionalGeneration": _sound,
}
"""What the forward of a class needs beside token ids and labels."""
