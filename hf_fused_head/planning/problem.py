"""The record of one call that the planner reads: made once, where the operators meet an engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hf_fused_head.planning.cards import CPU, Card

# One number for every device: no probing of free memory, so a run is the same everywhere.
DEFAULT_MEMORY_BUDGET_MIB = 1024

# The largest share of label smoothing that is subtracted after the rounding of a stored tile.
_LARGEST_LATE_SMOOTHING = 0.5

# Memory for products that the vendor's library makes tile by tile: at most so many bytes and one
# part in so many of the budget, but enough for 512 rows of a kernel's block. On one H200 tiles of
# 64 to 128 MiB took the same time within the noise; with 24 MiB the loss alone took up to 2.3 times
# as long at hidden sizes 640 and 1024.
_PRODUCT_BYTES = 96 * 2**20
_PRODUCT_SHARE = 8
_SMALLEST_PRODUCT = 4 * 512 * 2048

# Tokens of a tile whose shape is that of every batch: fewer would waste a GPU's products, more the
# time of short batches.
_INVARIANT_TOKENS = 512

# Token counts within 1/16 of each other share a plan of the Triton engine, whose tiles round up.
_ROUND_TO = 256


def budget_bytes(memory_budget_mib: float | None) -> int:
    """The budget in bytes; None stands for the default."""
    mib = DEFAULT_MEMORY_BUDGET_MIB if memory_budget_mib is None else memory_budget_mib
    return int(mib * 2**20)


@dataclass(frozen=True)
class Problem:
    """What is to be computed, apart from the numbers in the tensors.

    Attributes:
        num_tokens: Tokens that count.
        hidden_size: Columns of the head; of all its matrices together for a sum of products.
        vocab_size: Rows of the head; of the rank that has most where ranks share it, so that all
            ranks plan the same.
        dtype: Of hidden states and head.
        impl: "torch", "triton" or "reference".
        card: The device's record.
        grad_hidden: Whether the hidden states need a gradient.
        grad_weight: Whether the head or its bias needs one.
        grad_columns: Columns of the head whose gradient is needed; None for all of them.
        per_token: Whether the upstream gradient is a vector that arrives with the backward.
        smoothing: The share of label smoothing in a scalar loss, whose gradient has rank one.
        softcap: Whether the logits are capped.
        class_weight: Whether classes have weights.
        entropy: Whether the entropy of a row, its gradient, or a sum of squares is asked for.
        batch_invariant: Whether a row's statistics must not depend on the others: every tile of the
            logits has one shape, whatever the number of tokens.
        product: Who makes the product of hidden states and head ("triton"): "epilogue" for a kernel
            with the loss in its epilogue, "tile" for the vendor's library.
        sums_hidden: Whether ranks sum their parts of the hidden states' gradient, in float32.
        budget_bytes: Largest workspace beyond inputs, outputs and gradients in their own dtype. If
            nothing fits, the smallest step is taken, and the schedule says so.
    """

    num_tokens: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    impl: str
    card: Card = CPU
    grad_hidden: bool = True
    grad_weight: bool = True
    grad_columns: int | None = None
    per_token: bool = False
    smoothing: float = 0.0
    softcap: bool = False
    class_weight: bool = False
    entropy: bool = False
    batch_invariant: bool = False
    product: str = "epilogue"
    sums_hidden: bool = False
    budget_bytes: int = DEFAULT_MEMORY_BUDGET_MIB * 2**20

    @property
    def item_bytes(self) -> int:
        """Bytes of an operand's element."""
        return self.dtype.itemsize

    @property
    def sum_bytes(self) -> int:
        """Bytes of an element of a sum."""
        return 8 if self.dtype == torch.float64 else 4

    @property
    def weight_columns(self) -> int:
        """Columns of the head whose gradient is made."""
        if not self.grad_weight:
            return 0
        return self.hidden_size if self.grad_columns is None else self.grad_columns

    @property
    def needs_gradient(self) -> bool:
        """Whether there is any gradient to make."""
        return self.grad_hidden or self.grad_weight

    @property
    def widened(self) -> bool:
        """Whether the forward leaves float32 gradients as sums: a loss scale arrives after it."""
        return self.dtype == torch.float16 and not self.windows_only

    @property
    def product_bytes(self) -> int:
        """Memory for the library's products; 0 where kernels make them."""
        if self.impl != "triton" or self.product != "tile":
            return 0
        most = max(min(_PRODUCT_BYTES, self.budget_bytes // _PRODUCT_SHARE), _SMALLEST_PRODUCT)
        return min(most, 4 * self.num_tokens * -(-self.vocab_size // 2048) * 2048)

    @property
    def scratch_blocks(self) -> int:
        """Blocks that the torch engine holds beside a tile."""
        return int(self.softcap) + int(self.entropy)

    @property
    def windows_only(self) -> bool:
        """Whether the gradient of the logits is no row factor times a stored exponent.

        So it is with any upstream vector; and in the Triton engine with float16, which has too
        little range for exponents around a label, and where smoothing has to be subtracted before
        the gradient is rounded. Under a softcap that difference has a factor of its own for every
        element. Otherwise its term has rank one and could be subtracted from the products of stored
        exponents; but a nearly uniform prediction leaves `1 - smoothing` of them, which makes their
        rounding as many times larger, and with class weights that share differs from row to row.
        """
        if self.per_token or self.impl != "triton":
            return self.per_token
        early = self.softcap or self.class_weight or self.smoothing > _LARGEST_LATE_SMOOTHING
        return self.dtype == torch.float16 or (self.smoothing > 0 and early)

    def rounded(self) -> Problem:
        """With a token count, and so a plan, that batches of about the same size share."""
        if self.batch_invariant:
            return replace(self, num_tokens=_INVARIANT_TOKENS)
        if self.impl != "triton":
            return self
        step = max(_ROUND_TO, 1 << max(self.num_tokens.bit_length() - 5, 0))
        return replace(self, num_tokens=-(-self.num_tokens // step) * step)
