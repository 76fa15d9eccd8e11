"""One rank of many: what it sees of a head, holds for it and sends for it, from shapes alone.

With T tokens of one replica of the model, hidden size H, V words and b bytes a weight, and a step
spread over t ranks along the vocabulary (tensor parallelism), f ranks that share the weights out
(FSDP, ZeRO-3) and s ranks along the sequence:

    tokens of a rank           T / s
    rows of a rank             V / t, rounded up: the largest rank sets the pace
    shares of the weights      n = f s if f > 1, as FSDP spans the ranks of a sequence too, else 1
    held between steps         V/t H b / n, and as much for the gradient
    gathered for the forward   V/t H b, while the head runs, if n > 1

    sent, vocabulary           forward 8 T/s, backward 4 H T/s, each by 2 (t - 1) / t
    sent, weights              3 (n - 1) / n of V/t H b: gathered for the forward and again for the
                               backward, its gradient scattered; gathered once where the engine
                               keeps it (FSDP2 with `reshard_after_forward=False`, and its root)
    sent, gradient             2 (s - 1) / s of V/t H b where f = 1 and s > 1: each rank of a
                               sequence has a part of it; an engine may sum it with other weights'

Bytes are those that a rank sends in a step around a ring, which takes 2 (n - 1) / n of a vector to
sum it over n ranks and (n - 1) / n to gather or to scatter it. With a frozen head nothing of its
gradient is held or sent. 8 T/s is what "torch" and "triton" send (`distributed.vocab_parallel`)
without statistics; "torch" gathers half of it, so that for t > 2 it sends 4 (t - 1) T/s there.
Copies for data parallelism change none of it: DDP sums the gradient once more.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_fused_head.benchmark.estimate import HeadShape


@dataclass(frozen=True)
class Layout:
    """Over how many ranks a step of one replica is spread.

    Attributes:
        tensor: Ranks that each hold some rows of the head (t).
        sharded: Ranks that share out what is held between steps (f).
        sequence: Ranks that each see a part of every sequence (s).
    """

    tensor: int = 1
    sharded: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor", "sharded", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}: 1 means no sharing"
                )

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.tensor * self.sharded * self.sequence

    @property
    def shares(self) -> int:
        """Shards that a rank's rows are split into between steps (n)."""
        return self.sharded * self.sequence if self.sharded > 1 else 1


@dataclass(frozen=True)
class PerRank:
    """What one rank has of a step, in tokens, rows and bytes."""

    ranks: int
    tokens: int
    rows: int
    held_weight_bytes: int
    held_gradient_bytes: int
    gathered_weight_bytes: int
    sent_vocabulary_bytes: int
    sent_weight_bytes: int
    sent_gradient_bytes: int


def per_rank(shape: HeadShape, num_tokens: int, layout: Layout, frozen_head: bool) -> PerRank:
    """The share of one rank; see above.

    Args:
        shape: The whole head.
        num_tokens: Tokens of a replica's step, on all ranks of the layout together.
        layout: The ranks.
        frozen_head: Whether the head gets no gradient.

    Raises:
        ValueError: If there are fewer rows or tokens than ranks to share them out to.
    """
    for count, size, option, what in (
        (shape.vocab_size, layout.tensor, "--tp", "rows of the head"),
        (num_tokens, layout.sequence, "--sp", "tokens of a step"),
    ):
        if count < size:
            raise ValueError(
                f"`{option}` must be at most {count}, the {what}, got {size}: share them among "
                "fewer ranks"
            )
    tokens = -(-num_tokens // layout.sequence)
    rows = -(-shape.vocab_size // layout.tensor)
    weight = rows * shape.hidden_size * shape.dtype.itemsize
    gradient = 0 if frozen_head else weight
    shared, whole = layout.shares, layout.sharded == 1
    return PerRank(
        ranks=layout.ranks,
        tokens=tokens,
        rows=rows,
        held_weight_bytes=-(-weight // shared),
        held_gradient_bytes=-(-gradient // shared),
        gathered_weight_bytes=weight if shared > 1 else 0,
        sent_vocabulary_bytes=_around((8 + 4 * shape.hidden_size) * tokens * 2, layout.tensor),
        sent_weight_bytes=_around(2 * weight + gradient, shared),
        sent_gradient_bytes=_around(2 * gradient, layout.sequence) if whole else 0,
    )


def _around(size: int, ranks: int) -> int:
    """What one rank sends of `size` bytes around a ring."""
    return size * (ranks - 1) // ranks
