"""The loss of TRL's asynchronous GRPO, whose rollouts come from elsewhere."""

from __future__ import annotations

import importlib
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs trl (pip install trl)")

import torch
from oracle import assert_close_as_torch
from torch import Tensor, nn
from trains_like import assert_gradients_close, seeded
from trl_cases import policy, reward, rows, tokenizer
from trl_runs import HeadCalls

from hf_fused_head import patch_report, patch_trainer

LENGTH, SCORED = 9, range(3, 8)
PACKAGE = "trl.experimental.async_grpo"


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
    """What FlashAttention 3, which needs a GPU, computes of one sequence, [tokens, heads, size]."""
    groups = query.shape[1] // key.shape[1]
    repeated = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    heads = (each.transpose(0, 1) for each in (query, *repeated))
    scale = options["softmax_scale"]
    mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=scale)
    return mixed.transpose(0, 1)


def trainer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """TRL's, with neither a server nor a GPU."""
    module = importlib.import_module(PACKAGE)
    attention = types.SimpleNamespace(flash_attn_varlen_func=causal_attention)
    monkeypatch.setattr(f"{PACKAGE}.packing._flash_attn", lambda: attention)
    monkeypatch.setattr(f"{PACKAGE}.async_grpo_trainer.get_peak_flops_per_device", lambda *_: 1.0)
    policy().save_pretrained(folder / "policy")
    made = module.AsyncGRPOTrainer(
        model=str(folder / "policy"),
        args=module.AsyncGRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_steps=1,
            temperature=0.7,
            dtype="float32",
        ),
        reward_funcs=reward,
        train_dataset=rows("grpo"),
        processing_class=tokenizer(),
        rollout_worker=types.SimpleNamespace(rollout_buffer=None),
        weight_transfer=types.SimpleNamespace(),
    )
    made.current_gradient_accumulation_steps = 1
    return made


def rollout() -> dict[str, Tensor]:
    """One sequence as the trainer's collator gives it."""
    ids = torch.randint(3, 40, (1, LENGTH), generator=seeded())
    bounds = torch.tensor([[0, LENGTH]], dtype=torch.int32)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(LENGTH)[None],
        "shift_labels": nn.functional.pad(ids[:, 1:], (0, 1), value=-100),
        "token_index": torch.tensor([list(SCORED)]),
        "old_log_probs": torch.full((1, len(SCORED)), -3.0),
        "advantages": torch.randn(1, len(SCORED), generator=seeded()),
        "segment_id": torch.zeros(1, len(SCORED), dtype=torch.long),
        "global_n_tokens": torch.tensor([float(len(SCORED))]),
        "global_n_forward_tokens": torch.tensor([float(LENGTH)]),
        "mean_seq_len": torch.tensor([float(LENGTH)]),
        "tree_kv_index": torch.arange(LENGTH)[None],
        "tree_cu_seqlens_q": bounds,
        "tree_cu_seqlens_k": bounds,
        "tree_max_seqlens": torch.tensor([[LENGTH, LENGTH]]),
    }


def loss_and_gradients(made: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    loss = made.compute_loss(made.model, rollout())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in made.model.named_parameters()}


def test_loss_and_gradients_are_those_of_trls_own_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = HeadCalls(monkeypatch)
    stock, exact, ours = (trainer(tmp_path, monkeypatch) for _ in range(3))
    exact.model.double()
    losses, gradients = zip(
        *(loss_and_gradients(made) for made in (patch_trainer(ours), stock, exact)), strict=True
    )
    assert calls.take() == (2, 1)
    assert patch_report(ours.model).last_loss == "fused"
    assert_close_as_torch("loss", *losses, arithmetic=torch.float32)
    assert_gradients_close(*gradients)
