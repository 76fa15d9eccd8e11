"""Log-probabilities of a head's classes per token, for reinforcement learning and preferences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_fused_head.autocast import as_linear_takes
from hf_fused_head.candidates import candidate_products
from hf_fused_head.distributed.vocab_parallel import group_name, report_failure
from hf_fused_head.engines.protocol import Needs
from hf_fused_head.objective import Wanted
from hf_fused_head.ops import HeadArguments
from hf_fused_head.options import Impl, LogProbOptions, accumulation_dtype, plain_number
from hf_fused_head.planning.problem import budget_bytes
from hf_fused_head.row_autograd import needs_of, row_stats
from hf_fused_head.transforms import eager_in_transforms, in_transform, is_exporting
from hf_fused_head.validation import check_arguments, check_temperatures, has_candidates

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenLogProbs(NamedTuple):
    """What a head predicts at every token; a field that was not asked for is None.

    z are the logits after scale, softcap and division by the temperature, p = softmax(z). float32
    (float64 for float64 inputs); 0, or False, where no target counts.

    Attributes:
        log_probs: Shape of `target`, `z[target] - logsumexp(z)`; differentiable.
        entropy: [...], `-sum(p * log p)` in nats; differentiable.
        is_top1: Shape of `target`, bool, whether the target has the largest logit; of equal ones
            the first is the largest; the kernel of Hopper cards tells equal ones within a tile of
            128 classes not apart, and all of them are.
        mean_logits: [...], mean of z over the vocabulary.
        log_sum_sq_probs: [...], `log(sum(p**2))`.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logits: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


def token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    outputs: tuple[str, ...] = ("log_probs", "entropy"),
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: Impl = "auto",
    memory_budget_mib: float | None = None,
    process_group: ProcessGroup | None = None,
) -> TokenLogProbs:
    """Log-probability of `target` under a head, and entropy, without storing the logits.

    Equal, up to rounding, to::

        logits = logit_scale * F.linear(input, linear_weight, linear_bias).float()
        logits = softcap * tanh(logits / softcap)                     # unless softcap is None
        log_probs = (logits / temperature).log_softmax(-1)
        log_probs.gather(-1, target[..., None])[..., 0]

    Each field takes any upstream gradient. With "torch" and "triton" a log-probability is the same
    bit for bit with and without gradients, and whatever other tokens there are: the importance
    ratio of a policy to itself is exactly 1. The backward makes the logits again. Peak extra memory
    is `memory_budget_mib` plus O(tokens). First derivatives in reverse mode, and for one class a
    token in forward mode and under `torch.func` too.

    Args:
        input: Final hidden states, [..., hidden], float16, bfloat16, float32 or float64.
        linear_weight: Head matrix, [vocab, hidden], dtype and device of `input`.
        target: Class ids, [...], int64, already shifted; `ignore_index` marks tokens that do not
            count. Or [..., K], K candidates a token: each has its own upstream gradient, one that
            is `ignore_index` is 0, and a token counts if one of its candidates does. The backward
            then holds a second gradient of the weight's size for a while.
        temperature: What the logits are divided by: a positive number, or one for each token,
            [...], which gets no gradient.
        outputs: The fields to fill.
        linear_bias: Bias of the head, [vocab].
        logit_scale: Factor on the logits.
        softcap: Cap of the logits by `tanh`, before the temperature; None for none.
        ignore_index: The target of tokens that do not count.
        impl: "auto", "triton", "torch" or "reference".
        memory_budget_mib: Largest workspace beyond inputs, outputs and gradients; default 1024.
        process_group: The ranks that share the head, as in `linear_cross_entropy`.

    Raises:
        ValueError: If shapes disagree, an option is out of range or a target is no class.
        TypeError: If dtypes are wrong.
        NotImplementedError: As `linear_cross_entropy`; for candidates in forward mode, under
            `torch.func` and, with gradients, under `torch.export`.
        RuntimeError: If the ranks of `process_group` do not mean the same, or another one has
            raised one of the above.
    """
    return operand_log_probs(
        [(input, linear_weight)],
        target,
        temperature=temperature,
        outputs=outputs,
        linear_bias=linear_bias,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        impl=impl,
        memory_budget_mib=memory_budget_mib,
        process_group=process_group,
    )


@eager_in_transforms
def operand_log_probs(
    operands: Sequence[tuple[Tensor, Tensor]],
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    outputs: tuple[str, ...] = ("log_probs", "entropy"),
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    memory_budget_mib: float | None = None,
    process_group: ProcessGroup | None = None,
    complete_hidden: bool = True,
) -> TokenLogProbs:
    """`token_log_probs` of a head whose logits are a sum of products, as a LoRA head's are.

    Args:
        operands: Pairs `(X_i [..., H_i], W_i [V, H_i])`; logits are the sum of `X_i @ W_i.T`.
        target: Class ids, [...] or [..., K], int64.
        temperature: As in `token_log_probs`.
        outputs: The fields to fill.
        linear_bias: [V].
        logit_scale: Factor on the logits.
        softcap: Cap of the logits.
        ignore_index: The target of tokens that do not count.
        impl: Name of the engine, or "auto".
        memory_budget_mib: Largest workspace beyond inputs, outputs and gradients.
        process_group: The ranks that share the head; None for a head on one rank.
        complete_hidden: As in `operand_cross_entropy`.
    """
    group = group_name(process_group)
    pairs = [(as_linear_takes(hidden), as_linear_takes(weight)) for hidden, weight in operands]
    bias = as_linear_takes(linear_bias)
    memory_budget_mib = plain_number(memory_budget_mib)
    # The one other dtype of class ids that torch takes.
    target = target.long() if target.dtype == torch.uint8 else target
    try:
        options = LogProbOptions(
            *(None if isinstance(temperature, Tensor) else temperature, outputs),
            *(ignore_index, logit_scale, softcap),
        )
        several = has_candidates(target, pairs[0][0])
        first = target[..., 0] if several else target
        check_arguments(pairs, first, bias, None, None, memory_budget_mib, (), group != "")
        if isinstance(temperature, Tensor):
            check_temperatures(temperature, first)
    except (TypeError, ValueError, NotImplementedError):
        # The targets may be what is wrong; the head's rows lie where the group works.
        report_failure(group, pairs[0][1].device)
        raise
    inputs = [hidden.reshape(-1, hidden.shape[-1]) for hidden, _ in pairs]
    scale, cap = options.cooled()
    row_scale = None
    if isinstance(temperature, Tensor):
        dtype = accumulation_dtype(inputs[0].dtype)
        row_scale = temperature.detach().reshape(-1).to(dtype).reciprocal()
    candidates = None
    if several and target.shape[-1] > 1:
        candidates = target.reshape(-1, target.shape[-1])
    head = HeadArguments(
        *(inputs, [weight for _, weight in pairs], bias, None, row_scale, first),
        ignore_index=options.ignore_index,
        logit_scale=scale,
        softcap=cap,
        label_smoothing=0.0,
        impl=impl,
        budget_bytes=budget_bytes(memory_budget_mib),
        group=group,
        complete_hidden=complete_hidden,
        batch_invariant=True,
    )
    shape = target.shape[:-1] if several else target.shape
    fields = _fields(head, candidates, options.outputs)
    of_targets = ("log_probs", "is_top1")
    return TokenLogProbs(
        **{
            name: value.reshape(target.shape if name in of_targets else shape)
            for name, value in fields.items()
        }
    )


def _fields(
    head: HeadArguments, candidates: Tensor | None, outputs: tuple[str, ...]
) -> dict[str, Tensor]:
    """The fields that are asked for, [T] each, or [T, K] of K candidates a token."""
    # The mean of the logits is the log-sum-exp less the mean of minus the log-probabilities.
    wanted = Wanted(
        smooth="mean_logits" in outputs,
        entropy="entropy" in outputs,
        correct="is_top1" in outputs,
        log_sum_sq="log_sum_sq_probs" in outputs,
    )
    needs = needs_of(head)
    logits = None
    if candidates is not None:
        logits = _candidate_logits(head, candidates, needs)
        labels = _likeliest(logits.detach(), candidates, head.ignore_index)
        head = head._replace(labels=labels)
    rows = row_stats(head, wanted, needs)

    def log_probs() -> Tensor:
        if candidates is None or logits is None:
            return 0.0 - rows.nll
        # The likeliest one, which may be nearly certain, keeps its digits.
        others = logits - rows.lse[:, None]
        found = torch.where(candidates == head.labels[:, None], -rows.nll[:, None], others)
        return torch.where(candidates != head.ignore_index, found, 0.0)

    def is_top1() -> Tensor:
        if candidates is None:
            return rows.correct
        return rows.correct[:, None] & (candidates == head.labels[:, None])

    made = {
        "log_probs": log_probs,
        "entropy": lambda: rows.entropy,
        "is_top1": is_top1,
        "mean_logits": lambda: (rows.lse - rows.smooth).detach(),
        "log_sum_sq_probs": lambda: rows.log_sum_sq,
    }
    return {name: make() for name, make in made.items() if name in outputs}


def _candidate_logits(head: HeadArguments, candidates: Tensor, needs: Needs) -> Tensor:
    """Logits of the candidates, [T, K], with their gradients."""
    if needs.any() and (in_transform() or is_exporting()):
        raise NotImplementedError(
            "`target` must have one class a token in transforms of torch.func, in forward mode and "
            "under torch.export with gradients, got candidates of shape "
            f"{tuple(candidates.shape)}: use torch.autograd, or one call for each candidate"
        )
    logits = candidate_products(head._replace(labels=candidates, row_scale=None), needs)
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits if head.row_scale is None else logits * head.row_scale[:, None]


def _likeliest(logits: Tensor, candidates: Tensor, ignore_index: int) -> Tensor:
    """The candidate with the largest logit of every token, [T].

    Of equal ones it is the first class; `ignore_index` where no candidate counts.
    """
    valid = candidates != ignore_index
    known = logits.nan_to_num(nan=-torch.inf).masked_fill(~valid, -torch.inf)
    largest = valid & (known == known.amax(dim=1, keepdim=True))
    classes = torch.where(largest, candidates, torch.iinfo(candidates.dtype).max).amin(dim=1)
    return torch.where(valid.any(dim=1), classes, ignore_index)
