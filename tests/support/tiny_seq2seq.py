"""What sequence-to-sequence and masked classes need beside the rules of tiny_classes.py.

A dotted name is a field of a nested config. Where a forward cannot do without sound or images, or
without labels of another kind, `INPUTS` makes them up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]

_START = {"decoder_start_token_id": 0}
_TINY_BERT = {
    "model_type": "bert",
    "vocab_size": 101,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
# Functions, since the config takes the fields out of its arguments.
_BERT_TO_BERT = {
    "encoder": lambda: dict(_TINY_BERT),
    "decoder": lambda: _TINY_BERT | {"is_decoder": True, "add_cross_attention": True},
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
}
_WAV2VEC2 = {
    "model_type": "wav2vec2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"), 0.0),
}
_VIT = {
    "model_type": "vit",
    "image_size": 16,
    "patch_size": 8,
    **{name: _TINY_BERT[name] for name in _TINY_BERT if name not in ("model_type", "vocab_size")},
}
_SOUNDS = {"pronunciation_vocab_size": 32, "shape_vocab_size": 32}
_SPEECH_ENCODER = {
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 2,
    "speech_encoder_intermediate_size": 24,
    "feature_projection_input_dim": 8,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "adaptor_kernel_size": 4,
    "adaptor_stride": 2,
    "conv_depthwise_kernel_size": 3,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "DistilBertForMaskedLM": {"dim": 16, "hidden_dim": 24},
    "EncoderDecoderModel": _BERT_TO_BERT,
    "EsmcForMaskedLM": {"num_key_value_heads": 2},
    "FSMTForConditionalGeneration": {
        "src_vocab_size": 101,
        "tgt_vocab_size": 101,
        "decoder.vocab_size": 101,
    },
    "LongT5ForConditionalGeneration": _START,
    "LukeForMaskedLM": {"entity_vocab_size": 32, "entity_emb_size": 8},
    "LxmertForPreTraining": {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 8},
    "MoonshineForConditionalGeneration": {
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 2,
        "decoder_num_attention_heads": 2,
        "encoder_num_key_value_heads": 2,
        "decoder_num_key_value_heads": 2,
    },
    "MoonshineStreamingForConditionalGeneration": {"num_key_value_heads": 2},
    "NeoMMEForMaskedLM": {"head_dim": 16, "embedding_rank": 8},
    "PerceiverForMaskedLM": {
        "d_latents": 16,
        "num_latents": 4,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "max_position_embeddings": 11,
    },
    "Pop2PianoForConditionalGeneration": _START,
    "ReformerForMaskedLM": {
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "local_attn_chunk_length": 11,
        "lsh_attn_chunk_length": 11,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "RoCBertForMaskedLM": _SOUNDS,
    "RoCBertForPreTraining": _SOUNDS,
    "SeamlessM4TForSpeechToText": _SPEECH_ENCODER,
    "SeamlessM4Tv2ForSpeechToText": _SPEECH_ENCODER,
    "Speech2TextForConditionalGeneration": {"conv_channels": 16},
    "SpeechEncoderDecoderModel": _BERT_TO_BERT | {"encoder": lambda: dict(_WAV2VEC2)},
    "SpeechT5ForSpeechToText": {
        "conv_dim": [16, 16],
        "conv_stride": [5, 2],
        "conv_kernel": [10, 3],
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "apply_spec_augment": False,
    },
    "SwitchTransformersForConditionalGeneration": _START,
    "T5ForConditionalGeneration": _START,
    "VibeVoiceForConditionalGeneration": {"diffusion_head_config.latent_size": 16},
    "VisionEncoderDecoderModel": _BERT_TO_BERT | {"encoder": lambda: dict(_VIT)},
    "VisualBertForPreTraining": {"visual_embedding_dim": 8},
    "XmodForMaskedLM": {"default_language": "en_XX"},
}


def _noise(model: Any, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)


def _rows(inputs: Inputs) -> int:
    return inputs["input_ids"].shape[0]


def _instead_of_tokens(name: str, *shape: int) -> Callable[[Any, Inputs], Inputs]:
    """Sound of this shape; the tokens are those of the decoder, which it makes of the labels."""

    def inputs_of(model: Any, inputs: Inputs) -> Inputs:
        return {"input_ids": None, name: _noise(model, _rows(inputs), *shape)}

    return inputs_of


def _whole_window(model: Any, inputs: Inputs) -> Inputs:
    """As many frames as the encoder has positions for, two for each."""
    frames = 2 * model.config.max_source_positions
    features = _noise(model, _rows(inputs), model.config.num_mel_bins, frames)
    return {"input_ids": None, "input_features": features}


def _shifted(inputs: Inputs) -> Tensor:
    """Tokens for a decoder that does not make them of the labels."""
    return inputs["input_ids"].roll(1, -1)


def _with_decoder_tokens(name: str, *shape: int) -> Callable[[Any, Inputs], Inputs]:
    sound = _instead_of_tokens(name, *shape)
    return lambda model, inputs: sound(model, inputs) | {"decoder_input_ids": _shifted(inputs)}


def _classes(name: str) -> Callable[[Any, Inputs], Inputs]:
    """One of two classes for each row."""
    return lambda model, inputs: {name: torch.arange(_rows(inputs)) % 2}


def _two_views(model: Any, inputs: Inputs) -> Inputs:
    """An image whose places count as tokens, and a class for each row."""
    rows = _rows(inputs)
    ignored = torch.full((rows, 2), -100)
    return {
        "visual_embeds": _noise(model, rows, 2, model.config.visual_embedding_dim),
        "visual_attention_mask": torch.ones(rows, 2),
        "attention_mask": torch.ones_like(inputs["input_ids"]),
        "labels": torch.cat([inputs["labels"], ignored], -1),
        "sentence_image_labels": torch.arange(rows) % 2,
    }


def _boxes(model: Any, inputs: Inputs) -> Inputs:
    rows, size = _rows(inputs), model.config.visual_feat_dim
    return {"visual_feats": _noise(model, rows, 3, size), "visual_pos": _noise(model, rows, 3, 4)}


INPUTS: dict[str, Callable[[Any, Inputs], Inputs]] = {
    "AlbertForPreTraining": _classes("sentence_order_label"),
    "BertForPreTraining": _classes("next_sentence_label"),
    "BigBirdForPreTraining": _classes("next_sentence_label"),
    "CanaryForConditionalGeneration": _with_decoder_tokens("input_features", 32, 80),
    "CohereAsrForConditionalGeneration": _with_decoder_tokens("input_features", 32, 128),
    "ErnieForPreTraining": _classes("next_sentence_label"),
    "FNetForPreTraining": _classes("next_sentence_label"),
    "LxmertForPreTraining": _boxes,
    "MegatronBertForPreTraining": _classes("next_sentence_label"),
    "MobileBertForPreTraining": _classes("next_sentence_label"),
    "MoonshineForConditionalGeneration": _instead_of_tokens("input_values", 2000),
    "MoonshineStreamingForConditionalGeneration": _instead_of_tokens("input_values", 2000),
    "SeamlessM4TForSpeechToText": _instead_of_tokens("input_features", 12, 8),
    "SeamlessM4Tv2ForSpeechToText": _instead_of_tokens("input_features", 12, 8),
    "Speech2TextForConditionalGeneration": _instead_of_tokens("input_features", 32, 80),
    "SpeechEncoderDecoderModel": _instead_of_tokens("input_values", 200),
    "SpeechT5ForSpeechToText": _instead_of_tokens("input_values", 200),
    "VisionEncoderDecoderModel": _instead_of_tokens("pixel_values", 3, 16, 16),
    "VisualBertForPreTraining": _two_views,
    "WhisperForConditionalGeneration": _whole_window,
}
"""What the forward of a class needs beside token ids and labels; None takes an input away."""
