"""The loss of a head that cannot be taken apart: its own forward, on a few tokens at a time.

DoRA, trainable tokens, quantised layers and modules of the user know themselves how their logits
come about. Each chunk's logits live until its losses are out and come again in the backward
(checkpointing), so no more than the memory budget is taken, and autograd finds every parameter
that the module uses, wherever it is kept. The chunks' gradients of a parameter are summed in
float32 beyond that budget, where the parameter is of lower precision. Where parts of the module are
gathered from other processes in forwards of their own, all processes run as many chunks as the one
with most tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_fused_head.functional import LossStats
from hf_fused_head.planning.problem import DEFAULT_MEMORY_BUDGET_MIB
from hf_fused_head.transforms import in_transform

from .errors import UnsupportedModelError
from .gradient_sums import Term, next_operation, sum_in_float32
from .settings import LossSettings

# Logits, their float32 copy, its log-softmax and the gradient of it live at the same time.
_COPIES_OF_A_CHUNK = 4
_FLOAT_BYTES = 4

HeadForward = Callable[[Tensor], Tensor]


def chunked_cross_entropy(
    head_forward: HeadForward,
    hidden: Tensor,
    target: Tensor,
    settings: LossSettings,
    in_step: bool = False,
) -> tuple[LossStats, int, torch.dtype, str]:
    """Loss, vocabulary size and dtype of the logits, and how the chunks ran, for people.

    Args:
        head_forward: `[N, hidden] -> [N, vocab]`, each row for itself.
        hidden: [..., hidden].
        target: [...], int64, as many as hidden states.
        settings: What the loss is; its float operations are float32. The reference takes all tokens
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
    total = torch.stack([chunk.term.value for chunk in chunks]).sum()
    sum_in_float32(total, [chunk.term for chunk in chunks])
    num_valid = keep.sum()
    items = num_valid if settings.num_items is None else settings.num_items
    if isinstance(items, Tensor):
        items = items.reshape(()).to(total.device)

    def scattered(index: int) -> Tensor:
        values = torch.cat([chunk.rows[index] for chunk in chunks])
        return values.new_zeros(labels.shape).index_copy(0, rows, values).reshape(target.shape)

    stats = LossStats(
        loss=total / items,
        nll=scattered(0),
        lse=scattered(1),
        entropy=scattered(2) if "entropy" in settings.stats else None,
        correct=scattered(3) if "accuracy" in settings.stats else None,
        num_valid=num_valid,
    )
    return stats, chunks[0].vocab_size, chunks[0].dtype, _describe(chunks, settings.impl)


def _run_chunks(
    head_forward: HeadForward,
    flat: Tensor,
    labels: Tensor,
    rows: Tensor,
    settings: LossSettings,
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
        """Counts nothing, yet is connected to what a loss would depend on."""
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
    """Some rows: the sum of their losses, their statistics, and what the logits looked like."""

    def __init__(self) -> None:
        self.vocab_size = 0
        self.dtype = torch.float32
        self.term = Term(torch.empty(()), 0)
        self.rows: tuple[Tensor, ...] = ()

    @classmethod
    def run(
        cls, head_forward: HeadForward, hidden: Tensor, labels: Tensor, settings: LossSettings
    ) -> _Chunk:
        """The losses of these rows, their logits gone again but for the reference."""
        chunk = cls()
        # Function transforms allow no hooks on saved tensors, which checkpointing needs.
        again = settings.impl != "reference" and torch.is_grad_enabled() and not in_transform()
        run = checkpoint if again and labels.numel() else _call
        first_operation = next_operation()
        total, *rows = run(
            chunk._losses, head_forward, hidden, labels, settings, use_reentrant=False
        )
        chunk.term, chunk.rows = Term(total, first_operation), tuple(rows)
        return chunk

    def without_effect(self) -> _Chunk:
        """The same with a loss of 0, on no row."""
        self.term = self.term._replace(value=self.term.value * 0.0)
        self.rows = tuple(value[:0] for value in self.rows)
        return self

    def _losses(
        self, head_forward: HeadForward, hidden: Tensor, labels: Tensor, settings: LossSettings
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
            logits = logits * options.logit_scale
            if options.softcap is not None:
                logits = options.softcap * torch.tanh(logits / options.softcap)
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
                entropy = -(log_probs.exp() * log_probs).sum(-1)
                correct = logits.argmax(-1) == labels
        return losses.sum(), nll.detach(), lse.detach(), entropy, correct


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
    tokens = max(1, *(chunk.rows[0].numel() for chunk in chunks))
    mib = tokens * chunks[0].vocab_size * _FLOAT_BYTES * _COPIES_OF_A_CHUNK / 2**20
    workspace = f"workspace {mib:,.1f} MiB"
    if impl == "reference":
        return f"{tokens} tokens at once, their logits kept for the backward, {workspace}"
    again = ", their logits made again in the backward" if torch.is_grad_enabled() else ""
    return f"chunks of {tokens} tokens{again}, {workspace}"
