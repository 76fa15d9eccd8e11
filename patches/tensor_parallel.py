"""Heads whose rows are spread over ranks by tensor parallelism, as DTensors inside their forward.

Whoever spread them gathers the logits after the head. The fused head makes none: it takes the rows
that are here and lets the ranks share what the loss needs (`process_group`). Two ways of spreading
are known, torch's `parallelize_module`, which hangs hooks on the head, and transformers'
`tp_plan`, which puts a forward on it (read at 5.17, `distributed/tensor_parallel.py`).
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_fused_head.distributed.dtensor import is_dtensor, is_sharded

from .errors import UnsupportedModelError

_TRANSFORMERS = "transformers.distributed.tensor_parallel"
_REMEDY = "or leave lm_head out of the plan or the model stock (remove_patch)"


class HeadRows(NamedTuple):
    """This rank's part of a head, with gradients that stay with it, and what it is given."""

    hidden: Tensor  # [..., hidden], all of them
    complete_hidden: bool  # whether their gradient has to be the sum over the ranks
    weight: Tensor  # [rows, hidden]
    bias: Tensor | None  # [rows]
    group: Any


def head_rows(hidden: Any, weight: Any, bias: Any) -> HeadRows:
    """The rows of a head that are here.

    Hidden states that were gathered for the head alone, out of a sequence that is sharded over the
    same ranks, take each rank's part of their gradient: the way back of the gathering sums and
    scatters the parts, in one collective and in their dtype. Other ones take the sum.

    Args:
        hidden: [..., hidden], a plain tensor or a DTensor, sharded or not.
        weight: [vocab, hidden].
        bias: [vocab], or None.

    Raises:
        UnsupportedModelError: If it is not sharded by rows over one dimension of ranks.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not _is_cut_into_rows(tensor):
            raise UnsupportedModelError(
                f"the head's {name} must be a DTensor with placement Shard(0) on a mesh of one "
                f"dimension inside the head's forward, got {_spelled(tensor)}: use ColwiseParallel "
                f"or tp_plan='colwise_gather_output', {_REMEDY}"
            )
    group = weight.device_mesh.get_group()
    hidden = _gathered(hidden)
    scattered = is_dtensor(hidden) and _was_cut(hidden, weight.device_mesh)
    local = _with_partial_gradient(hidden) if scattered else whole_hidden(hidden)
    return HeadRows(
        local, not scattered, weight.to_local(), None if bias is None else bias.to_local(), group
    )


def whole_hidden(hidden: Any) -> Tensor:
    """All hidden states, as a plain tensor; their gradient is the same on every rank."""
    hidden = _gathered(hidden)
    return hidden.to_local() if is_dtensor(hidden) else hidden


def _gathered(hidden: Any) -> Any:
    if not is_sharded(hidden):
        return hidden
    from torch.distributed.tensor import Replicate

    return hidden.redistribute(placements=[Replicate()] * len(hidden.placements))


def _with_partial_gradient(hidden: Any) -> Tensor:
    from torch.distributed.tensor import Partial

    return hidden.to_local(grad_placements=[Partial()])


def _was_cut(hidden: Any, mesh: Any) -> bool:
    """Whether these hidden states come right out of a gathering over the ranks of `mesh`."""
    if torch.compiler.is_compiling() or hidden.device_mesh != mesh:
        return False
    # What `redistribute` keeps for its backward. Without it the sum is made, which is right too.
    before = getattr(hidden.grad_fn, "current_spec", None)
    return before is not None and any(place.is_shard() for place in before.placements)


def whole_logits(logits: Any) -> Tensor:
    """What the head's forward made, gathered as the hooks around it would."""
    return logits.full_tensor() if is_dtensor(logits) else logits


def gathers_logits(forward: Any, head: Any) -> bool:
    """Whether a forward on the head is transformers', with hidden states and logits whole.

    On a deep copy of a head it still runs the original, and counts as another's.
    """
    code = getattr(forward, "__code__", None)
    if code is None or forward.__globals__.get("__name__") != _TRANSFORMERS:
        return False
    closure = inspect.getclosurevars(forward).nonlocals
    style: Any = closure.get("self")
    if type(style).__name__ != "ColwiseParallel" or not style.use_local_output:
        return False
    if closure.get("module") is not head:
        return False
    return style.input_layouts.is_replicate() and style.output_layouts.is_replicate()


def check_gathered(placements: Any) -> None:
    """Refuses a plan that leaves the logits sharded.

    Raises:
        UnsupportedModelError: If they are wanted in another layout than whole.
    """
    if not all(place.is_replicate() for place in placements):
        raise UnsupportedModelError(
            f"the plan of the head must gather its output, got output_layouts="
            f"{tuple(placements)}: use ColwiseParallel(output_layouts=Replicate()), {_REMEDY}"
        )


def _is_cut_into_rows(tensor: Any) -> bool:
    if not is_dtensor(tensor) or tensor.device_mesh.ndim != 1:
        return False
    (place,) = tensor.placements
    return type(place).__name__ == "Shard" and place.dim == 0


def _spelled(tensor: Any) -> str:
    if not is_dtensor(tensor):
        return "a plain tensor"
    return f"{tuple(tensor.placements)} on a mesh of shape {tuple(tensor.device_mesh.shape)}"
