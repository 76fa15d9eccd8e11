"""Which engine a name means for given tensors, and why."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple, cast, get_args

import torch

from hf_fused_head.engines.protocol import Engine
from hf_fused_head.options import Impl

# By name and at first use: the Triton engine must not be needed where triton is not installed.
_MODULES = {
    "reference": "hf_fused_head.engines.reference",
    "torch": "hf_fused_head.engines.torch_engine.engine",
    "triton": "hf_fused_head.engines.triton_engine.engine",
}


class Choice(NamedTuple):
    """An engine and, for people, why it is the one."""

    impl: str
    reason: str


def engine_named(impl: str) -> Engine:
    """The engine of a resolved name: "reference", "torch" or "triton"."""
    return cast(Engine, importlib.import_module(_MODULES[impl]))


def resolve_impl(impl: str, device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The engine that `impl` means for tensors of this device and dtype.

    Args:
        impl: "auto", "triton", "torch" or "reference".
        device: Where the tensors lie.
        dtype: The dtype of the hidden states and the head.

    Raises:
        ValueError: If there is no such implementation.
        NotImplementedError: If the named one does not support device or dtype.
    """
    if impl not in get_args(Impl):
        raise ValueError(
            f"`impl` must be one of {get_args(Impl)}, got {impl!r}: 'auto' picks a fitting one"
        )
    if impl in ("torch", "reference"):
        return Choice(impl, f"impl={impl!r} was asked for and runs on any device")
    device_type = torch.device(device).type
    obstacle = triton_obstacle(device_type, dtype)
    if impl == "triton":
        if obstacle is not None:
            raise NotImplementedError(
                f"`impl` must support the inputs, got 'triton': {obstacle}; "
                "use impl='torch' or impl='auto'"
            )
        return Choice("triton", "impl='triton' was asked for and supports these inputs")
    if device_type != "cuda":
        return Choice("torch", f"the tensors are on {device_type!r}, Triton kernels need CUDA")
    if obstacle is not None:
        return Choice("torch", f"the Triton kernels cannot be used: {obstacle}")
    triton_engine: Any = engine_named("triton")
    doubt = triton_engine.unverified_reason(device_type)
    if doubt is not None:
        return Choice("torch", f"impl='triton' has to be asked for by name here: {doubt}")
    reasons = [f"the tensors are on CUDA and the Triton kernels support {dtype}"]
    slower = triton_engine.slower_reason(dtype)
    return Choice("triton", "; ".join(reasons if slower is None else [*reasons, slower]))


def triton_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton engine cannot take such tensors; None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    triton_engine: Any = engine_named("triton")
    return triton_engine.unavailable_reason(device_type, dtype)
