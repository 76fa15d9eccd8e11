"""Which engine a name means for given tensors, and why."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple, cast, get_args

import torch

from hf_fused_head.engines.protocol import Engine
from hf_fused_head.options import Impl
from hf_fused_head.planning.cards import Card, card_of

# By name and at first use: the Triton engine must not be needed where triton is not installed.
_MODULES = {
    "reference": "hf_fused_head.engines.reference",
    "torch": "hf_fused_head.engines.torch_engine.engine",
    "triton": "hf_fused_head.engines.triton_engine.engine",
}

# Who makes the product of hidden states and head in the Triton engine, and what to ask for to get
# it whatever the card: for tests and benchmarks, on purpose not among the names of the interface.
PRODUCTS = {"triton:epilogue": "epilogue", "triton:tile": "tile"}
HOW = {
    "epilogue": "kernels with the loss in the epilogue of their product",
    "tile": "the products of the vendor's library, tile by tile, with the loss in a pass behind",
}


class Choice(NamedTuple):
    """An engine and, for people, why it is the one.

    `product` says who makes the product in the Triton engine, "epilogue" or "tile"; "" in others.
    """

    impl: str
    reason: str
    product: str = ""

    @property
    def name(self) -> str:
        """The engine and, for the Triton engine, who makes its product."""
        return f"{self.impl}:{self.product}" if self.product else self.impl


def engine_named(impl: str) -> Engine:
    """The engine of a resolved name: "reference", "torch" or "triton"."""
    return cast(Engine, importlib.import_module(_MODULES[impl]))


def resolve_impl(impl: str, device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The engine that `impl` means for tensors of this device and dtype.

    Args:
        impl: "auto", "triton", "torch" or "reference", or one of `PRODUCTS`.
        device: Where the tensors lie.
        dtype: The dtype of the hidden states and the head.

    Raises:
        ValueError: If there is no such implementation.
        NotImplementedError: If the named one does not support device or dtype.
    """
    if impl not in get_args(Impl) and impl not in PRODUCTS:
        raise ValueError(
            f"`impl` must be one of {get_args(Impl)}, got {impl!r}: 'auto' picks a fitting one"
        )
    if impl in ("torch", "reference"):
        return Choice(impl, f"impl={impl!r} was asked for and runs on any device")
    device = torch.device(device)
    if impl == "auto" and device.type != "cuda":
        return Choice("torch", f"the tensors are on {device.type!r}, Triton kernels need a GPU")
    obstacle = triton_obstacle(device.type, dtype)
    if impl != "auto":
        if obstacle is not None:
            raise NotImplementedError(
                f"`impl` must support the inputs, got {impl!r}: {obstacle}; "
                "use impl='torch' or impl='auto'"
            )
        product = PRODUCTS.get(impl) or product_on(card_of(device), dtype)
        why = f"impl={impl!r} was asked for and supports these inputs: {HOW[product]}"
        return Choice("triton", why, product)
    if obstacle is not None:
        return Choice("torch", f"the Triton kernels cannot be used: {obstacle}")
    return _choose_triton(device, dtype)


def triton_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton engine cannot take such tensors; None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    triton_engine: Any = engine_named("triton")
    return triton_engine.unavailable_reason(device_type, dtype)


def _choose_triton(device: torch.device, dtype: torch.dtype) -> Choice:
    """What "auto" means where the Triton engine could run."""
    triton_engine: Any = engine_named("triton")
    card = card_of(device)
    product = product_on(card, dtype)
    reasons = [f"on {card.name} with {dtype}: {HOW[product]}"]
    if not card.verified:
        # By name, since an engine may not be imported before it is known to be there.
        first_use: Any = importlib.import_module("hf_fused_head.engines.triton_engine.first_use")
        objection = first_use.objection(device, dtype, product)
        if objection is not None:
            return Choice("torch", objection)
        reasons.append("checked against float64 when this process first used it")
    slower = None if product == "tile" else triton_engine.slower_reason(dtype)
    return Choice("triton", "; ".join(reasons if slower is None else [*reasons, slower]), product)


def product_on(card: Card, dtype: torch.dtype) -> str:
    """Who makes the product fastest on a card, by its record."""
    return "epilogue" if dtype in card.epilogue_dtypes else "tile"
