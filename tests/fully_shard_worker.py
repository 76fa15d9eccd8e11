"""Run by test_fully_shard.py in two processes: a sharded patched model against one process."""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from causal_loss import in_float64
from oracle import assert_close_as_torch
from tiny_models import batch, build
from torch.distributed.fsdp import fully_shard

from hf_fused_head import apply_patch, patch_report


def main(head_unit: str, order: str, tie: str) -> None:
    """Gradients of a step whose ranks hold unequal numbers of tokens."""
    dist.init_process_group("gloo")
    stock = build("llama", tie_word_embeddings=tie == "tied")
    parts = [batch(stock, length=7 + 4 * rank, seed=rank) for rank in range(dist.get_world_size())]
    count = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
    truth, model = in_float64(stock), copy.deepcopy(stock)
    for alone in (stock, truth):
        for part in parts:
            alone(**part, num_items_in_batch=count).loss.backward()
    if order == "before":
        apply_patch(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if head_unit == "own":
        fully_shard(model.lm_head)
    fully_shard(model)
    if order == "after":
        apply_patch(model)
    loss = model(**parts[dist.get_rank()], num_items_in_batch=count).loss
    # FSDP averages over the ranks what is a sum here.
    (loss * dist.get_world_size()).backward()
    if not patch_report(model).fused:
        raise AssertionError(patch_report(model).reason)
    expected, true = dict(stock.named_parameters()), dict(truth.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor()
        assert_close_as_torch(name, gradient, expected[name].grad, true[name].grad)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
