"""The processes of a parallel run: who they are, on which devices, and how they talk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among those that `torchrun` has started.

    Attributes:
        rank: Its number.
        size: How many there are.
        device: Where it computes.
        backend: "nccl" or "gloo".
        shared: Whether processes share a device, so that times say nothing.
    """

    rank: int
    size: int
    device: torch.device
    backend: str
    shared: bool

    @property
    def group(self) -> dist.ProcessGroup:
        """All of them."""
        group: Any = dist.group.WORLD
        return group

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value)
        return every

    def describe(self) -> dict[str, object]:
        """For the header of a result."""
        return {"world_size": self.size, "backend": self.backend, "shared_device": self.shared}


@contextmanager
def joined(device: str | None = None) -> Iterator[Ranks]:
    """Joins the processes of `torchrun`, or makes a group of this one where there is no launcher.

    NCCL where every process has a GPU of its own. With fewer GPUs than processes they share them,
    and with none the CPU, over gloo.

    Args:
        device: "cpu" or "cuda"; None for GPUs where there are any.

    Raises:
        ValueError: If the device is another one, or not here.
    """
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"`--device` must be cpu or cuda, got {device!r}")
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if device == "cuda" and gpus == 0:
        raise ValueError("`--device` must be cpu on a machine without CUDA devices, got 'cuda'")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    place = torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(place)
    backend = "nccl" if gpus >= local_size and dist.is_nccl_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        # Not in the stubs of torch 2.13.
        store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        yield Ranks(rank, size, place, backend, shared=max(gpus, 1) < local_size)
    finally:
        dist.destroy_process_group()
