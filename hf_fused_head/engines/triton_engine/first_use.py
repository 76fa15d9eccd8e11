"""The first call on an unverified card: a small problem is compared with float64.

Kernels that are right on one card may be compiled wrongly for another. So the engine proves itself
once a process, device and dtype, and where it fails plain torch computes the loss.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from hf_fused_head.engines.protocol import Needs, Operands
from hf_fused_head.engines.triton_engine import engine
from hf_fused_head.objective import RowWeights, Wanted
from hf_fused_head.planning.cards import card_of
from hf_fused_head.planning.problem import Problem
from hf_fused_head.planning.schedule import plan

# No size is a multiple of a block; the columns are more than one block of the widest kernel.
_TOKENS, _HIDDEN, _VOCAB = 70, 72, 611
# Largest relative error (Frobenius norm) of a gradient. Rounding stays below a quarter of it: in 16
# bits one of the result and one of the stored tile; in float32 that of TF32, if torch allows it.
_LARGEST_ERROR = {torch.float32: 2.0**-9, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
# The inputs have few digits, so that every product of theirs is exact and losses have all digits.
_LARGEST_LOSS_ERROR = 2.0**-16


def objection(device: torch.device, dtype: torch.dtype, product: str) -> str | None:
    """Why the engine's results are not to be trusted; None if they are right.

    Computed once, and warned about once, for a device, a dtype and a kind of product. While a CUDA
    graph is captured nothing can be computed, and nothing is objected to.

    Args:
        device: A GPU, or the CPU for Triton's interpreter.
        dtype: Of hidden states and head.
        product: "epilogue" or "tile".
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _checked(device, dtype, product)


@functools.cache
def _checked(device: torch.device, dtype: torch.dtype, product: str) -> str | None:
    # Whatever the first call runs under (fake tensors, a counter, autocast) sees nothing of this.
    with _disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            wrong = _errors_of(device, dtype, product)
        except Exception as error:
            # Drivers and compilers raise anything.
            wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if not wrong:
        return None
    name = card_of(device).name
    reason = f"the Triton kernels failed their check on {name} with {dtype}: {wrong}"
    warnings.warn(
        f"{reason}. The loss is computed by impl='torch', which is right and slower; please report "
        "this with the output of `hf-fused-head doctor`",
        stacklevel=2,
    )
    return reason


def _errors_of(device: torch.device, dtype: torch.dtype, product: str) -> str:
    """What is wrong with a loss and its gradients, in words; "" if nothing is."""
    generator = torch.Generator().manual_seed(0)

    def sixteenths(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).double() / 16

    hidden, weight = sixteenths(_TOKENS, _HIDDEN), sixteenths(_VOCAB, _HIDDEN)
    labels = torch.randint(_VOCAB, (_TOKENS,), generator=generator)
    logits = hidden @ weight.T
    nll = logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]
    dlogits = logits.softmax(1) / _TOKENS
    dlogits[torch.arange(_TOKENS), labels] -= 1 / _TOKENS
    truths = {"dX": dlogits @ weight, "dW": dlogits.T @ hidden}

    problem = Problem(
        num_tokens=_TOKENS,
        hidden_size=_HIDDEN,
        vocab_size=_VOCAB,
        dtype=dtype,
        impl="triton",
        card=card_of(device),
        product=product,
    )
    matrices = ([hidden.to(device, dtype)], [weight.to(device, dtype)])
    stats, grads = engine.stats_and_grads(
        Operands(*matrices, None, None, 1.0, None),
        labels.to(device),
        RowWeights(torch.full((_TOKENS,), 1 / _TOKENS, device=device)),
        Needs([True], [True], False),
        Wanted(),
        plan(problem),
    )
    found = {"loss": (_distance(stats.nll, nll), _LARGEST_LOSS_ERROR)}
    for grad, (name, truth) in zip(grads, truths.items(), strict=False):
        found[name] = (_distance(grad, truth), _LARGEST_ERROR[dtype])
    # A NaN is no smaller than anything.
    wrong = [
        f"{name} has a relative error of {error:.1e}, above {most:.1e}"
        for name, (error, most) in found.items()
        if not error <= most
    ]
    return ", ".join(wrong)


def _distance(result: Tensor, truth: Tensor) -> float:
    return float((result.cpu().double() - truth).norm() / truth.norm())
