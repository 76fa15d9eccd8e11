"""Run by test_trl_parallel.py in two processes: TRL's protocol and its trainers in an engine."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from causal_loss import in_float64
from data_parallel import ENGINES, base_of
from oracle import assert_close_as_torch
from peft import LoraConfig, get_peft_model
from tiny_models import batch, build
from torch import Tensor, nn
from trains_like import assert_gradients_close, seeded
from trl.trainer.utils import add_fused_lm_head

from hf_fused_head import apply_patch, patch_report, remove_patch

TEMPERATURE = 0.7


class Case(NamedTuple):
    """One way to shard and to patch a model.

    Attributes:
        engine: Who shards it: a key of `ENGINES`.
        head: Where the head goes, for the engine to read.
        training: "full", "lora" or "dora", on the head too.
        order: "first", when it is patched before TRL's head and the engine, or "last".
        half: Whether products run in bfloat16.
    """

    engine: str
    head: str
    training: str = "full"
    order: str = "first"
    half: bool = False


CASES = [
    Case("ddp", "whole"),
    Case("ddp", "whole", "lora", "last"),
    Case("fsdp1", "own", order="last"),
    Case("fsdp2", "root"),
    Case("fsdp2", "own"),
    Case("fsdp2", "own", order="last", half=True),
    Case("fsdp2", "own", "lora", "last"),
    Case("fsdp2", "own", "dora"),
    Case("fsdp2", "accelerate", order="last"),
    Case("deepspeed", "zero3"),
    Case("deepspeed", "zero3", order="last"),
]


def tiny(case: Case, patch: bool = False, trls_head: bool = False) -> nn.Module:
    """The model of the case, with TRL's head on its base or not."""
    model: Any = build("llama", tie_word_embeddings=False, num_hidden_layers=1)
    if patch and case.order == "first":
        apply_patch(model)
    if trls_head:
        add_fused_lm_head(model, TEMPERATURE, outputs=("log_probs", "entropy"))
    if case.training != "full":
        torch.manual_seed(5)
        config = LoraConfig(
            r=4,
            target_modules=["q_proj", "lm_head"],
            init_lora_weights=False,
            use_dora=case.training == "dora",
        )
        model = get_peft_model(model, config)
    return model


def objective(log_probs: Tensor, entropy: Tensor, rank: int) -> Tensor:
    """Any function of the values of a process."""
    upstream = torch.randn(2, *log_probs.shape, generator=seeded(rank))
    return (upstream[0] * log_probs + upstream[1] * entropy).sum()


def from_logits(model: Any, inputs: dict[str, Tensor], rank: int) -> Tensor:
    """The same, out of logits."""
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE
    labels = inputs["labels"][:, 1:]
    keep, log_probs = labels != -100, logits.log_softmax(-1)
    chosen = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~keep, 0)
    entropy = -(log_probs.exp() * log_probs).sum(-1).masked_fill(~keep, 0)
    return objective(chosen, entropy, rank)


def values_are_those_of_one_process(case: Case) -> None:
    """Values and gradients; one process has no label at all."""
    stock = tiny(case)
    truth = in_float64(stock)
    ranks = range(dist.get_world_size())
    inputs = [batch(base_of(stock), length=7 + 4 * rank, seed=rank) for rank in ranks]
    inputs[1]["labels"].fill_(-100)
    engine = ENGINES[case.engine](tiny(case, True, trls_head=True), case.head, case.half)
    if case.order == "last":
        apply_patch(engine.model)
    rank = dist.get_rank()
    output = engine.run(**inputs[rank], fused_lm_head=True)
    report = patch_report(engine.model)
    assert report.fused and report.last_loss == "fused", str(report)
    value = objective(output.log_probs, output.entropy, rank)
    # Engines average over the processes what is a sum here.
    engine.backward(value * dist.get_world_size())
    values = []
    for model in (stock, truth):
        parts = [from_logits(model, inputs[each], each) for each in ranks]
        torch.stack(parts).sum().backward()
        values.append(parts[rank].detach())
    if case.half:
        # What bfloat16 does to a stock model in the same engine.
        plain = ENGINES[case.engine](tiny(case), case.head, case.half)
        found = from_logits(plain.model, inputs[rank], rank)
        plain.backward(found * dist.get_world_size())
        values[0], expected = found.detach(), plain.gradients()
    else:
        expected = gradients_of(stock)
    arithmetic = torch.bfloat16 if case.half else torch.float32
    assert_close_as_torch("value", value, *values, arithmetic=arithmetic)
    assert_gradients_close(engine.gradients(), expected, gradients_of(truth))
    remove_patch(engine.model)
    assert not patch_report(engine.model).fused


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """By name."""
    return {name: p.grad for name, p in model.named_parameters()}


def main(*engines: str) -> None:
    """All cases of some engines."""
    ENGINES[engines[0]].start()
    for case in CASES:
        if case.engine in engines:
            if dist.get_rank() == 0:
                print(case, flush=True)
            values_are_those_of_one_process(case)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
