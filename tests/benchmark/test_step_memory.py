"""`plan --memory`: what a training step takes, compared with what torch's allocator measures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import keys, run

from hf_fused_head import apply_patch
from hf_fused_head.benchmark import measure
from hf_fused_head.benchmark.meta_training import Training
from hf_fused_head.benchmark.step_memory import (
    RESERVE,
    TOLERANCE,
    StepMemory,
    memory_bytes,
    read_config,
)
from hf_fused_head.benchmark.workloads import WORKLOADS
from hf_fused_head.patches import meta_model

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


def planned(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    """What `plan --json` writes."""
    file = tmp_path / "plan.json"
    assert run("plan", *arguments, "--json", file, "--force") == 0
    return json.loads(file.read_text())


def test_the_longest_batch_fits_and_one_token_more_does_not(tmp_path: Path) -> None:
    content = planned(tmp_path, "smollm2-cpu", "--memory", "8GiB")
    records = {(record["head"], record["training"]): record for record in content["records"]}
    assert list(records) == [(h, t) for t in ("full", "lora") for h in ("stock", "fused")]
    available = int(8 * 2**30 * (1 - RESERVE))
    assert content["available_bytes"] == available
    config = transformers.LlamaConfig(
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
        tie_word_embeddings=True,
    )
    for training in ("full", "lora"):
        step = StepMemory(config, torch.bfloat16, Training(training), device_type="cpu")
        for head in ("stock", "fused"):
            longest = records[head, training]["max_tokens"]
            total = [step.parts(head, longest + more)["total_bytes"] for more in (0, 1)]
            assert total[0] == records[head, training]["total_bytes"] <= available < total[1]
        assert records["fused", training]["max_tokens"] > records["stock", training]["max_tokens"]
    for key, kind in keys(content):
        assert not key.endswith("_bytes") or kind is int, key


def test_a_model_that_is_too_large_says_so_for_both_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = planned(tmp_path, "smollm2-cpu", "--memory", "512MiB", "--training", "full")
    for record in content["records"]:
        assert (record["max_tokens"], record["fits"]) == (0, False)
        assert record["total_bytes"] > content["memory_bytes"]
    assert capsys.readouterr().out.count(" no ") == 2


def test_what_is_trained_how_changes_its_part_of_the_memory(tmp_path: Path) -> None:
    def parts(*options: object) -> dict[str, int]:
        arguments = ("smollm2-cpu", "--memory", "8GiB", *options)
        return planned(tmp_path, *arguments)["records"][-1]

    lora = parts("--training", "lora")
    four = parts("--load-in-4bit")
    assert four["weight_bytes"] < lora["weight_bytes"] / 2
    assert four["optimizer_bytes"] == lora["optimizer_bytes"]
    assert parts("--training", "lora", "--lora-rank", 32)["optimizer_bytes"] == (
        2 * lora["optimizer_bytes"]
    )
    full = parts("--training", "full")
    wide = parts("--training", "full", "--optimizer-dtype", "float32")
    assert wide["optimizer_bytes"] == 2 * full["optimizer_bytes"]
    kept = parts("--training", "full", "--no-checkpointing")
    assert kept["max_tokens"] < full["max_tokens"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GiB", 24 * 2**30), ("24G", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5MiB", 3 * 2**19)],
)
def test_sizes_are_read_with_their_units(text: str, expected: int) -> None:
    assert memory_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "0GiB", "GiB", "-1GiB", "24 apples", "7iB"])
def test_a_size_without_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`--memory` must be a size above 0 with its unit"):
        memory_bytes(text)


def test_every_workload_has_a_model_of_its_sizes() -> None:
    for name, workload in WORKLOADS.items():
        config = read_config(name)
        sizes = config.hidden_size, config.vocab_size
        assert sizes == (workload.hidden_size, workload.vocab_size), name


def test_a_model_that_needs_values_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.FalconConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"got a FalconConfig .*: plan its head with --tokens"):
        StepMemory(config, torch.float32, Training("full"), device_type="cpu")


def test_lora_needs_peft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meta_model.importlib.util, "find_spec", lambda name: None)
    assert run("plan", "smoke", "--memory", "1GiB", "--training", "lora") == 2
    assert "needs peft: pip install" in capsys.readouterr().err
