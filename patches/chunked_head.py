"""A head that cannot be taken apart: its own forward, on a few tokens at a time.

DoRA, trainable tokens, quantised layers and modules of the user know themselves how their logits
come about. Each chunk's logits live until its losses, or its values per token, are out and come
again in the backward (checkpointing), so no more than the memory budget is taken, and autograd
finds every parameter that the module uses, wherever it is kept. The chunks' gradients of a
parameter are summed in float32 beyond that budget, where the parameter is of lower precision. Where
parts of the module are gathered from other processes in forwards of their own, all processes run as
many chunks as the one with most tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_fused_head.functional import LossStats
from hf_fused_head.log_probs import TokenLogProbs
from hf_fused_head.planning.problem import DEFAULT_MEMORY_BUDGET_MIB
from hf_fused_head.transforms import in_transform

from .errors import UnsupportedModelError
from .gradient_sums import Term, next_operation, sum_in_float32
from .settings import LossSettings, Settings, TokenSettings

# Logits, their float32 copy, its log-softmax and the gradient of it live at the same time.
_COPIES_OF_A_CHUNK = 4
_FLOAT_BYTES = 4
# Those without a gradient.
_DETACHED = ("is_top1", "mean_logits", "log_sum_sq_probs")

HeadForward = Callable[[Tensor], Tensor]
Scatter = Callable[[Sequence[Tensor]], Tensor]


def run_in_chunks(
    head_forward: HeadForward,
    hidden: Tensor,
    target: Tensor,
    settings: Settings,
    in_step: bool = False,
) -> tuple[LossStats | TokenLogProbs, int, torch.dtype, str]:
    """What is computed, vocabulary size and dtype of the logits, and how it ran, for people.

    Args:
        head_forward: `[N, hidden] -> [N, vocab]`, each row for itself.
        hidden: [..., hidden].
        target: [...], int64, as many as hidden states.
        settings: What is computed; its float operations are float32. The reference takes all tokens
            at once, whatever the budget.
        in_step: All processes call the head equally often; costs one all-reduce of a number.

    Raises:
        UnsupportedModelError: If the head returns no row of logits for each token.
        ValueError: If a label is no class.
    """
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    keep = labels != settings.options.ignore_index
    rows = keep.nonzero()[:, 0]
    chunks = _run_chunks(head_forward, flat, labels, rows, settings, in_step)

    def scattered(values: Sequence[Tensor]) -> Tensor:
        """[..., those of one token] from the values of all chunks, 0 where ignored."""
        joined = torch.cat(list(values))
        whole = joined.new_zeros((labels.numel(), *joined.shape[1:])).index_copy(0, rows, joined)
        return whole.reshape(*target.shape, *joined.shape[1:])

    values: LossStats | TokenLogProbs
    if isinstance(settings, TokenSettings):
        values = _token_log_probs(chunks, scattered, settings.outputs)
    else:
        values = _loss_stats(chunks, scattered, keep.sum(), settings)
    return values, chunks[0].vocab_size, chunks[0].dtype, _describe(chunks, settings.impl)


def _loss_stats(
    chunks: list[_Chunk], scattered: Scatter, num_valid: Tensor, settings: LossSettings
) -> LossStats:
    total = torch.stack([chunk.term.value for chunk in chunks]).sum()
    sum_in_float32(total, [chunk.term for chunk in chunks])
    items = num_valid if settings.num_items is None else settings.num_items
    if isinstance(items, Tensor):
        items = items.reshape(()).to(total.device)
    nll, lse, entropy, correct = map(scattered, zip(*(c.rows for c in chunks), strict=True))
    return LossStats(
        loss=total / items,
        nll=nll,
        lse=lse,
        entropy=entropy if "entropy" in settings.stats else None,
        correct=correct if "accuracy" in settings.stats else None,
        num_valid=num_valid,
    )


def _token_log_probs(
    chunks: list[_Chunk], scattered: Scatter, outputs: tuple[str, ...]
) -> TokenLogProbs:
    terms = [chunk.term for chunk in chunks]
    packed = torch.cat([term.value for term in terms])
    sum_in_float32(packed, terms)
    log_probs, entropy = scattered([packed]).unbind(-1)
    names = [name for name in _DETACHED if name in outputs]
    detached = map(scattered, zip(*(chunk.rows for chunk in chunks), strict=True))
    fields: dict[str, Tensor | None] = dict.fromkeys(TokenLogProbs._fields)
    fields.update(zip(names, detached, strict=True))
    if "log_probs" in outputs:
        fields["log_probs"] = log_probs
    if "entropy" in outputs:
        fields["entropy"] = entropy
    return TokenLogProbs(**fields)


def _run_chunks(
    head_forward: HeadForward,
    flat: Tensor,
    labels: Tensor,
    rows: Tensor,
    settings: Settings,
    in_step: bool,
) -> list[_Chunk]:
    # One gather and one split: their backward writes the gradient of all hidden states once,
    # while a gather for each chunk would write all of them for each.
    hidden, targets, spare = flat.index_select(0, rows), labels[rows], flat[:1]

    def run(some: Tensor, targets: Tensor) -> _Chunk:
        # Each chunk gets a node of its own, since FSDP waits for the gradient of a module's input
        # to free its weights: that of the split comes only after all chunks.
        return _Chunk.run(head_forward, some.view_as(some), targets, settings)

    def idle() -> _Chunk:
        """Counts nothing, yet is connected to what the values would depend on."""
        return run(spare, labels[:1] * 0).without_effect()

    # The first chunk, one row, shows the size of the vocabulary and the dtype.
    begin = rows.numel() if settings.impl == "reference" else 1
    first = run(hidden[:begin], targets[:begin]) if rows.numel() else idle()
    size = chunk_tokens(first.vocab_size, settings.memory_budget_mib)
    pieces = zip(hidden[begin:].split(size), targets[begin:].split(size), strict=True)
    rest = [piece for piece in pieces if piece[1].numel()]
    idle_calls = _most_over_processes(len(rest), flat.device) - len(rest) if in_step else 0
    return [first, *(run(*piece) for piece in rest), *(idle() for _ in range(idle_calls))]


def _most_over_processes(count: int, device: torch.device) -> int:
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


class _Chunk:
    """Some rows: their term, their statistics, and what the logits looked like.

    The term is what has a gradient: the sum of their losses, or their log-probabilities and
    entropies, [rows, 2].
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.vocab_size = 0
        self.dtype = torch.float32
        self.term = Term(torch.empty(()), 0)
        self.rows: tuple[Tensor, ...] = ()

    @classmethod
    def run(
        cls, head_forward: HeadForward, hidden: Tensor, labels: Tensor, settings: Settings
    ) -> _Chunk:
        """The values of these rows, their logits gone again but for the reference."""
        chunk = cls()
        # Function transforms allow no hooks on saved tensors, which checkpointing needs.
        again = settings.impl != "reference" and torch.is_grad_enabled() and not in_transform()
        run = checkpoint if again and labels.numel() else _call
        first_operation = next_operation()
        value, *rows = run(
            chunk._values, head_forward, hidden, labels, settings, use_reentrant=False
        )
        chunk.term, chunk.rows = Term(value, first_operation), tuple(rows)
        chunk.num_tokens = labels.numel()
        return chunk

    def without_effect(self) -> _Chunk:
        """The same with a loss of 0, on no row."""
        value = self.term.value
        self.term = self.term._replace(value=value[:0] if value.dim() else value * 0.0)
        self.rows = tuple(value[:0] for value in self.rows)
        self.num_tokens = 0
        return self

    def _values(
        self, head_forward: HeadForward, hidden: Tensor, labels: Tensor, settings: Settings
    ) -> tuple[Tensor, ...]:
        options = settings.options
        logits = head_forward(hidden)
        if logits.dim() != 2 or logits.shape[0] != labels.shape[0]:
            raise UnsupportedModelError(
                f"the head must map (tokens, hidden) to (tokens, vocab), got "
                f"{tuple(logits.shape)} for {labels.shape[0]} tokens: leave this model stock "
                "(remove_patch)"
            )
        self.vocab_size, self.dtype = logits.shape[1], logits.dtype
        _check_labels(labels, self.vocab_size)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if settings.logit_bias is not None:
                logits = logits + settings.logit_bias.to(logits)
            logits = logits * options.logit_scale
            if options.softcap is not None:
                logits = options.softcap * torch.tanh(logits / options.softcap)
            if isinstance(settings, TokenSettings):
                return _token_values(logits / settings.temperature, labels, settings.outputs)
            return _losses(logits, labels, settings)


def _losses(logits: Tensor, labels: Tensor, settings: LossSettings) -> tuple[Tensor, ...]:
    """The sum of the losses, and the statistics of each row."""
    options = settings.options
    log_probs = logits.log_softmax(-1)
    nll = -log_probs.gather(1, labels[:, None])[:, 0]
    lse = logits.logsumexp(-1)
    losses = nll
    if options.label_smoothing > 0:
        spread = -log_probs.mean(-1)
        losses = (1 - options.label_smoothing) * nll + options.label_smoothing * spread
    if options.z_loss > 0:
        losses = losses + options.z_loss * lse.square()
    with torch.no_grad():
        entropy, correct = _entropy(log_probs), logits.argmax(-1) == labels
    return losses.sum(), nll.detach(), lse.detach(), entropy, correct


def _token_values(logits: Tensor, labels: Tensor, outputs: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Log-probability and entropy of each row, [rows, 2], then those of `_DETACHED` asked for."""
    log_probs = logits.log_softmax(-1)
    label_log_probs = log_probs.gather(1, labels[:, None])[:, 0]
    entropy = _entropy(log_probs) if "entropy" in outputs else torch.zeros_like(label_log_probs)
    with torch.no_grad():
        detached = {
            "is_top1": lambda: logits.argmax(-1) == labels,
            "mean_logits": lambda: logits.mean(-1),
            "log_sum_sq_probs": lambda: (2 * log_probs).logsumexp(-1),
        }
        rows = [detached[name]() for name in _DETACHED if name in outputs]
    return torch.stack([label_log_probs, entropy], dim=1), *rows


def _entropy(log_probs: Tensor) -> Tensor:
    """In nats; a class without mass counts nothing."""
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    bad = labels[(labels < 0) | (labels >= vocab_size)]
    if bad.numel():
        raise ValueError(
            f"`labels` must hold class ids in [0, {vocab_size}) or the ignored one, got "
            f"{int(bad[0])}: check that the tokenizer and the head agree on the vocabulary size"
        )


def _call(function: Callable[..., tuple[Tensor, ...]], *args: object, use_reentrant: bool) -> tuple:
    del use_reentrant
    return function(*args)


def chunk_tokens(vocab_size: int, memory_budget_mib: float | None) -> int:
    """How many tokens are run at a time."""
    mib = DEFAULT_MEMORY_BUDGET_MIB if memory_budget_mib is None else memory_budget_mib
    return max(1, int(mib * 2**20) // (vocab_size * _FLOAT_BYTES * _COPIES_OF_A_CHUNK))


def _describe(chunks: list[_Chunk], impl: str) -> str:
    """How these ran, for people."""
    tokens = max(1, *(chunk.num_tokens for chunk in chunks))
    mib = tokens * chunks[0].vocab_size * _FLOAT_BYTES * _COPIES_OF_A_CHUNK / 2**20
    workspace = f"workspace {mib:,.1f} MiB"
    if impl == "reference":
        return f"{tokens} tokens at once, their logits kept for the backward, {workspace}"
    again = ", their logits made again in the backward" if torch.is_grad_enabled() else ""
    return f"chunks of {tokens} tokens{again}, {workspace}"
