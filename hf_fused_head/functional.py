"""The public functions: validation and autocast around an objective and an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_fused_head import ops
from hf_fused_head.autocast import as_linear_takes
from hf_fused_head.autograd import FinishedLoss, TransformedLoss
from hf_fused_head.distributed.vocab_parallel import group_name, report_failure
from hf_fused_head.flops import register_formulas
from hf_fused_head.objective import Objective, RowStats, Wanted
from hf_fused_head.ops import HeadArguments
from hf_fused_head.options import (
    STAT_NAMES,
    Impl,
    LossOptions,
    Reduction,
    accumulation_dtype,
    item_count,
    plain_number,
)
from hf_fused_head.planning.problem import budget_bytes
from hf_fused_head.row_autograd import needs_of, row_stats
from hf_fused_head.transforms import eager_in_transforms, in_transform, is_exporting
from hf_fused_head.validation import check_arguments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LossStats(NamedTuple):
    """A loss and what came with it; only `loss` is differentiable.

    Attributes:
        loss: Scalar, or [...] with `reduction="none"`.
        nll: [...], minus the log-probability of the target; 0 where ignored.
        lse: [...], log-sum-exp of the logits; 0 where ignored.
        entropy: [...], entropy of the prediction in nats; None when not asked for.
        correct: [...], whether the target has the largest logit; None when not asked for.
        num_valid: 0-d int64, the number of tokens that count.
    """

    loss: Tensor
    nll: Tensor
    lse: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    num_valid: Tensor


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    num_items: int | Tensor | None = None,
    impl: Impl = "auto",
    memory_budget_mib: float | None = None,
    process_group: ProcessGroup | None = None,
    options: None = None,
) -> Tensor:
    """Cross-entropy of `input @ linear_weight.T` against `target`, without storing the logits.

    Equal, up to rounding, to::

        logits = logit_scale * F.linear(input, linear_weight, linear_bias).float()
        logits = softcap * tanh(logits / softcap)                     # unless softcap is None
        loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), weight, ...)
        loss = loss + z_loss * logsumexp(logits)**2                   # reduced like the loss

    Peak extra memory is `memory_budget_mib` plus O(tokens); products accumulate in float32. First
    derivatives in reverse and forward mode, under the transforms of `torch.func` too, where
    `torch.vmap` makes one call for each part of the batch; a second derivative raises.

    Args:
        input: Final hidden states, [..., hidden], float16, bfloat16, float32 or float64.
        linear_weight: Head matrix, [vocab, hidden], dtype and device of `input`.
        target: Class ids, [...], int64 (uint8 is taken too), already shifted; `ignore_index` marks
            tokens without loss.
        linear_bias: Bias of the head, [vocab].
        weight: Weight of each class in the cross-entropy, [vocab]; not differentiable.
        reduction: "mean", "sum", or "none" for one loss per token.
        ignore_index: The label of tokens without loss; None means -100, as in torch.
        label_smoothing: Share of the target that is spread over the vocabulary, 0 to 1.
        logit_scale: Factor on the logits.
        softcap: Cap of the logits by `tanh`; None for none.
        z_loss: Factor on the squared log-sum-exp of valid tokens; class weights do not touch it.
        num_items: With "mean", what the sum is divided by instead of the valid count.
        impl: "auto", "triton", "torch" or "reference".
        memory_budget_mib: Largest workspace beyond inputs, outputs and gradients; default 1024.
        process_group: The ranks that share the head, in the order of their rows: `linear_weight`
            and `linear_bias` are this rank's rows, as many as it has; `input`, `target` and
            `weight` are whole and the same on every rank. So are the loss and the gradient of
            `input`; those of the head's rows stay with their rank.
        options: None; torch's chunking options are refused, `memory_budget_mib` is ours.

    Returns:
        Scalar float32; [...] float32 with `reduction="none"` (float64 for float64 inputs).

    Raises:
        ValueError: If shapes disagree, an option is out of range or a label is no class.
        TypeError: If dtypes are wrong.
        NotImplementedError: If the named `impl` does not support the inputs; for class
            probabilities, K-dimensional heads and torch's chunking options; with `process_group` in
            forward mode or while a CUDA graph is captured; where a second derivative is taken.
        RuntimeError: If the ranks of `process_group` do not mean the same loss, or another one has
            raised one of the above.

    References:
        Dong and Chang, "From Projection to Prediction", arXiv:2511.17599.
    """
    values = reduction, ignore_index, label_smoothing, logit_scale, softcap, z_loss
    return operand_cross_entropy(
        [(input, linear_weight)],
        target,
        _options(process_group, linear_weight, options, *values),
        linear_bias=linear_bias,
        weight=weight,
        num_items=num_items,
        impl=impl,
        memory_budget_mib=memory_budget_mib,
        process_group=process_group,
    ).loss


def linear_cross_entropy_with_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    num_items: int | Tensor | None = None,
    impl: Impl = "auto",
    memory_budget_mib: float | None = None,
    process_group: ProcessGroup | None = None,
    options: None = None,
) -> LossStats:
    """`linear_cross_entropy` together with statistics of every token.

    Takes the arguments of `linear_cross_entropy` and returns its result as `.loss`, beside the
    loss, log-sum-exp, entropy and correctness of each token and the number of tokens that count.
    """
    values = reduction, ignore_index, label_smoothing, logit_scale, softcap, z_loss
    return operand_cross_entropy(
        [(input, linear_weight)],
        target,
        _options(process_group, linear_weight, options, *values),
        linear_bias=linear_bias,
        weight=weight,
        num_items=num_items,
        impl=impl,
        memory_budget_mib=memory_budget_mib,
        process_group=process_group,
        stats=STAT_NAMES,
    )


@eager_in_transforms
def operand_cross_entropy(
    operands: Sequence[tuple[Tensor, Tensor]],
    target: Tensor,
    options: LossOptions,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    impl: str = "auto",
    memory_budget_mib: float | None = None,
    process_group: ProcessGroup | None = None,
    complete_hidden: bool = True,
    stats: tuple[str, ...] = (),
) -> LossStats:
    """The loss of a head whose logits are a sum of products, as a LoRA head's are.

    Args:
        operands: Pairs `(X_i [..., H_i], W_i [V, H_i])`; logits are the sum of `X_i @ W_i.T`.
        target: Class ids, [...], int64.
        options: What the loss is.
        linear_bias: [V].
        weight: Class weights, [V].
        num_items: With reduction "mean", what the sum is divided by.
        impl: Name of the engine, or "auto".
        memory_budget_mib: Largest workspace beyond inputs, outputs and gradients.
        process_group: The ranks that share the head; None for a head on one rank.
        complete_hidden: With a group, sum the gradients of all X_i over its ranks. False leaves
            each rank's part, in the dtype of X_i, to a caller who sums and scatters at once.
        stats: Which of "accuracy" (the field `correct`) and "entropy" to fill.
    """
    if not operands:
        raise ValueError("`operands` must hold at least one pair, got (): pass (input, weight)")
    group = group_name(process_group)
    pairs = [(as_linear_takes(hidden), as_linear_takes(weight)) for hidden, weight in operands]
    bias = as_linear_takes(linear_bias)
    num_items, memory_budget_mib = item_count(num_items), plain_number(memory_budget_mib)
    # The one other dtype of class ids that torch takes.
    target = target.long() if target.dtype == torch.uint8 else target
    try:
        check_arguments(
            pairs, target, bias, weight, num_items, memory_budget_mib, stats, group != ""
        )
    except (TypeError, ValueError, NotImplementedError):
        # The labels may be what is wrong; the head's rows lie where the group works.
        report_failure(group, pairs[0][1].device)
        raise
    inputs = [hidden.reshape(-1, hidden.shape[-1]) for hidden, _ in pairs]
    weights = [matrix for _, matrix in pairs]
    dtype = accumulation_dtype(inputs[0].dtype)
    class_weight = None if weight is None else weight.detach().to(dtype)
    objective = Objective.of(options, target.reshape(-1), class_weight, num_items, dtype)
    wanted = Wanted(options.label_smoothing > 0, "entropy" in stats, "accuracy" in stats)
    head = HeadArguments(
        *(inputs, weights, bias, class_weight, None, target),
        ignore_index=options.ignore_index,
        logit_scale=float(options.logit_scale),
        softcap=None if options.softcap is None else float(options.softcap),
        label_smoothing=float(options.label_smoothing),
        impl=impl,
        budget_bytes=budget_bytes(memory_budget_mib),
        group=group,
        complete_hidden=complete_hidden,
        batch_invariant=False,
    )
    loss, rows = _loss_and_rows(head, objective, wanted)
    if options.reduction == "none":
        loss = loss.reshape(target.shape)
    nll, lse, entropy, correct = (
        rows.nll.detach(),
        rows.lse.detach(),
        rows.entropy.detach(),
        rows.correct.detach(),
    )
    return LossStats(
        loss=loss,
        nll=nll.reshape(target.shape),
        lse=lse.reshape(target.shape),
        entropy=entropy.reshape(target.shape) if wanted.entropy else None,
        correct=correct.reshape(target.shape) if wanted.correct else None,
        num_valid=objective.num_valid,
    )


def _loss_and_rows(
    head: HeadArguments, objective: Objective, wanted: Wanted
) -> tuple[Tensor, RowStats]:
    """The loss, connected to what is differentiated, and the statistics of its rows."""
    needs = needs_of(head)
    if not needs.any() or is_exporting() or objective.options.reduction == "none":
        rows = row_stats(head, wanted, needs)
        return objective.reduce(*rows[:3]), rows
    register_formulas()
    rows, grads = ops.stats_and_grads(head.detached(), objective.row_weights(), needs, wanted)
    loss = objective.reduce(*rows[:3])
    parameters = [*head.inputs, *head.weights, *([] if head.bias is None else [head.bias])]
    needed = (*needs.inputs, *needs.weights, *([] if head.bias is None else [needs.bias]))
    finished = [grads[index] for index, need in enumerate(needed) if need]
    apply = TransformedLoss.apply if in_transform() else FinishedLoss.apply
    loss, _ = apply(loss, needed, head.group != "", *parameters, *finished)
    return loss, rows


def _options(
    process_group: ProcessGroup | None, linear_weight: Tensor, chunking: None, *values: Any
) -> LossOptions:
    """The options; where they are out of range the other ranks of a group hear of it."""
    try:
        if chunking is not None:
            raise NotImplementedError(
                f"`options` must be None, got {chunking!r}: the fused loss plans its own chunks, "
                "bound them by memory_budget_mib"
            )
        return LossOptions(*values)
    except (TypeError, ValueError, NotImplementedError):
        report_failure(group_name(process_group), linear_weight.device)
        raise
