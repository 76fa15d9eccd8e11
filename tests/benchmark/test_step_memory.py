"""`plan --memory`: what a training step takes, compared with what torch's allocator measures."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import transformers

from hf_fused_head import apply_patch
from hf_fused_head.benchmark import measure
from hf_fused_head.benchmark.meta_training import Training
from hf_fused_head.benchmark.step_memory import RESERVE, TOLERANCE, StepMemory, memory_bytes

TOKENS = {"cpu": 1024, "cuda": 8192}
# Tiny for a CPU, as large as small models are for a GPU; no factor of TOKENS hides in a size.
SIZES = {
    "cpu": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3},
    "cuda": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12},
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": ("LlamaConfig", {"vocab_size": 8192}),
    "qwen3-tied": ("Qwen3Config", {"vocab_size": 16384, "tie_word_embeddings": True}),
    "gemma2-softcap": ("Gemma2Config", {"vocab_size": 12288, "sliding_window": 16384}),
}
TRAININGS = {
    "full": Training("full", checkpointing=False),
    "full, checkpointing": Training("full"),
    "lora": Training("lora", checkpointing=False),
    "lora, checkpointing": Training("lora"),
}


def config_of(name: str, device: str) -> Any:
    kind, settings = CONFIGS[name]
    sizes = {**SIZES[device], **HEADS, "head_dim": SIZES[device]["hidden_size"] // 4}
    return getattr(transformers, kind)(**sizes, max_position_embeddings=32768, **settings)


def measured_bytes(
    config: Any, training: Training, head: str, dtype: torch.dtype, device: str
) -> int:
    """Weights, optimizer and the peak of a second step on the device."""
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    step_model: Any = model
    if training.kind == "lora":
        peft = importlib.import_module("peft")
        settings = {"r": training.lora_rank, "target_modules": "all-linear"}
        step_model = peft.get_peft_model(model, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    if training.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if head == "fused":
        apply_patch(step_model)
    trained = [p for p in step_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    tokens = torch.randint(0, config.vocab_size, (1, TOKENS[device]), device=device)

    def step() -> None:
        step_model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    _, beyond = measure.peak_of(step, torch.device(device))
    states = [t for state in optimizer.state.values() for t in state.values()]
    held = (*step_model.parameters(), *step_model.buffers(), *states)
    return beyond + sum(tensor.numel() * tensor.element_size() for tensor in held)


@pytest.mark.parametrize("head", ["stock", "fused"])
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_is_near_the_measured_peak(name: str, training: str, head: str, device: str) -> None:
    config, how = config_of(name, device), TRAININGS[training]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    planned = StepMemory(config, dtype, how, device_type=device).parts(head, TOKENS[device])
    measured = measured_bytes(config, how, head, dtype, device)
    assert planned["total_bytes"] == pytest.approx(measured, rel=TOLERANCE), planned
