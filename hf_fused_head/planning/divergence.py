"""How the divergence of two heads is cut: the largest chunk of tokens that a budget holds.

One schedule: chunks of tokens with whole rows of both heads, gradients in the same pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from hf_fused_head.planning.cards import MIB, Card
from hf_fused_head.planning.schedule import Schedule

# As for the cross-entropy: never more than one part in so many of the logits, and no smaller chunk.
_LOGITS_PARTS = 5
_SMALLEST_CHUNK = 32
# Pieces of converted operands take at most one part in so many of the budget, and no fewer columns.
_PIECES_PART = 8
_SMALLEST_WINDOW = 256
# Vectors per token and per class that live at once, in elements of the sums.
_TOKEN_VECTORS = 48
_CLASS_VECTORS = 4


@dataclass(frozen=True)
class DivergenceProblem:
    """What is to be computed, apart from the numbers in the tensors.

    Attributes:
        num_tokens: Tokens that count.
        vocab_size: Classes; of the rank that has most where ranks share the heads.
        student_size: Hidden size of the student.
        teacher_size: Hidden size of the teacher.
        student_dtype: Of the student's hidden states and head.
        teacher_dtype: Of the teacher's.
        dtype: Of logits and sums.
        impl: "torch" or "reference".
        card: The device's record.
        grad_hidden: Whether the student's hidden states need a gradient.
        grad_weight: Whether the student's head or bias needs one.
        softcap: Whether the student's logits are capped.
        mixture: Whether the divergence is one from a mixture, which takes a block more.
        widened: Whether float16 gradients leave in float32, for a loss scale that arrives later.
        budget_bytes: Largest workspace beyond inputs, outputs and gradients in their own dtype.
    """

    num_tokens: int
    vocab_size: int
    student_size: int
    teacher_size: int
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    dtype: torch.dtype
    impl: str
    card: Card
    grad_hidden: bool
    grad_weight: bool
    softcap: bool
    mixture: bool
    widened: bool
    budget_bytes: int

    @property
    def converted_sizes(self) -> int:
        """Columns of all operands that are converted piece by piece before a product."""
        dtypes = {self.student_dtype: 0, self.teacher_dtype: 0}
        dtypes[self.student_dtype] += self.student_size
        dtypes[self.teacher_dtype] += self.teacher_size
        native = (self.dtype,) if self.card.converts or self.dtype == torch.float64 else dtypes
        return sum(size for dtype, size in dtypes.items() if dtype not in native)

    def workspace_bytes(self, chunk: int, window: int) -> int:
        """Bytes that a chunk of so many tokens takes, beside windows of so many classes."""
        wide, vocab_size = self.dtype.itemsize, self.vocab_size
        if self.impl == "reference":
            logits = 16 * self.num_tokens * vocab_size
            sizes = self.student_size + self.teacher_size
            return (logits + 2 * (self.num_tokens + vocab_size) * sizes) * wide
        row = vocab_size * wide
        block_rows = min(chunk, max(1, self.card.block_bytes // row))
        blocks = 2 + int(self.softcap) + int(self.mixture)
        total = (2 * chunk + blocks * block_rows) * row
        total += (_TOKEN_VECTORS * self.num_tokens + _CLASS_VECTORS * vocab_size) * wide
        total += (chunk + window) * self.converted_sizes * wide
        narrow = self.student_dtype.itemsize
        if narrow == wide:
            return total
        needs_gradient = self.grad_hidden or self.grad_weight
        total += chunk * window * narrow if needs_gradient else 0
        if self.widened and self.dtype == torch.float32:
            # The sums are the results, wider than the parameters by as much again.
            rows = self.num_tokens * self.grad_hidden + vocab_size * self.grad_weight
            return total + rows * self.student_size * (wide - narrow)
        hidden_rows = chunk * self.grad_hidden
        weight_rows = (window if chunk >= self.num_tokens else vocab_size) * self.grad_weight
        return total + (hidden_rows + weight_rows) * self.student_size * wide


@lru_cache(maxsize=256)
def plan_divergence(problem: DivergenceProblem) -> Schedule:
    """The schedule that an engine follows; a budget that holds no step is raised to the smallest.

    Args:
        problem: What is computed, on which card, within which budget.
    """
    num_tokens, vocab_size = max(problem.num_tokens, 1), problem.vocab_size
    window = _window(problem)
    chunk = num_tokens
    if problem.impl == "torch":
        smallest = min(_SMALLEST_CHUNK, num_tokens)
        chunk = max(-(-num_tokens // _LOGITS_PARTS), smallest)
        while chunk > smallest and problem.workspace_bytes(chunk, window) > problem.budget_bytes:
            # Even parts, one more of them.
            parts = -(-num_tokens // chunk) + 1
            chunk = max(min(-(-num_tokens // parts), chunk - 1), smallest)
    workspace = problem.workspace_bytes(chunk, window)
    fits = workspace <= problem.budget_bytes
    budget = f"{problem.budget_bytes / MIB:,.1f} MiB"
    raised = f"the budget of {budget} was raised, the smallest step needs more"
    verdict = f"within the budget of {budget}" if fits else raised
    rows = num_tokens * problem.grad_hidden + vocab_size * problem.grad_weight
    needs_gradient = problem.grad_hidden or problem.grad_weight
    return Schedule(
        name="gradient_in_forward" if needs_gradient else "loss_only",
        chunk_tokens=chunk,
        vocab_window=window,
        passes=2 + problem.grad_hidden + problem.grad_weight,
        workspace_bytes=workspace,
        gradient_bytes=rows * problem.student_size * problem.student_dtype.itemsize,
        kept_share=0.0,
        fits=fits,
        reason=f"chunks of tokens with whole rows of both heads; {verdict}",
    )


def _window(problem: DivergenceProblem) -> int:
    """Classes whose rows of both heads are converted at once; all of them where none are."""
    window = problem.vocab_size
    if (
        problem.impl == "reference"
        or problem.student_dtype == problem.teacher_dtype == problem.dtype
    ):
        return window
    row_bytes = (problem.student_size + problem.teacher_size) * problem.dtype.itemsize
    while window > _SMALLEST_WINDOW and window * row_bytes > problem.budget_bytes // _PIECES_PART:
        window = -(-window // 2)
    return window
