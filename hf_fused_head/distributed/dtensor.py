"""What the package asks of a DTensor, without importing `torch.distributed.tensor`."""

from __future__ import annotations

from typing import Any


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; by name, so that code without one needs no import."""
    return type(tensor).__name__ == "DTensor"


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor of which no rank holds everything."""
    return is_dtensor(tensor) and not all(place.is_replicate() for place in tensor.placements)


def layout_of(tensor: Any) -> tuple[Any, ...]:
    """Mesh and placements of a DTensor; () for a plain tensor."""
    return (tensor.device_mesh, tuple(tensor.placements)) if is_dtensor(tensor) else ()


def has_dtensors(model: Any) -> bool:
    """Whether some of a model's parameters are DTensors."""
    return any(is_dtensor(parameter) for parameter in model.parameters())
