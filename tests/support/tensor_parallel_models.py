"""Tiny models spread over ranks by tensor parallelism, and how they are held against one rank."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
from causal_loss import in_float64
from oracle import assert_close_as_torch, farthest
from tiny_models import batch, build
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel
from transformers.distributed import DistributedConfig

from hf_fused_head import patch_report


def mesh() -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh(torch.get_default_device().type, (dist.get_world_size(),))


def gathered(**options: Any) -> ColwiseParallel:
    """The plan of a head whose logits are whole."""
    return ColwiseParallel(output_layouts=Replicate(), **options)


def loaded(family: str, **settings: Any) -> tuple[Any, Any]:
    """A stock model, and the same one as transformers spreads it over the ranks."""
    stock = build(family, **{"tie_word_embeddings": False, "num_key_value_heads": 2, **settings})
    return stock, spread(stock)


def spread(stock: Any, **settings: Any) -> Any:
    """A copy of a model, as transformers spreads it over the ranks: by its plan, or as told."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        stock.save_pretrained(folder[0])
    dist.barrier()
    config = DistributedConfig(**(settings or {"tp_plan": "auto"}))
    return type(stock).from_pretrained(folder[0], distributed_config=config)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def results(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter that has one, whole."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    named = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}
    return {"loss": loss} | {n: whole(grad) for n, grad in named.items() if grad is not None}


def assert_as_one_process(
    model: Any, stock: Any, length: int = 11, torch_results: dict[str, Tensor] | None = None
) -> None:
    """Loss and every gradient of a patched model are those of stock in one process.

    Args:
        model: The patched one.
        stock: The same one, whole.
        length: Tokens of a row.
        torch_results: Of an unpatched model that sums in the order of `model`, where stock does
            not: whichever is farther from float64 sets the budget.
    """
    inputs = batch(stock, length=length)
    ours, truth = results(model, inputs), results(in_float64(stock), inputs)
    expected = [results(stock, inputs), *([torch_results] if torch_results else [])]
    if ours.keys() != truth.keys():
        raise AssertionError(f"gradients of {ours.keys()}, expected those of {truth.keys()}")
    for name, value in ours.items():
        of_torch = farthest([each[name] for each in expected], truth[name])
        assert_close_as_torch(name, value, of_torch, truth[name])


def assert_vocabulary_parallel(model: Any) -> None:
    """The report names the sharding, and no rank held the whole head."""
    report, ranks = patch_report(model), dist.get_world_size()
    if not report.fused or f"vocabulary parallel on {ranks} ranks" not in str(report):
        raise AssertionError(str(report))
