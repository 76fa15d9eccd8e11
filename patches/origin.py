"""Whether a function is still the one that torch, transformers or PEFT defines.

Anybody may put another function in its place, also before this package is imported, so that an
identity remembered here would prove nothing: the function's own code says where it comes from.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.loss import loss_utils

_LOSS_UTILS = "transformers.loss.loss_utils"
# They replace `torch.nn.functional.linear` for good by one that computes the same.
_SAME_LINEAR = ("deepspeed",)


# Evaluated while the compiler traces, which guards on the function that it was given.
@torch.compiler.assume_constant_result
def is_own(function: Any, module: str, qualname: str) -> bool:
    """Whether `function` is what `module` itself defines under `qualname`.

    A wrapper that copies these names, by `functools.wraps`, keeps its own code.
    """
    named = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if named != (module, qualname):
        return False
    package = module.partition(".")[0]
    while function is not None:
        if not _is_code_of(function, package):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _is_code_of(function: Any, package: str) -> bool:
    code = getattr(function, "__code__", None)
    if code is None or function.__globals__["__name__"].partition(".")[0] != package:
        return False
    file = function.__globals__.get("__file__") or ""
    # Code that was compiled into the module, or put under the function, has another file.
    # A module that was loaded without its source does not know the file of its code.
    return code.co_filename == file or not file.endswith(".py")


def is_same_linear(linear: Any) -> bool:
    """Whether `torch.nn.functional.linear` computes what torch's own does."""
    own = linear is torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue]
    return own or module_of(linear).partition(".")[0] in _SAME_LINEAR


def is_causal_loss(loss_function: Any) -> bool:
    """Whether this is transformers' loss of causal language models, which shifts the labels."""
    return is_own(loss_function, _LOSS_UTILS, "ForCausalLMLoss")


def is_masked_loss(loss_function: Any) -> bool:
    """Whether this is transformers' loss of masked language models, which does not."""
    return is_own(loss_function, _LOSS_UTILS, "ForMaskedLMLoss")


def replaced_part_of_losses() -> str | None:
    """What has taken the place of a function that both losses call; None for nothing."""
    functional = loss_utils.nn.functional  # pyright: ignore[reportPrivateImportUsage]
    for module, name, function in (
        (_LOSS_UTILS, "fixed_cross_entropy", loss_utils.fixed_cross_entropy),
        ("torch.nn.functional", "cross_entropy", functional.cross_entropy),
    ):
        if not is_own(function, module, name):
            return f"{module}.{name} was replaced by {name_of(function)}"
    return None


def module_of(function: Any) -> str:
    """The module whose code a function or another callable is."""
    if isinstance(function, functools.partial):
        return module_of(function.func)
    # Wrapped callables copy the module name of what they wrap, so their own class counts too.
    own = getattr(function, "__code__", None)
    if own is not None:
        return function.__globals__.get("__name__", "")
    return type(function).__module__


def name_of(function: Any) -> str:
    """A function's name for people."""
    return f"{module_of(function)}.{getattr(function, '__qualname__', type(function).__name__)}"
