"""A head that is sharded along the vocabulary: one rank's rows, and what the ranks exchange.

Every rank holds some rows of the head, all hidden states and all labels. What a token's loss needs
of the other ranks is two numbers: the logit of its label, which one rank has and the others add 0
to, and the sum of its exponents around that logit. No maximum is exchanged. Collectives of one
loss, with the bytes that a rank sends a token:

    agree     all-gather of a few integers, once a pass, whatever the number of tokens (the
              backward of a scalar loss, whose gradients are there already, has none); a rank that
              raises takes part in it too (`report_failure`), so that no other waits for it
    forward   sum of the labels' logits, 4; gather or sum of the exponents' sums, 4; for label
              smoothing, entropy and accuracy one collective more, 4 for each (the Triton engine
              4 more with entropy or accuracy); 4 to 12 where a loss is beyond what exponents hold
    backward  sum of the hidden states' partial gradients, float32, 4 a column, unless the
              caller who gathered them scatters their gradient; weight and bias are local

With chunks of tokens these come chunk by chunk. The reference engine gathers the logits instead.

The engines ask the same of `WHOLE`, a head on one rank, where every result is its argument.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Differences of logits, and the exponentials of them, are worth more digits than a row has.
_WIDEST = torch.float64
# Sums of exponents are sent as they are up to exp of this. Beyond it float32 would not hold what
# the ranks have together: minus their logarithm is sent, which tells where to make them again.
_LARGEST = 80.0


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary.

    Attributes:
        group: The ranks that share the head; None for a head on one rank.
        rank: This rank's place in the group, which is the place of its rows.
        sizes: Rows of every rank; () for a head on one rank.
        complete_hidden: The hidden states' gradient is summed here. Otherwise every rank's stays
            its part, for a caller who sums and scatters in one collective.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    sizes: tuple[int, ...] = ()
    complete_hidden: bool = True

    @property
    def first(self) -> int:
        """The class of this rank's first row."""
        return sum(self.sizes[: self.rank])

    @property
    def sums_hidden(self) -> bool:
        """Whether the gradient of the hidden states is summed over ranks here."""
        return self.group is not None and self.complete_hidden

    def total(self, rows: int) -> int:
        """The size of the vocabulary, of which `rows` are here."""
        return sum(self.sizes) or rows

    def largest(self, rows: int) -> int:
        """The rows of the rank that has most: what all plan with, so that all plan the same."""
        return max(self.sizes, default=rows)

    def part(self, vector: Tensor | None, rows: int) -> Tensor | None:
        """The entries of this rank's `rows` in a vector of the whole vocabulary."""
        return None if vector is None else vector[self.first : self.first + rows]

    def columns_of(self, classes: Tensor, rows: int) -> Tensor:
        """Labels as columns of the logits of this rank's `rows`.

        A class of another rank becomes itself plus the size of the vocabulary, beyond every
        column; what is negative stands for no class and stays.
        """
        if self.group is None:
            return classes
        column = classes - self.first
        here = (column >= 0) & (column < rows)
        column = torch.where(here, column, classes + self.total(rows))
        return torch.where(classes < 0, classes, column)

    def classes_of(self, columns: Tensor, rows: int) -> Tensor:
        """The labels behind what `columns_of` returned, none of them negative."""
        if self.group is None:
            return columns
        beyond = columns - self.total(rows)
        return torch.where(beyond >= 0, beyond, columns + self.first)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in the memory of `tensor`."""
        self.start_sum(tensor)()
        return tensor

    def start_sum(self, tensor: Tensor) -> Callable[[], Any]:
        """Begins `sum`, and returns what waits for it; until then `tensor` must not be touched."""
        if self.group is None:
            return _nothing
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return _nothing if work is None else work.wait

    def start_hidden_sum(self, tensor: Tensor) -> Callable[[], Any]:
        """As `start_sum`, of a gradient of hidden states: nothing where the caller sums it."""
        return self.start_sum(tensor) if self.complete_hidden else _nothing

    def sum_hidden(self, tensor: Tensor) -> Tensor:
        """As `sum`, of a gradient of hidden states: as it is where the caller sums it."""
        self.start_hidden_sum(tensor)()
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The maximum over the ranks, in the memory of `tensor`."""
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def columns(self, tile: Tensor) -> Tensor:
        """This rank's columns of a matrix beside those of the others: [N, V]."""
        if self.group is None:
            return tile
        padding = self.largest(0) - tile.shape[1]
        padded = torch.nn.functional.pad(tile, (0, padding))
        every = self._gather(padded).unbind()
        parts = [part[:, :size] for part, size in zip(every, self.sizes, strict=True)]
        return torch.cat(parts, dim=1)

    def merged(self, top: Tensor, others: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Row sums of all ranks, around a reference that all of them know.

        Args:
            top: [N], what this rank's exponents were made around.
            others: [N], sum of this rank's `exp(z - top)`, the label left out.
            anchor: [N], the logit of the label.

        Returns:
            The reference, the label's logit or a larger number, and the sum around it.
        """
        if self.group is None:
            return top, others
        # A label that a bias of -inf masks is no reference.
        anchor = torch.where(anchor.isfinite(), anchor, 0.0)
        wide_top, wide_others = top.to(_WIDEST), others.to(_WIDEST)
        log = wide_top - anchor.to(_WIDEST) + wide_others.log()
        every = self._gather(torch.where(log > _LARGEST, -log, log.exp()).to(top.dtype))
        total, far = every.sum(dim=0), (every < 0).any(dim=0)
        # Every rank sees the same sums, so all take this turn or none.
        if not bool(far.any()):
            return anchor, total
        logs = torch.where(every < 0, -every, every.log())
        reference = torch.where(far, anchor + logs.amax(dim=0), anchor)
        around = wide_others * (wide_top - reference.to(_WIDEST)).exp()
        return reference, torch.where(far, self.sum(around.to(top.dtype)), total)

    def _gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape: [R, ...]."""
        every = tensor.new_empty((len(self.sizes), *tensor.shape))
        dist.all_gather(list(every.unbind()), tensor.contiguous(), group=self.group)
        return every


WHOLE = VocabShard()


def group_name(process_group: dist.ProcessGroup | None) -> str:
    """The name under which an operator finds the group again; "" for a head on one rank.

    Raises:
        TypeError: If it is no process group.
        ValueError: If this rank is not in it.
    """
    if process_group is None:
        return ""
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"`process_group` must be a torch.distributed.ProcessGroup or None, got "
            f"{process_group!r}: of a DeviceMesh, pass mesh.get_group()"
        )
    return process_group.group_name


class Terms(NamedTuple):
    """What has to be the same on every rank, beside the labels."""

    input: Any
    weight: Any
    linear_bias: Any
    options: Any
    wanted: Any


NAMES = Terms(
    "`input`",
    "`weight`",
    "presence of `linear_bias`",
    "options of the loss",
    "tensors that require grad and wanted statistics",
)
# In the place of rows, codes and labels.
_FAILED = -1


def agree(
    name: str,
    rows: int,
    labels: Tensor,
    terms: Terms,
    complete_hidden: bool = True,
    names: tuple[str, ...] | None = None,
) -> VocabShard:
    """This rank's shard, once all ranks have exchanged their numbers of rows and agree on the loss.

    Every rank raises what one of them has to raise, so none is left waiting.

    Args:
        name: Of the process group; "" for a head on one rank.
        rows: Of the head on this rank.
        labels: [...], int64.
        terms: What else has to be the same on every rank.
        complete_hidden: The attribute of the shard.
        names: What the terms and then the labels are called in messages; those of
            `linear_cross_entropy` by default.

    Raises:
        ValueError: If a rank has no rows.
        RuntimeError: If the ranks do not mean the same, or one of them has reported a failure.
        NotImplementedError: If a CUDA graph is being captured.
    """
    shard = _equal_shards(name, rows)
    if shard.group is None:
        return WHOLE
    if _capturing():
        raise NotImplementedError(
            "`process_group` must be None while a CUDA graph is captured, got a group of "
            f"{len(shard.sizes)} ranks: they have to learn on the host that they mean the same "
            "loss; keep the loss outside of the graph, or the whole head on every rank"
        )
    codes = [zlib.crc32(repr(term).encode()) for term in terms]
    flat = labels.reshape(-1)
    places = torch.arange(1, flat.shape[0] + 1, device=flat.device)
    mine = torch.tensor([rows, *codes, 0], device=flat.device)
    mine[-1] = (flat * places).sum()
    gathered = shard._gather(mine).tolist()
    sizes = tuple(row[0] for row in gathered)
    if _FAILED in sizes:
        raise RuntimeError(
            "the arguments must be valid on every rank of `process_group`, got an error on rank "
            f"{sizes.index(_FAILED)}: its message, there, says what is wrong"
        )
    if 0 in sizes:
        raise ValueError(
            f"`linear_weight` must have at least one row on every rank of `process_group`, got "
            f"none on rank {sizes.index(0)}: use fewer ranks for a vocabulary of {sum(sizes)}"
        )
    got = [*(f"{term!r} here and another" for term in terms), "another"]
    for index, what in enumerate((*NAMES, "`target`") if names is None else names):
        column = [row[1 + index] for row in gathered]
        others = [rank for rank, code in enumerate(column) if code != column[shard.rank]]
        if others:
            raise RuntimeError(
                f"{what} must be the same on every rank of `process_group`, got {got[index]} on "
                f"rank {others[0]}: the ranks share one batch, and only the rows of the head differ"
            )
    return VocabShard(shard.group, shard.rank, sizes, complete_hidden)


def report_failure(name: str, device: torch.device) -> None:
    """This rank's part in `agree` where it has an error to raise instead: the others raise too.

    Args:
        name: Of the process group; "" for a head on one rank.
        device: Where the other ranks have their labels.
    """
    # A compiler that meets the error traces; only a run has others who wait.
    if not name or torch.compiler.is_compiling() or _capturing():
        return
    shard = _equal_shards(name, 0)
    if shard.group is not None:
        # As much as `agree` sends: rows, codes, labels.
        shard._gather(torch.full((len(NAMES) + 2,), _FAILED, device=device))


def _equal_shards(name: str, rows: int) -> VocabShard:
    """This rank's place in the group, as if all had as many rows; `WHOLE` on one rank."""
    if not name:
        return WHOLE
    # The way back from a name, which torch's own functional collectives take too.
    resolve: Any = getattr(dist.distributed_c10d, "_resolve_process_group")  # noqa: B009
    group = resolve(name)
    size = dist.get_world_size(group)
    return WHOLE if size == 1 else VocabShard(group, dist.get_rank(group), (rows,) * size)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _nothing() -> None:
    pass
