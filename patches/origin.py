"""Whether a function is still the one that torch, transformers or PEFT defines.

Anybody may put another function in its place, also before this package is imported, so that an
identity remembered here would prove nothing: the function's own code says where it comes from.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import overrides
from transformers.loss import loss_utils

_LOSS_UTILS = "transformers.loss.loss_utils"
# They replace `torch.nn.functional.linear` for good by one that computes the same.
_SAME_LINEAR = ("deepspeed",)
# Of the losses of torch and transformers, as they define them.
_DEFAULTS = {
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    **dict.fromkeys(("weight", "size_average", "reduce", "num_items_in_batch", "shift_labels")),
}
# Their function modes do not change what a loss or a linear layer computes.
_PLAIN_MODES = ("torch", "triton")


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


def replaced_part_of_losses(loss_function: Any) -> str | None:
    """What was changed in a loss of transformers and in what it calls; None for nothing.

    Args:
        loss_function: One of the two losses above.
    """
    functional = loss_utils.nn.functional  # pyright: ignore[reportPrivateImportUsage]
    fixed_cross_entropy, cross_entropy = loss_utils.fixed_cross_entropy, functional.cross_entropy
    for module, name, function in (
        (_LOSS_UTILS, "fixed_cross_entropy", fixed_cross_entropy),
        ("torch.nn.functional", "cross_entropy", cross_entropy),
    ):
        if not is_own(function, module, name):
            return f"{module}.{name} was replaced by {name_of(function)}"
    for function in (loss_function, fixed_cross_entropy, cross_entropy):
        if not _has_own_defaults(function):
            return f"{name_of(function)} was given other defaults"
    return None


@torch.compiler.assume_constant_result
def _has_own_defaults(function: Any) -> bool:
    """Whether a loss has its own defaults; other ones leave its code as it is."""
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    # The last positional parameters have defaults.
    given = dict(zip(reversed(positional), reversed(defaults), strict=False))
    given.update(function.__kwdefaults__ or {})
    return all(_DEFAULTS.get(name, value) == value for name, value in given.items())


def replacing_mode() -> str | None:
    """The active function mode that may replace the loss or the head; None for none."""
    for mode in overrides._get_current_function_mode_stack():
        if type(mode).__module__.partition(".")[0] not in _PLAIN_MODES:
            return type(mode).__name__
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
