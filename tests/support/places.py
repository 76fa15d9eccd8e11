"""Where the processes of a worker compute, and how they talk.

"cpu" over gloo; "cuda", a GPU for each, over NCCL; "shared", all on one GPU, over gloo. Tensors of
a worker are made on the default device, which is set before its first case.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

SUPPORT = Path(__file__).parent
_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "shared": "gloo"}

# Parameters of a test that runs a worker: everywhere, or where every process has a device.
ON_TWO_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.multigpu)]
EVERYWHERE = [*ON_TWO_DEVICES, pytest.param("shared", marks=pytest.mark.gpu)]


def environment(place: str) -> dict[str, str]:
    """What a worker is started with; Triton's interpreter runs where there is no GPU."""
    settings = {
        "TEST_PLACE": place,
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
        # What this process finds, its workers find too.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")])),
    }
    if place == "cpu":
        settings |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}
    elif place == "shared":
        settings["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return settings


def settle(rank: int) -> str:
    """In a worker: makes its device the default one, and returns the backend."""
    place = os.environ["TEST_PLACE"]
    if place != "cpu":
        device = torch.device("cuda", rank if place == "cuda" else 0)
        torch.cuda.set_device(device)
        torch.set_default_device(device)
    return _BACKENDS[place]


def generator(seed: int) -> torch.Generator:
    """Of random numbers on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
