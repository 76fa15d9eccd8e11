"""What the function transforms of torch see of a loss: `torch.func`, dual tensors, batches.

Inside `torch.func.grad`, `jvp` and `vmap` a tensor is wrapped once for each level, and only the
outermost wrapper shows in `requires_grad`. torch has no public function for the levels below; those
called here are the ones that `torch.autograd.Function` and `torch.func` call themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

P = ParamSpec("P")
R = TypeVar("R")

_torch: Any = torch
_functorch: Any = _torch._C._functorch

# As `torch.compiler.disable`, which imports the compiler at once instead of at the first call.
eager_only = _torch._disable_dynamo


def in_transform() -> bool:
    """Whether a transform of `torch.func` runs, or a level of dual tensors is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def eager_in_transforms(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which leaves the graph of torch.compile inside a transform.

    The compiler would lose derivatives there: it takes no `jvp` and no `vmap` of an
    `autograd.Function`, and does not tell which of several arguments a transform differentiates
    (read at torch 2.13). With `fullgraph=True` the graph break is an error.
    """

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if in_transform() and torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                msg="the fused cross-entropy runs transforms of torch.func and dual tensors in "
                "eager mode: use torch.compile without fullgraph=True, or compile the function "
                "inside the transform"
            )
            return in_eager_mode(*args, **kwargs)
        return function(*args, **kwargs)

    in_eager_mode = eager_only(function)
    return checked


def is_exporting() -> bool:
    """Whether torch.export traces."""
    # Under torch.compile, torch 2.9 takes `torch.compiler.is_exporting()` to be True.
    return _torch.compiler._is_exporting_flag


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a derivative with respect to `tensor` may be computed, at any level."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    if torch.compiler.is_compiling() or not in_transform():
        return False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor) and _is_forward(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
        if torch.is_grad_enabled() and tensor.requires_grad:
            return True
    with torch._C._DisableFuncTorch():
        return forward_ad.unpack_dual(tensor).tangent is not None


def _is_forward(tensor: Tensor) -> bool:
    """Whether a wrapper belongs to a level of `torch.func.jvp`."""
    level = _functorch.maybe_get_level(tensor)
    return any(
        interpreter.level() == level and interpreter.key() == _functorch.TransformType.Jvp
        for interpreter in _functorch.get_interpreter_stack() or ()
    )


def is_batched(tensor: Tensor) -> bool:
    """Whether `torch.vmap` runs over a dimension of `tensor`."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def is_batch_of_gradients(value: Any) -> bool:
    """Whether this is a batch of `torch.autograd.grad`, which has a `vmap` of its own."""
    return isinstance(value, Tensor) and _functorch.is_legacy_batchedtensor(value)


@eager_only
def loop(function: Callable[..., Any], info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
    """The rule of `torch.vmap` for a function that takes no batch: one call for each of its parts.

    Args:
        function: Takes `arguments` without the batch.
        info: That of `torch.vmap`.
        in_dims: The dimension of the batch in each argument, None for one without it.
        arguments: Tensors, sequences of them, and other values.

    Returns:
        The results, stacked in front, and 0 for each of them.
    """
    leaves, spec = pytree.tree_flatten(arguments)
    dims, _ = pytree.tree_flatten(in_dims)
    results = []
    for index in range(info.batch_size):
        parts = [
            leaf if dim is None else leaf.select(dim, index)
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        results.append(function(*pytree.tree_unflatten(parts, spec)))
    stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *results)
    return stacked, pytree.tree_map(lambda _: 0, stacked)


@eager_only
def loop_over_gradients(function: Callable[..., Any], *arguments: Any) -> Any:
    """As `loop`, for the batches of `torch.autograd.grad(..., is_grads_batched=True)`.

    Raises:
        NotImplementedError: If there is a batch of batches.
    """
    leaves, spec = pytree.tree_flatten(arguments)
    dims = [0 if is_batch_of_gradients(leaf) else None for leaf in leaves]
    level, parts = 1, []
    for leaf, dim in zip(leaves, dims, strict=True):
        # The third argument is for tensors without the batch.
        parts.append(leaf if dim is None else _torch._remove_batch_dim(leaf, level, 1, dim))
    if any(map(is_batch_of_gradients, parts)):
        raise NotImplementedError(
            "`is_grads_batched` must not be True inside another batch of gradients, got two: use "
            "torch.func.vjp and torch.vmap"
        )
    size = next(part.shape[0] for part, dim in zip(parts, dims, strict=True) if dim == 0)
    info, in_dims = SimpleNamespace(batch_size=size), pytree.tree_unflatten(dims, spec)
    results, _ = loop(function, info, in_dims, *pytree.tree_unflatten(parts, spec))
    return pytree.tree_map(lambda result: _torch._add_batch_dim(result, 0, level), results)
