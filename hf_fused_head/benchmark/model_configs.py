"""The models that the workloads are shaped like, as settings of their configs: no hub needed."""

from __future__ import annotations

from typing import Any

_LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_3_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
_QWEN_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
_QWEN_3_600M = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_QWEN_2_500M = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_MISTRAL_7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "sliding_window": None,
}
_GEMMA_2_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
    # As the workload, which leaves it out.
    "final_logit_softcapping": None,
}
_GEMMA_3_270M = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
}
_SMOLLM_2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
_SMOKE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1031,
}
# Model type and settings by the name of a workload.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-8b": ("llama", _LLAMA_3_8B),
    "llama3-8b-512": ("llama", _LLAMA_3_8B),
    "llama3-8b-32k": ("llama", _LLAMA_3_8B),
    "llama3-8b-128k": ("llama", _LLAMA_3_8B),
    "llama3.2-1b-2k": ("llama", LLAMA_3_1B),
    "qwen3-8b": ("qwen3", _QWEN_3_8B),
    "qwen3-0.6b": ("qwen3", _QWEN_3_600M),
    "qwen2.5-0.5b-1k": ("qwen2", _QWEN_2_500M),
    "mistral-7b": ("mistral", _MISTRAL_7B),
    "gemma2-2b": ("gemma2", _GEMMA_2_2B),
    "gemma3-270m": ("gemma3_text", _GEMMA_3_270M),
    "smollm2-cpu": ("llama", _SMOLLM_2_135M),
    "smoke": ("llama", _SMOKE),
}
