"""How many floating-point operations the operators do, for `torch.utils.flop_counter`.

Counted are the products of a head, as torch counts those of a linear layer, over all tokens. The
import of that module imports triton where it is installed, so the formulas are registered at the
first loss after other code has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _python_dispatch

from hf_fused_head.engines.protocol import Needs
from hf_fused_head.objective import RowStats, RowWeights, Upstream, Wanted
from hf_fused_head.ops import HeadArguments
from hf_fused_head.records import unflatten


def register_formulas() -> None:
    """Gives the formulas to torch's counters, if there can be any."""
    if torch.compiler.is_compiling():
        return
    counting: Any = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    operators = torch.ops.hf_fused_head
    formulas: dict[Any, Callable[..., int]] = {
        operators.row_stats: _row_stats,
        operators.stats_and_grads: _stats_and_grads,
        operators.row_grads: _row_grads,
    }
    for operator, formula in formulas.items():
        if operator not in counting.flop_registry:
            counting.register_flop_formula(operator)(formula)
    # A counter copies the formulas when it is made, which may have been before the first loss.
    for mode in _python_dispatch._get_current_dispatch_mode_stack():
        known = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if known is not None:
            known.update({operator: counting.flop_registry[operator] for operator in formulas})


def _row_stats(*arguments: Any, **options: Any) -> int:
    head, _ = unflatten(arguments, HeadArguments, Wanted)
    nothing = [False] * len(head.inputs)
    return _products(head, Needs(nothing, nothing, False))


def _stats_and_grads(*arguments: Any, **options: Any) -> int:
    head, _, needs, _ = unflatten(arguments, HeadArguments, RowWeights, Needs, Wanted)
    return _products(head, needs)


def _row_grads(*arguments: Any, **options: Any) -> int:
    head, _, _, needs = unflatten(arguments, HeadArguments, RowStats, Upstream, Needs)
    return _products(head, needs)


def _products(head: HeadArguments, needs: Needs) -> int:
    """The logits by one product of every pair, and one for each gradient; tensors are shapes."""
    pairs: Any = zip(head.inputs, head.weights, needs.inputs, needs.weights, strict=True)
    return sum(
        2 * tokens * hidden_size * vocab_size * (1 + need_input + need_weight)
        for (tokens, hidden_size), (vocab_size, _), need_input, need_weight in pairs
    )
