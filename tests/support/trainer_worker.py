"""Run by test_sharded_trainer.py in two processes: `FusedHeadTrainer` in accelerate's engines."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate_on_cpu import engine, pretend_gpus
from causal_loss import in_float64
from data_parallel import ENGINES
from oracle import assert_close_as_torch, farthest
from safetensors.torch import load_file
from sequence_checks import check_splits
from tensor_parallel_models import spread
from tiny_trainer import VOCAB, arguments, assert_metrics, build, history, rows
from torch import Tensor, nn
from whole_sequence_attention import head_and_tail, split_attention

from hf_fused_head import FusedHeadTrainer, patch_report

# Momentum, since torch cannot load the state of an optimizer that has none into sharded weights.
DESCENT = {"lr": 0.5, "momentum": 0.5}
# By transformers' from_pretrained, with these settings of its DistributedConfig.
CUT_WHEN_LOADED = {"tp": {"tp_plan": "auto"}, "fsdp2_at_load": {"fsdp_size": 2}}
STEPS = 2
ROWS = 6
LENGTH = 12


def plainly_trained(
    model: nn.Module,
    data: list[dict[str, list[int]]],
    smoothing: float,
    by_row: bool,
    steps: int,
    places: Tensor | None = None,
) -> list[Tensor]:
    """Losses of descent on all of `data` at once, in each process by itself; in place.

    Args:
        model: A stock model.
        data: As the Trainer gets it.
        smoothing: Of the labels.
        by_row: Every row weighs the same, not every token; a row without tokens has loss 0.
        steps: Of plain gradient descent with momentum.
        places: Of the tokens, in order of rank, if the processes work together and each has a part
            of every sequence.
    """
    ids, labels = (torch.tensor([row[key] for row in data]) for key in ("input_ids", "labels"))
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    mine = torch.arange(LENGTH)
    if places is not None:
        mine = places.chunk(dist.get_world_size())[dist.get_rank()]

    def loss_of(some: slice) -> Tensor:
        logits = model(input_ids=ids[some, mine], position_ids=mine[None]).logits
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1),
            targets[some, mine].flatten(),
            reduction="sum",
            label_smoothing=smoothing,
        )
        return loss / (targets[some] != -100).sum().clamp(min=1)

    # Stock's steps under Ulysses are as many times too long as there are processes.
    rate = DESCENT["lr"] * (dist.get_world_size() if by_row else 1)
    losses, optimizer = [], torch.optim.SGD(model.parameters(), **{**DESCENT, "lr": rate})
    for _ in range(steps):
        model.zero_grad()
        parts = [slice(i, i + 1) for i in range(ROWS)] if by_row else [slice(ROWS)]
        losses.append(torch.stack([loss_of(part) for part in parts]).mean())
        losses[-1].backward()
        losses[-1] = losses[-1].detach()
        if places is not None:
            for part in (losses[-1], *(weight.grad for weight in model.parameters())):
                dist.all_reduce(part)
        optimizer.step()
    return losses


def trains_as_one_process(name: str, folder: Path, smoothing: float) -> None:
    """Losses, weights and metrics without logits; and again after a checkpoint."""
    # Under Ulysses both processes work on one row after the other, and stock counts tokens by row.
    by_row = name == "ulysses"
    sizes = {"vocab_size": VOCAB + 1} if name in CUT_WHEN_LOADED else {}
    build_whole = functools.partial(build, **sizes)
    # DeepSpeed's loader for it stops after an epoch that it was not asked to go beyond.
    steps = 1 if by_row else STEPS
    data: list[Any] = [
        {**row, "position_ids": list(range(LENGTH))} for row in rows(ROWS, masked=(2,))
    ]
    split_attention(None)
    stock, truth = build_whole(), in_float64(build_whole())
    losses = [plainly_trained(model, data, smoothing, by_row, steps) for model in (stock, truth)]
    stocks = [stock]
    if name == "cp":
        # How far rounding takes stock from the truth depends on where sequences are cut.
        split_attention(head_and_tail(LENGTH))
        stocks.append(build_whole())
        plainly_trained(stocks[1], data, smoothing, by_row, steps, head_and_tail(LENGTH))
    # All rows in every step, so that their order does not matter.
    batch_size = 1 if by_row else ROWS if name in ("cp", "tp") else ROWS // 2
    micro_batches = ROWS if by_row else 1
    changes: dict[str, Any] = {
        "max_steps": steps,
        "learning_rate": DESCENT["lr"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": micro_batches,
        "per_device_eval_batch_size": 4,
        "label_smoothing_factor": smoothing,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    if name in CUT_WHEN_LOADED:
        changes |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    final = []
    for resumed in (False, True)[:steps]:
        with engine(name, micro_batches, batch_size) as settings:
            model = build_whole()
            if name in CUT_WHEN_LOADED:
                model = spread(model, **CUT_WHEN_LOADED[name])
            trainer: Any = FusedHeadTrainer(
                model,
                arguments(folder, **{**changes, **settings}),
                train_dataset=data,
                eval_dataset=data,
                optimizer_cls_and_kwargs=(torch.optim.SGD, DESCENT),
            )
            trainer.train(str(folder / "checkpoint-1") if resumed else None)
            if not resumed:
                assert len(history(trainer, "perplexity")) == steps
                found = history(trainer, "loss").float()
                assert_close_as_torch("loss", found, *map(torch.stack, losses))
                metrics = trainer.evaluate()
            assert patch_report(trainer.model).fused
            final.append(whole_weights(name, trainer, folder / "whole"))
            dist.barrier()
    split_attention(None)
    if dist.get_rank() != 0:
        return
    for key, right in truth.state_dict().items():
        plain = farthest([model.state_dict()[key] for model in stocks], right)
        for weights in final:
            assert_close_as_torch(key, weights[key], plain, right)
    plain = build_whole()
    plain.load_state_dict(final[0])
    assert_metrics(metrics, "eval_", plain, data)
    if name in CUT_WHEN_LOADED:
        assert_files_of_one_process(folder / "checkpoint-2", plain)


def whole_weights(name: str, trainer: Any, folder: Path) -> dict[str, Tensor]:
    """All weights of a trainer, on rank 0 at least; all processes must come here."""
    if name not in CUT_WHEN_LOADED:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    trainer.save_model(str(folder))
    return load_file(folder / "model.safetensors")


def assert_files_of_one_process(folder: Path, model: Any) -> None:
    """Weights and optimizer in a checkpoint are those of a process that has all of `model`."""
    weights = folder / "model.safetensors"
    model.load_state_dict(load_file(weights))
    model.save_pretrained(folder / "stock")
    if weights.read_bytes() != (folder / "stock" / weights.name).read_bytes():
        raise AssertionError(f"{weights} is not as the stock model writes it")
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
    momenta = [each["momentum_buffer"] for each in state]
    shapes = sorted(tuple(parameter.shape) for parameter in model.parameters())
    whole = {type(momentum) for momentum in momenta} == {Tensor}
    if not whole or sorted(tuple(momentum.shape) for momentum in momenta) != shapes:
        raise AssertionError(f"the optimizer's file holds {momenta}, expected {shapes}")


def main(folder: str, *names: str) -> None:
    """All checks of some engines."""
    pretend_gpus()
    ENGINES["deepspeed" if "zero3" in names else "ddp"].start()
    if "cp" in names:
        check_splits()
    for name in names:
        for smoothing in (0.0, 0.1):
            if smoothing and name != "cp":
                continue
            if dist.get_rank() == 0:
                print(name, smoothing, flush=True)
            trains_as_one_process(name, Path(folder) / f"{name}-{smoothing}", smoothing)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
