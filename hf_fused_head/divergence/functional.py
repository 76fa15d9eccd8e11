"""The public functions of two heads: validation and autocast around an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from hf_fused_head.autocast import as_linear_takes
from hf_fused_head.autograd import FinishedLoss
from hf_fused_head.distributed.vocab_parallel import group_name, report_failure
from hf_fused_head.divergence import ops
from hf_fused_head.divergence.autograd import TokenDivergences
from hf_fused_head.divergence.ops import PairArguments, Upstream
from hf_fused_head.divergence.reduction import item_sum, reduced, row_weights
from hf_fused_head.divergence.validation import check_impl, check_pair, refuse_transforms
from hf_fused_head.engines.protocol import DivergenceNeeds
from hf_fused_head.options import DivergenceOptions, Impl, Reduction, item_count, plain_number
from hf_fused_head.planning.problem import budget_bytes
from hf_fused_head.transforms import is_differentiated, is_exporting
from hf_fused_head.validation import check_memory_budget, check_num_items

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KLStats(NamedTuple):
    """A divergence and what came with it; only `loss` is differentiable.

    Attributes:
        loss: Scalar, or [...] with `reduction="none"`.
        kl: [...], the divergence of every token; 0 where masked.
        student_entropy: [...], entropy of the student's prediction at the temperature, in nats; 0
            where masked.
    """

    loss: Tensor
    kl: Tensor
    student_entropy: Tensor


def linear_kl_div(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 0.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    impl: Impl = "auto",
    memory_budget_mib: float | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Divergence of a student's head from a teacher's, without storing the logits of either.

    Equal, up to rounding, to::

        logits = student_logit_scale * F.linear(student, student_weight, student_bias).float()
        logits = student_softcap * tanh(logits / student_softcap)        # unless it is None
        log_p = (logits / temperature).log_softmax(-1)
        log_q = ...                                                      # the same of the teacher
        F.kl_div(log_p, log_q, log_target=True, ...)                     # KL(q || p), with beta=0

    summed over classes, and reduced over tokens. `beta=1` is KL(p || q); between them it is
    `beta KL(q || m) + (1 - beta) KL(p || m)` with `m = beta q + (1 - beta) p`. No factor of the
    squared temperature is applied. Nearly equal heads keep their digits.

    With `s` the derivative of the divergence with respect to `log p`, class by class, the gradient
    of the student's logits is `s_k - p_k sum_j s_j`, where `s_j` is `p_j - q_j` (`beta=0`),
    `p_j log(p_j / q_j)` (`beta=1`) or `(1 - beta) p_j log(p_j / m_j)`. The teacher gets no
    gradient. First derivatives in reverse mode.

    Peak extra memory is `memory_budget_mib` plus O(tokens). Chunks of tokens hold whole rows of
    both heads, and a 16-bit student's weight gradient is summed in float32 over them: a budget
    below that sum is raised to it. `reduction="none"` computes the logits of both heads again in
    the backward.

    Args:
        student: Final hidden states of the student, [..., hidden], float16, bfloat16, float32 or
            float64.
        student_weight: Head matrix of the student, [vocab, hidden], dtype and device of `student`.
        teacher: Final hidden states of the teacher at the same tokens, [..., teacher_hidden]; its
            dtype may be another.
        teacher_weight: Head matrix of the teacher, [vocab, teacher_hidden], dtype of `teacher`.
        temperature: What both heads' logits are divided by.
        beta: Which divergence, 0 to 1.
        mask: Tokens that count, [...], bool; None for all.
        reduction: "mean", "sum", or "none" for one divergence per token.
        num_items: With "mean", what the sum is divided by instead of the tokens that count.
        student_bias: Bias of the student's head, [vocab].
        student_logit_scale: Factor on the student's logits.
        student_softcap: Cap of the student's logits by `tanh`; None for none.
        teacher_bias: Bias of the teacher's head, [vocab].
        teacher_logit_scale: Factor on the teacher's logits.
        teacher_softcap: Cap of the teacher's logits by `tanh`; None for none.
        impl: "auto", "torch" or "reference"; "auto" means "torch".
        memory_budget_mib: Largest workspace beyond inputs, outputs and gradients; default 1024.
        process_group: The ranks that share both heads, in the order of their rows: the weights and
            biases are this rank's rows, the same classes of both heads; hidden states and `mask`
            are whole and the same on every rank. So are the divergence and the gradient of
            `student`; those of the head's rows stay with their rank.

    Returns:
        Scalar float32; [...] float32 with `reduction="none"` (float64 if either head is). A mean
        over no token is nan without `num_items`.

    Raises:
        ValueError: If shapes disagree or an option is out of range.
        TypeError: If dtypes are wrong.
        NotImplementedError: For `impl="triton"`; inside transforms of torch.func, with dual
            tensors, with gradients under torch.export, and where a second derivative is taken.
        RuntimeError: If the ranks of `process_group` do not mean the same divergence, or another
            one has raised one of the above.

    References:
        Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649.
    """
    head_options = student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap
    return _divergence(
        (student, student_weight, student_bias),
        (teacher, teacher_weight, teacher_bias),
        mask,
        *(temperature, beta, reduction, *head_options),
        num_items=num_items,
        impl=impl,
        memory_budget_mib=memory_budget_mib,
        process_group=process_group,
    )[0]


def linear_kl_div_with_stats(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 0.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    impl: Impl = "auto",
    memory_budget_mib: float | None = None,
    process_group: ProcessGroup | None = None,
) -> KLStats:
    """`linear_kl_div` together with statistics of every token.

    Takes the arguments of `linear_kl_div` and returns its result as `.loss`, beside the divergence
    of each token and the entropy of the student's prediction there.
    """
    head_options = student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap
    loss, per_token, entropy = _divergence(
        (student, student_weight, student_bias),
        (teacher, teacher_weight, teacher_bias),
        mask,
        *(temperature, beta, reduction, *head_options),
        num_items=num_items,
        impl=impl,
        memory_budget_mib=memory_budget_mib,
        process_group=process_group,
        entropy=True,
    )
    shape = student.shape[:-1]
    return KLStats(loss, per_token.detach().reshape(shape), entropy.reshape(shape))


def _divergence(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    mask: Tensor | None,
    *values: Any,
    num_items: int | Tensor | None,
    impl: str,
    memory_budget_mib: float | None,
    process_group: ProcessGroup | None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the divergence per token and the student's entropy ([0] unless wanted).

    `values` are those of `DivergenceOptions`: where they are out of range, the other ranks of a
    group raise too.
    """
    group = group_name(process_group)
    num_items, memory_budget_mib = item_count(num_items), plain_number(memory_budget_mib)
    student, teacher = _as_linear_takes(student), _as_linear_takes(teacher)
    try:
        options = DivergenceOptions(*values)
        refuse_transforms("linear_kl_div")
        impl = check_impl(impl)
        check_pair(student, teacher, mask)
        check_num_items(num_items)
        check_memory_budget(memory_budget_mib)
    except (TypeError, ValueError, NotImplementedError):
        # The hidden states may be what is wrong; the head's rows lie where the group works.
        report_failure(group, student[1].device)
        raise
    shape = student[0].shape[:-1]
    tensors = (
        *(student[0].reshape(-1, student[0].shape[-1]), *student[1:]),
        *(teacher[0].detach().reshape(-1, teacher[0].shape[-1]), teacher[1].detach()),
        None if teacher[2] is None else teacher[2].detach(),
        None if mask is None else mask.reshape(-1),
    )
    config = (
        *(float(options.beta), *options.student(), *options.teacher()),
        *(impl, budget_bytes(memory_budget_mib), group),
    )
    pair = PairArguments(*tensors, *config)
    items = item_sum(options.reduction, pair.student.shape[0], pair.mask, num_items)
    loss, per_token, entropies = _connected(pair, options.reduction, items, entropy)
    return loss.reshape(shape if options.reduction == "none" else ()), per_token, entropies


def _connected(
    pair: PairArguments, reduction: str, items: int | Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, connected to what is differentiated, and the statistics of its tokens, [T]."""
    parameters = [t for t in pair[:3] if t is not None]
    needed = tuple(is_differentiated(parameter) for parameter in parameters)
    bias_needed = pair.student_bias is not None and needed[-1]
    needs = DivergenceNeeds(needed[0], needed[1], bias_needed, entropy)
    if any(needed) and is_exporting():
        raise NotImplementedError(
            "`student` must not require grad under torch.export, got a divergence with gradients: "
            "export the model without its loss, or under torch.no_grad()"
        )
    if any(needed) and reduction == "none":
        per_token, entropies = TokenDivergences.apply(needs, tuple(pair[7:]), *pair[:7])
        return per_token, per_token, entropies
    detached = pair._replace(
        student=pair.student.detach(),
        student_weight=pair.student_weight.detach(),
        student_bias=None if pair.student_bias is None else pair.student_bias.detach(),
    )
    num_weights = pair.student.shape[0] if any(needed) else 0
    weights = row_weights(pair.student.new_empty(num_weights, dtype=pair.dtype), items)
    per_token, entropies, grads = ops.divergence(detached, Upstream(weights, True), needs)
    loss = reduced(per_token, reduction, items)
    if any(needed):
        finished = [grad for grad, need in zip(grads, needs[:3], strict=True) if need]
        loss, _ = FinishedLoss.apply(loss, needed, pair.group != "", *parameters, *finished)
    return loss, per_token, entropies


def _as_linear_takes(
    head: tuple[Tensor, Tensor, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias under the caller's autocast."""
    hidden, weight, bias = head
    return as_linear_takes(hidden), as_linear_takes(weight), as_linear_takes(bias)
