"""What a rank gives to collectives, counted where it is given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

# The name of what a rank gives, by collective; torch 2.13 has new names for two of them.
_GIVEN = {
    "all_reduce": "tensor",
    "all_gather": "tensor",
    "all_gather_into_tensor": "input_tensor",
    "all_gather_single": "input_tensor",
    "reduce_scatter_tensor": "input",
    "reduce_scatter_single": "input",
}


@dataclass(frozen=True)
class Message:
    """One collective, as one rank sees it.

    Attributes:
        kind: "all_reduce", "all_gather" or "reduce_scatter".
        given_bytes: Size of the tensor that this rank gives.
        ranks: Of the group.
    """

    kind: str
    given_bytes: int
    ranks: int

    @property
    def ring_bytes(self) -> int:
        """What the rank sends if the collective goes around a ring."""
        others = self.given_bytes * (self.ranks - 1)
        if self.kind == "all_gather":
            return others
        return (2 if self.kind == "all_reduce" else 1) * others // self.ranks


@contextmanager
def sent() -> Iterator[list[Message]]:
    """Collects the messages of this process, its autograd threads included.

    Calls of `torch.distributed.<collective>` are counted, which the vocabulary-parallel loss, DDP's
    hooks in Python and FSDP2 make; a reducer in C++ and functional collectives pass unseen.
    """
    messages: list[Message] = []
    originals = {name: getattr(dist, name) for name in _GIVEN if hasattr(dist, name)}

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            given = arguments[_GIVEN[name]]
            nbytes = given.numel() * given.element_size()
            kind = next(k for k in ("all_reduce", "all_gather", "reduce_scatter") if k in name)
            messages.append(Message(kind, nbytes, dist.get_world_size(arguments.get("group"))))
            return original(*args, **kwargs)

        return collective

    for name, original in originals.items():
        setattr(dist, name, counted(name, original))
    try:
        yield messages
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def given_bytes(messages: list[Message]) -> int:
    """Of all messages."""
    return sum(message.given_bytes for message in messages)
