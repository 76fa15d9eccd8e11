"""Checkpoints of a model with sharded weights: gathered to write, sharded again when read.

A file holds what one process without parallelism would write, so that it can be read with any
number of them. Tensors are gathered one after the other, onto the CPU of the process that writes
them, and read without a collective: every process takes its shard of the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_fused_head.distributed.dtensor import is_dtensor, layout_of


def gathered_tensors(values: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """`values` with every DTensor gathered; all processes must call this.

    One all-gather for each sharded DTensor.

    Args:
        values: The same keys in the same order on every process.
        keep: Whether this process keeps them; the others get an empty dict.
    """
    gathered = {}
    for name, value in values.items():
        full = value.full_tensor() if is_dtensor(value) else value
        if keep:
            gathered[name] = full.cpu() if is_dtensor(value) else full
    return gathered


def save_optimizer(optimizer: Any, scheduler: Any, files: tuple[str, str], keep: bool) -> None:
    """Writes the files of an optimizer and its scheduler; all processes must call this.

    Args:
        optimizer: Of parameters of which some are sharded.
        scheduler: Of its learning rate.
        files: One for each of them.
        keep: Whether this process writes.

    Raises:
        NotImplementedError: If state is sharded in another way than the parameters.
    """
    saved = optimizer.state_dict()
    parameters = _parameters(optimizer)
    for index, state in saved["state"].items():
        for name, value in state.items():
            if is_dtensor(value) and value.shape != parameters[index].shape:
                raise NotImplementedError(
                    f"the optimizer's {name!r} of a sharded parameter must have its shape, "
                    f"{tuple(parameters[index].shape)}, to be saved, got {tuple(value.shape)}: set "
                    "save_only_model=True, or take an optimizer such as AdamW or SGD"
                )
    states = {index: gathered_tensors(state, keep) for index, state in saved["state"].items()}
    if keep:
        torch.save({**saved, "state": states}, files[0])
        torch.save(scheduler.state_dict(), files[1])


def load_optimizer(optimizer: Any, scheduler: Any, files: tuple[str, str]) -> None:
    """Reads what `save_optimizer` wrote, each tensor sharded like its parameter.

    Where there are no such files, after `save_only_model=True`, both stay as they are, as in stock.
    """
    if not all(os.path.isfile(file) for file in files):
        return
    saved, schedule = (torch.load(f, map_location="cpu", weights_only=True) for f in files)
    parameters = _parameters(optimizer)
    states = {
        index: {name: _shard_like(value, parameters[index]) for name, value in state.items()}
        for index, state in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": states})
    scheduler.load_state_dict(schedule)


@contextmanager
def loads_gathered_tensors(model: Any) -> Iterator[None]:
    """While it is open, `model.load_state_dict` takes full tensors for sharded parameters."""

    def shard(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if prefix + name in state_dict:
                state_dict[prefix + name] = _shard_like(state_dict[prefix + name], parameter)

    handle = model.register_load_state_dict_pre_hook(shard)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def saves_optimizer_itself(model: Any, args: Any) -> Iterator[None]:
    """While it is open, the stock Trainer takes a model that was sharded when it was loaded.

    From transformers 5.23 on it refuses one whose optimizer is to be saved, which it cannot do and
    `save_optimizer` does.
    """
    refused = getattr(model, "is_distributed_loading_by_transformers", False)
    if args is None or args.save_only_model or not refused:
        yield
        return
    args.save_only_model = True
    try:
        yield
    finally:
        args.save_only_model = False


def _parameters(optimizer: Any) -> list[Tensor]:
    """In the order of the state dict's numbers."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _shard_like(value: Any, parameter: Any) -> Any:
    """This process' shard of a full tensor; anything else as it is."""
    if not is_dtensor(parameter) or is_dtensor(value) or not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    shard = distribute_tensor(value, *layout_of(parameter), src_data_rank=None)
    # A copy, since the shard is a view that would keep the full tensor alive.
    return torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(shard)
