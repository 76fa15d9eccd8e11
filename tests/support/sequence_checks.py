"""Sequences in parts, on two processes, against whole ones: run by trainer_worker.py."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
import torch.distributed as dist
from causal_loss import in_float64
from oracle import assert_close_as_torch
from tiny_models import batch, build
from torch import Tensor, nn
from trains_like import assert_gradients_close
from transformers.integrations.deepspeed import deepspeed_sp_compute_loss
from whole_sequence_attention import head_and_tail, split_attention

from hf_fused_head import apply_patch, last_stats, patch_report


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


def check_splits() -> None:
    """All of the above."""
    for split in ("halves", "head and tail", "no token on rank 1"):
        parts_sum_up_to_the_whole(split)
        means_are_weighed_as_ulysses_does(split)
    split_attention(None)
