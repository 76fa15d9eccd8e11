"""Operands as a linear layer would see them under the caller's autocast."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", Tensor, Tensor | None)


def as_linear_takes(tensor: T) -> T:
    """The tensor in the dtype in which `F.linear` would compute with it; None stays None."""
    if tensor is None:
        return tensor
    device_type = tensor.device.type
    # The meta device has no autocast; torch 2.9's compiler cannot ask `is_autocast_available`.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensor
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device_type)) if eligible else tensor
