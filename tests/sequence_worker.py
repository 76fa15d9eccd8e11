"""Run by test_sequence_parallel.py in two processes: sequences in parts against whole ones."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from causal_loss import in_float64
from oracle import assert_close_as_torch
from test_trainer import arguments, assert_metrics, history, rows
from test_trainer import build as build_for_trainer
from tiny_models import batch, build
from torch import Tensor, nn
from trains_like import assert_gradients_close
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_sp_compute_loss
from whole_sequence_attention import head_and_tail, split_attention

from hf_fused_head import FusedHeadTrainer, apply_patch, last_stats, patch_report

LEARNING_RATE = 0.5
STEPS = 2


def part_of(inputs: dict[str, Tensor], places: Tensor) -> dict[str, Tensor]:
    """What this process has of whole sequences: tokens, their places and their shifted labels."""
    mine = places.chunk(dist.get_world_size())[dist.get_rank()]
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    return {
        "input_ids": inputs["input_ids"][:, mine],
        "labels": inputs["labels"][:, mine],
        "shift_labels": shifted[:, mine],
        "position_ids": mine.expand(len(inputs["input_ids"]), -1),
    }


def summed_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Over the processes, whose losses are parts of one sum."""
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    return {name: p.grad for name, p in model.named_parameters()}


def truths(stock: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[dict]]:
    """Loss and gradients of whole sequences in one process: float32 and float64."""
    split_attention(None)
    losses, gradients = [], []
    for model in (copy.deepcopy(stock), in_float64(stock)):
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    return losses, gradients


def sequence_for(split: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A stock model, whole sequences and where their tokens go."""
    stock = build("llama", num_hidden_layers=1)
    inputs = batch(stock, length=12)
    if split == "no token on rank 1":
        # The label at a boundary belongs to the last token of the part before.
        inputs["labels"][:, 7:] = -100
    places = head_and_tail(12) if split == "head and tail" else torch.arange(12)
    return stock, inputs, places


def parts_sum_up_to_the_whole(split: str) -> None:
    """With a count over all processes, losses and gradients of the parts are shares of a sum."""
    stock, inputs, places = sequence_for(split)
    losses, gradients = truths(stock, inputs)
    count = (inputs["labels"][:, 1:] != -100).sum()
    mine = part_of(inputs, places)
    valid = (mine["shift_labels"] != -100).sum()
    if dist.get_rank() == 1:
        assert bool(valid) == (split != "no token on rank 1")
    split_attention(places)
    model = apply_patch(copy.deepcopy(stock), stats=("accuracy",))
    loss = model(**mine, num_items_in_batch=count).loss
    if not valid:
        assert loss == 0
    loss.backward()
    assert patch_report(model).fused and last_stats(model).num_valid == valid
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert_close_as_torch("loss", total, *losses)
    assert_gradients_close(summed_gradients(model), *gradients)


def means_are_weighed_as_ulysses_does(split: str) -> None:
    """The sum over parts that transformers makes: one without a token is NaN and has no share."""
    stock, inputs, places = sequence_for(split)
    losses, gradients = truths(stock, inputs)
    group = SimpleNamespace(get_group=lambda: dist.group.WORLD)
    accelerator = SimpleNamespace(torch_device_mesh={"sp": group})
    settings = SimpleNamespace(sp_backend="torch", sp_size=dist.get_world_size())
    split_attention(places)
    model = apply_patch(copy.deepcopy(stock))
    mine = part_of(inputs, places)
    del mine["labels"]
    loss, output = deepspeed_sp_compute_loss(accelerator, model, mine, True, settings)
    assert output.loss.isnan() == (not (mine["shift_labels"] != -100).any())
    (loss / dist.get_world_size()).backward()
    assert_close_as_torch("loss", loss, *losses)
    assert_gradients_close(summed_gradients(model), *gradients)


def plainly_trained(model: nn.Module, data: list[dict], smoothing: float) -> list[Tensor]:
    """Losses of descent on all of `data` at once, then the loss in evaluation; in place."""
    ids, labels = (torch.tensor([row[key] for row in data]) for key in ("input_ids", "labels"))

    def loss_of() -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing
        )

    losses = []
    for _ in range(STEPS):
        model.zero_grad()
        losses.append(loss_of())
        losses[-1].backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
    return [loss.detach() for loss in (*losses, loss_of())]


def trainer_splits_sequences(folder: str, smoothing: float) -> None:
    """Context parallelism in the Trainer: losses, weights and metrics are those of one process."""
    data = rows(6, masked=(2,))
    split_attention(None)
    stock, truth = build_for_trainer(), in_float64(build_for_trainer())
    expected, exact = (plainly_trained(model, data, smoothing) for model in (stock, truth))
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": len(data),
        "per_device_eval_batch_size": 4,
        "label_smoothing_factor": smoothing,
        "ddp_backend": "gloo",
        "parallelism_config": ParallelismConfig(cp_size=dist.get_world_size()),
    }
    split_attention(head_and_tail(len(data[0]["input_ids"])))
    model = build_for_trainer()
    trainer: Any = FusedHeadTrainer(
        model, arguments(Path(folder), **settings), train_dataset=data, eval_dataset=data
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert patch_report(model).fused
    found = history(trainer, "loss").float()
    assert_close_as_torch("loss", found, *(torch.stack(x[:STEPS]) for x in (expected, exact)))
    for (name, mine), one, right in zip(
        model.named_parameters(), stock.parameters(), truth.parameters(), strict=True
    ):
        assert_close_as_torch(name, mine, one, right)
    split_attention(None)
    weights = build_for_trainer()
    weights.load_state_dict(model.state_dict())
    assert_metrics(metrics, "eval_", weights, data)
    if smoothing:
        return
    # The stock Trainer's evaluation loss is a mean over batches; it is the same here.
    split_attention(head_and_tail(len(data[0]["input_ids"])))
    plain = Trainer(weights, arguments(Path(folder), **settings), eval_dataset=data)
    wide = Trainer(in_float64(weights), arguments(Path(folder), **settings), eval_dataset=data)
    evaluated = [torch.tensor(t.evaluate()["eval_loss"]) for t in (plain, wide)]
    assert_close_as_torch("eval_loss", torch.tensor(metrics["eval_loss"]), *evaluated)


def main(folder: str) -> None:
    """All checks."""
    dist.init_process_group("gloo")
    for split in ("halves", "head and tail", "no token on rank 1"):
        parts_sum_up_to_the_whole(split)
        means_are_weighed_as_ulysses_does(split)
    # accelerate wants GPUs for it; all but the attention, which is ours here, runs without.
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    for smoothing in (0.0, 0.1):
        trainer_splits_sequences(folder, smoothing)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
