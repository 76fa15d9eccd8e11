"""The public functions: validation, autocast, denominators and reduction around an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_fused_head import ops
from hf_fused_head.arguments import check_arguments
from hf_fused_head.autograd import (
    FinishedLoss,
    RowLosses,
    TransformedLoss,
    TransformedRowLosses,
)
from hf_fused_head.distributed.vocab_parallel import group_name, report_failure
from hf_fused_head.options import (
    STAT_NAMES,
    Choice,
    Impl,
    LossOptions,
    Reduction,
    accumulation_dtype,
    item_count,
    plain_number,
    resolve_impl,
)
from hf_fused_head.schedule import DEFAULT_MEMORY_BUDGET_MIB
from hf_fused_head.transforms import eager_in_transforms, in_transform, is_differentiated

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
        NotImplementedError: If the named `impl` does not support the inputs, with `process_group`
            in forward mode or while a CUDA graph is captured; where a second derivative is taken.
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
    pairs, bias = _autocast(list(operands), linear_bias)
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
    call = _Call(
        inputs,
        weights,
        bias,
        class_weight,
        target,
        options,
        impl,
        memory_budget_mib,
        group,
        complete_hidden,
    )
    valid = target.reshape(-1) != options.ignore_index
    num_valid = valid.sum()
    ce_weight = _target_weight(class_weight, target.reshape(-1), valid, dtype)
    ce_items, z_items = _denominators(options, num_items, num_valid, class_weight, ce_weight)
    loss, rows = call.run(ce_weight, ce_items, z_items, "entropy" in stats, "accuracy" in stats)
    nll, lse, _, entropy, correct = (value.detach() for value in rows[:5])
    return LossStats(
        loss=loss,
        nll=nll.reshape(target.shape),
        lse=lse.reshape(target.shape),
        entropy=entropy.reshape(target.shape) if "entropy" in stats else None,
        correct=correct.reshape(target.shape) if "accuracy" in stats else None,
        num_valid=num_valid,
    )


def explain(impl: str, device: torch.device | str, dtype: torch.dtype) -> Choice:
    """What `impl` means for such tensors, and why."""
    return resolve_impl(impl, device, dtype)


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


class _Call(NamedTuple):
    """One loss on its way to an engine: flattened, checked, in one dtype."""

    inputs: list[Tensor]
    weights: list[Tensor]
    bias: Tensor | None
    class_weight: Tensor | None
    target: Tensor
    options: LossOptions
    impl: str
    memory_budget_mib: float | None
    group: str
    complete_hidden: bool

    def run(
        self,
        ce_weight: Tensor,
        ce_items: int | Tensor,
        z_items: int | Tensor,
        want_entropy: bool,
        want_correct: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the rows of statistics, [N] each."""
        transformed = in_transform()
        parameters = [*self.inputs, *self.weights]
        if self.bias is not None:
            parameters.append(self.bias)
        needed = tuple(is_differentiated(parameter) for parameter in parameters)
        smooth = self.options.label_smoothing > 0
        wanted = (smooth, want_entropy, want_correct)
        if not any(needed):
            rows = ops.row_stats(*self._detached(), *self._config(), *wanted)
            return self._reduce(rows, ce_weight, ce_items, z_items), rows
        pairs, bias_needed = len(self.inputs), self.bias is not None and needed[-1]
        needs = list(needed[:pairs]), list(needed[pairs : 2 * pairs]), bias_needed
        if self.options.reduction == "none":
            apply = TransformedRowLosses.apply if transformed else RowLosses.apply
            optional = self.class_weight, self.bias
            operands = self.target, *optional, *self.inputs, *self.weights
            rows = apply(self._config(), wanted, needs, *operands)
            return self._reduce(rows, ce_weight, ce_items, z_items), rows
        *rows, grads = ops.stats_and_grads(
            *self._detached(),
            *self._config(),
            *self._row_weights(ce_weight, ce_items, z_items),
            *needs,
            want_entropy,
            want_correct,
            float(self.options.label_smoothing),
        )
        loss = self._reduce(rows, ce_weight, ce_items, z_items)
        finished = [grad for grad, need in zip(grads, needed, strict=False) if need]
        apply = TransformedLoss.apply if transformed else FinishedLoss.apply
        loss, _ = apply(loss, needed, self.group != "", *parameters, *finished)
        return loss, tuple(rows)

    def _detached(self) -> tuple:
        """The tensors that an operator takes; gradients are ours to attach, not autograd's."""
        inputs = [hidden.detach() for hidden in self.inputs]
        weights = [weight.detach() for weight in self.weights]
        bias = None if self.bias is None else self.bias.detach()
        return inputs, weights, bias, self.class_weight, self.target

    def _config(self) -> tuple:
        """The plain values that every operator takes after the tensors."""
        options = self.options
        mib = self.memory_budget_mib
        budget_bytes = int((DEFAULT_MEMORY_BUDGET_MIB if mib is None else mib) * 2**20)
        softcap = None if options.softcap is None else float(options.softcap)
        plain = options.ignore_index, float(options.logit_scale), softcap, self.impl, budget_bytes
        return *plain, self.group, self.complete_hidden

    def _row_weights(
        self, ce_weight: Tensor, ce_items: int | Tensor, z_items: int | Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What nll, smooth and squared lse of each token count in the scalar loss, [N] each."""
        eps, z_loss = self.options.label_smoothing, self.options.z_loss
        ones = torch.ones_like(ce_weight)
        nll_weight = (1 - eps) * ce_weight / ce_items
        smooth_weight = eps * ones / ce_items if eps > 0 else None
        z_weight = z_loss * ones / z_items if z_loss > 0 else None
        return nll_weight, smooth_weight, z_weight

    def _reduce(
        self,
        rows: Sequence[Tensor],
        ce_weight: Tensor,
        ce_items: int | Tensor,
        z_items: int | Tensor,
    ) -> Tensor:
        nll, lse, smooth = rows[:3]
        eps, z_loss = self.options.label_smoothing, self.options.z_loss
        per_token = (1 - eps) * ce_weight * nll
        if eps > 0:
            per_token = per_token + eps * smooth
        squared = z_loss * lse * lse
        if self.options.reduction == "none":
            per_token = per_token + squared if z_loss > 0 else per_token
            return per_token.reshape(self.target.shape)
        loss = per_token.sum() / ce_items
        return loss + squared.sum() / z_items if z_loss > 0 else loss


def _autocast(
    pairs: list[tuple[Tensor, Tensor]], bias: Tensor | None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """The operands as `F.linear` would see them under the caller's autocast."""
    device_type = pairs[0][0].device.type
    if not torch.is_autocast_enabled(device_type):
        return pairs, bias
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    cast_pairs = [(cast(hidden), cast(weight)) for hidden, weight in pairs]
    return cast_pairs, None if bias is None else cast(bias)


def _target_weight(
    class_weight: Tensor | None, labels: Tensor, valid: Tensor, dtype: torch.dtype
) -> Tensor:
    """The class weight of every token's target, [N]; 0 where ignored, 1 without class weights."""
    if class_weight is None:
        return valid.to(dtype)
    # A label out of range must reach the operator, which names it.
    known = labels.clamp(0, class_weight.shape[0] - 1)
    return torch.where(valid, class_weight[known], 0.0)


def _denominators(
    options: LossOptions,
    num_items: int | Tensor | None,
    num_valid: Tensor,
    class_weight: Tensor | None,
    ce_weight: Tensor,
) -> tuple[int | Tensor, int | Tensor]:
    """What the sums of the cross-entropy and of the z-loss are divided by."""
    if options.reduction != "mean":
        return 1, 1
    if isinstance(num_items, Tensor):
        items = num_items.detach().reshape(()).to(ce_weight.device)
        return items, items
    if num_items is not None:
        return num_items, num_items
    return num_valid if class_weight is None else ce_weight.sum(), num_valid
