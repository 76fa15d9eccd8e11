"""How each kind of head becomes operands of the fused loss, inside the head's own forward.

There the parameters are gathered, cast and hooked as the stock forward would find them. A plain
linear layer is one pair (hidden states, weight); a LoRA layer adds one small pair for each active
adapter, `(scale * A(dropout(x)), B)`, so that no copy of the large weight is made. Every other
module is not taken apart: its own forward runs on a few tokens at a time.

A kind is decided by the forward that a class has at the time; what its adapters are switched
to is read on every call.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hf_fused_head.distributed.dtensor import is_dtensor, is_sharded
from hf_fused_head.engines.select import Choice
from hf_fused_head.functional import LossStats, operand_cross_entropy
from hf_fused_head.log_probs import TokenLogProbs, operand_log_probs
from hf_fused_head.run_record import recording
from hf_fused_head.transforms import is_batched

from . import wrappers
from .chunked_head import HeadForward, run_in_chunks
from .class_swap import stock_class
from .errors import UnsupportedModelError
from .origin import is_own, is_same_linear
from .recompute_logits import ComputeMode
from .settings import Settings, TokenSettings
from .tensor_parallel import head_rows, whole_hidden
from .trial import Trials, buffer_versions, fingerprint, keeps_state, try_out, written_since

LINEAR = "linear"
CONV1D = "conv1d"
LORA = "lora"
MODULE = "module"

_NO_LABELS = "nothing to compute, no token has a label"
_NO_VALUES = "nothing computed, the tensors have no values"


class HeadResult(NamedTuple):
    """What a head computed in the place of logits, and the metadata of those."""

    values: LossStats | TokenLogProbs
    vocab_size: int
    dtype: torch.dtype
    kind: str
    ran: str = ""  # the schedule, for people; "" where it is compiled
    engine: Choice | None = None  # None where the head's own forward ran
    ranks: int = 1  # that share the head's rows


class LinearOperands(NamedTuple):
    """A head as sums of products: `logits = sum_i X_i @ W_i.T + bias`."""

    pairs: list[tuple[Tensor, Tensor]]
    bias: Tensor | None
    vocab_size: int
    group: Any = None  # of the ranks that share the rows
    complete_hidden: bool = True  # whether those sum the gradient of the hidden states

    def plus_bias(self, extra: Tensor | None) -> LinearOperands:
        """The same with one more bias, [1, vocab], on the device and in the dtype of the weight."""
        if extra is None:
            return self
        if self.group is not None:
            raise UnsupportedModelError(
                "a head that is spread over ranks must have no bias beside its own, got one that "
                "the model adds to the logits: leave the head out of the plan or the model stock "
                "(remove_patch)"
            )
        extra = extra.reshape(-1).to(self.pairs[0][1])
        return self._replace(bias=extra if self.bias is None else self.bias + extra)


def kind_of(cls: type) -> str:
    """The kind of heads of this class; `cls` is the class as it was before any swap.

    A class whose forward was replaced is a module, whose own forward runs.
    """
    return _kind(cls, cls.forward, nn.functional.linear)


# The compiler evaluates this while it traces, and guards on the arguments.
@torch.compiler.assume_constant_result
def _kind(cls: type, forward: Any, linear: Any) -> str:
    if issubclass(cls, nn.Linear) and is_own(forward, "torch.nn.modules.linear", "Linear.forward"):
        return LINEAR if is_same_linear(linear) else MODULE
    for kind, module, name in (
        (CONV1D, "transformers.pytorch_utils", "Conv1D"),
        (LORA, "peft.tuners.lora.layer", "Linear"),
    ):
        stock = _loaded(module, name)
        if stock is not None and issubclass(cls, stock):
            return kind if is_own(forward, module, f"{name}.forward") else MODULE
    return MODULE


def engine_obstacle(head: nn.Module, impl: str) -> str | None:
    """Why the named engine cannot serve a head that is not taken apart; None when it can."""
    if impl != "triton":
        return None
    return (
        f"`impl` must be 'auto', 'torch' or 'reference' for {stock_class(type(head)).__name__}, "
        "whose own forward computes the logits, got 'triton': its kernels need the matrix of a "
        "plain or LoRA head"
    )


def innermost_head(module: nn.Module) -> nn.Module:
    """The module that makes the logits, under wrappers that only choose or gather.

    PEFT's `modules_to_save` runs the active adapter's copy of the head, or the original one while
    adapters are disabled; the wrappers of FSDP1 and torch.compile run the module inside.
    """
    while True:
        inner = _passed_through(module)
        if inner is None:
            return module
        module = inner


def _passed_through(module: nn.Module) -> nn.Module | None:
    children: Any = module._modules
    if "modules_to_save" in children and "original_module" in children:
        active: Any = module.active_adapters
        copies = children["modules_to_save"]
        if module.disable_adapters or not active or active[0] not in copies:
            return children["original_module"]
        return copies[active[0]]
    return children.get("_fsdp_wrapped_module", children.get("_orig_mod"))


def run_head(
    kind: str,
    head: Any,
    stock_forward: Any,
    hidden: Tensor,
    target: Tensor,
    settings: Settings,
    trials: Trials,
) -> HeadResult:
    """The loss of `head` on `hidden`, or its values per token, without its logits.

    Args:
        kind: What `kind_of` says of the head's class.
        head: The head, called from inside its forward.
        stock_forward: The forward of its class as it was before the swap.
        hidden: [..., hidden]; of a sharded model maybe a DTensor.
        target: [...], int64, shifted, on the device of `hidden`.
        settings: What is computed, and how.
        trials: Of heads that are not taken apart; a head of a new kind is added.

    Raises:
        UnsupportedModelError: If the weight is spread over ranks in another way than by rows, the
            head mixes tokens, a forward changes it, or the named engine cannot take it.
    """
    operands = _operands(kind, head, hidden)
    if operands is None:
        forward = functools.partial(stock_forward, head)
        return _run_in_chunks(head, forward, _full_hidden(hidden, head), target, settings, trials)
    weight = operands.pairs[0][1]
    operands = operands.plus_bias(settings.logit_bias)
    # A view, so that a target with other leading dimensions (logits_to_keep) keeps its own.
    pairs = [(x.reshape(*target.shape, x.shape[-1]), w) for x, w in operands.pairs]
    compiled = torch.compiler.is_compiling()
    with contextlib.nullcontext() if compiled else recording() as record:
        values = _of_operands(pairs, target, operands, settings)
    ranks = 1 if operands.group is None else operands.group.size()
    if record is None:
        return HeadResult(values, operands.vocab_size, weight.dtype, kind, ranks=ranks)
    dtype = ComputeMode.current(hidden.device.type).result_dtype(weight.dtype)
    ran = str(record.schedule or (_NO_VALUES if record.choice is None else _NO_LABELS))
    return HeadResult(values, operands.vocab_size, dtype, kind, ran, record.choice, ranks)


def _of_operands(
    pairs: list[tuple[Tensor, Tensor]], target: Tensor, head: LinearOperands, settings: Settings
) -> LossStats | TokenLogProbs:
    bias = head.bias
    if isinstance(settings, TokenSettings) and settings.in_float32:
        pairs = [(hidden.float(), weight.float()) for hidden, weight in pairs]
        bias = None if bias is None else bias.float()
    how: dict[str, Any] = {
        "linear_bias": bias,
        "impl": settings.impl,
        "memory_budget_mib": settings.memory_budget_mib,
        "process_group": head.group,
        "complete_hidden": head.complete_hidden,
    }
    options = settings.options
    if not isinstance(settings, TokenSettings):
        what = {"num_items": settings.num_items, "stats": settings.stats}
        return operand_cross_entropy(pairs, target, options, **what, **how)
    return operand_log_probs(
        pairs,
        target,
        temperature=settings.temperature,
        outputs=settings.outputs,
        logit_scale=options.logit_scale,
        softcap=options.softcap,
        ignore_index=options.ignore_index,
        **how,
    )


@torch.compiler.disable(
    reason="the head is not taken apart: its own forward runs on chunks of tokens, whose number "
    "depends on the labels; compile without fullgraph=True"
)
def _run_in_chunks(
    head: nn.Module,
    forward: HeadForward,
    hidden: Tensor,
    target: Tensor,
    settings: Settings,
    trials: Trials,
) -> HeadResult:
    obstacle = engine_obstacle(head, settings.impl)
    if obstacle is not None:
        raise UnsupportedModelError(f"{obstacle}, or leave this model stock (remove_patch)")
    if any(map(is_batched, (hidden, target, *head.parameters()))):
        raise NotImplementedError(
            f"the loss of a {stock_class(type(head)).__name__} head, whose own forward runs on "
            "chunks of tokens, must not run under torch.vmap: call the model for each part of the "
            "batch, or without the patch (remove_patch)"
        )
    if hidden.is_meta or isinstance(hidden, FakeTensor):
        raise UnsupportedModelError(
            f"a {type(head).__name__} head that is not taken apart must be run on tensors with "
            "values, got tensors of the meta device, FakeTensorMode or torch.export: its chunks "
            "depend on the labels; leave the model stock for that (remove_patch)"
        )
    kind = fingerprint(head)
    if kind not in trials and hidden.numel():
        trials[kind] = try_out(head, forward, hidden)
    before = buffer_versions(head)
    in_step = wrappers.gathers_by_parts(head)
    found = run_in_chunks(forward, hidden, target, settings, in_step)
    # The tokens of the trial may have been too few to show it.
    changed = written_since(before, head) - trials.get(kind, frozenset())
    if changed:
        raise keeps_state(head, sorted(changed))
    values, vocab_size, dtype, ran = found
    return HeadResult(values, vocab_size, dtype, MODULE, ran)


def _full_hidden(hidden: Any, head: nn.Module) -> Tensor:
    """Hidden states for a head whose own forward runs on a few tokens at a time."""
    if is_sharded(hidden):
        raise UnsupportedModelError(
            f"the hidden states of a {type(head).__name__} head that is not taken apart must be "
            f"whole on every rank, got a DTensor with {tuple(hidden.placements)}: gather them "
            "before the head, as a plain tensor, or leave the model stock (remove_patch)"
        )
    return whole_hidden(hidden)


def _operands(kind: str, head: Any, hidden: Tensor) -> LinearOperands | None:
    """The head as products, or None where only its own forward can tell."""
    if kind == LORA:
        return _lora_operands(head, whole_hidden(hidden))
    if kind in (LINEAR, CONV1D):
        return _linear_operands(kind, head, hidden)
    return None


def _linear_operands(kind: str, head: Any, hidden: Tensor) -> LinearOperands | None:
    weight, bias = head.weight, head.bias
    if is_dtensor(weight):
        rows = head_rows(hidden, weight, bias)
        if kind == CONV1D:
            raise UnsupportedModelError(
                "a Conv1D head must not be spread over ranks: leave it out of the plan or the "
                "model stock (remove_patch)"
            )
        pairs = [(rows.hidden, rows.weight)]
        return LinearOperands(pairs, rows.bias, weight.shape[0], rows.group, rows.complete_hidden)
    # A quantised weight is a tensor subclass or no float: only the layer knows how to use it.
    plain = type(weight) in (Tensor, nn.Parameter) or isinstance(weight, FakeTensor)
    if not plain or not weight.is_floating_point():
        return None
    if weight.dim() != 2:
        return None
    rows = weight.t() if kind == CONV1D else weight
    return LinearOperands([(whole_hidden(hidden), rows)], bias, rows.shape[0])


def _lora_operands(head: Any, hidden: Tensor) -> LinearOperands | None:
    """`base(x) + sum_a scale_a * B_a(A_a(dropout_a(x)))` as pairs, read as PEFT's forward does."""
    if head.disable_adapters and head.merged:
        head.unmerge()
    base = head.base_layer
    base_kind = base_kind_of(base)
    if base_kind is None or _is_watched(base):
        return None
    operands = _linear_operands(base_kind, base, hidden)
    if operands is None or head.disable_adapters or head.merged:
        return operands
    pairs, bias = list(operands.pairs), operands.bias
    adapted = hidden
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        second = head.lora_B[name]
        if name in head.lora_variant or base_kind_of(second) != LINEAR or _is_watched(second):
            return None
        adapted = head._cast_input_dtype(adapted, head.lora_A[name].weight.dtype)
        scaling = head.scaling[name]
        low_rank = head.lora_A[name](head.lora_dropout[name](adapted)) * scaling
        # PEFT keeps adapters in float32 beside a half precision base and rounds their sum to the
        # base's dtype; here the small factors are rounded, since all operands share one dtype.
        dtype = hidden.dtype
        pairs.append((low_rank.to(dtype), second.weight.to(dtype)))
        if second.bias is not None:
            extra = (second.bias * scaling).to(dtype)
            bias = extra if bias is None else bias + extra
    return operands._replace(pairs=pairs, bias=bias)


def base_kind_of(module: nn.Module) -> str | None:
    """LINEAR or CONV1D for layers whose weight may be read; None for others."""
    kind = kind_of(getattr(type(module), "_fused_base", type(module)))
    return kind if kind in (LINEAR, CONV1D) else None


def _is_watched(module: Any) -> bool:
    """Whether calling the module does more than its forward: hooks, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _loaded(module: str, name: str) -> Any:
    """A class of a library that is in use already; None where it was not imported."""
    return getattr(sys.modules.get(module), name, None)
