"""From shapes and a memory budget to chunk, window, passes and bytes. Pure integers and no device.

The unit of cost is one pass: a product of all tokens with the whole head. What else a step does is
modelled as tokens or columns that such a pass could have handled meanwhile, so small chunks and
narrow windows pay for starting over. The model only ranks schedules; it promises no milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from hf_fused_head.workspace import Problem, Tile

# One number for every device: no probing of free memory, so a run is the same everywhere.
DEFAULT_MEMORY_BUDGET_MIB = 1024

# A smaller workspace is preferred to a modelled gain of less than this.
_SLACK = 1.005

# A budget that is too small is raised to this many times the smallest workspace: the very smallest
# tiles would spend most of their time on starting over.
_RAISE = 1.1

# What one more chunk or window costs, in tokens or columns of a pass (measured: two Zen 3 cores,
# 2048x576x49152 float32; one H100, 8192x4096x128256 bfloat16).
_RESTART = {"cpu": 50, "cuda": 128}
# What one more chunk costs beyond that where the head's gradient is summed in float32, in tokens of
# one pass: reading and writing the sum (measured on one H100: 590 at 8192x4096x128256, 970 at
# 16384x1024x151936).
_ACCUMULATE = {"cuda": 600}
# Hidden sizes at which the last chunk's product had better round that sum than leave it to a pass
# behind it (measured on one H200, 8192 tokens of bfloat16: 3.86 and 3.92 ms at 1024x151936, 13.70
# and 13.56 ms at 4096x128256).
_ROUNDS = range(256, 2049)
# The gradient of a chunk's hidden states is a small product that may leave much of a GPU idle in
# its last wave. Multiprocessors, rows and columns of a tile, and the share of that idleness that
# the product takes longer (measured on one H100: 1024 to 16384 rows at hidden sizes 576 to 4096;
# within 5 % for most, since cuBLAS has other tiles to choose from). It chooses between chunks; it
# is too coarse to choose between schedules.
_WAVE = {"cuda": (132, 128, 0.25)}
# Where products take float32 only, every chunk converts the weights to it twice.
_CONVERT = 100

# "torch" never holds more than one part in so many of the logits, however large the budget.
_LOGITS_PARTS = 5

# Larger chunks of "triton" take more memory and were slower: 32768x4096x128256 in three chunks of
# 11008 took 154.3 ms, in four of 8192 150.8 (one H200); 150.1 and 147.3 (one H100).
_LARGEST_CHUNK = {"cuda": 8192}
# Below these a product is mostly overhead: no budget makes a tile smaller.
_SMALLEST_CHUNK = {"torch": 32, "triton": 256}
_SMALLEST_WINDOW = 256
# A GPU waits for the host to launch products of fewer multiplications: windows of 256 took 4.6 to
# 7.7 times the bare products on one H100, at 8192x2304x256000 and 16384x1024x151936. Windows this
# wide cost no memory worth speaking of, and are not made wider for it.
_SMALLEST_PRODUCT = 2**34
_WIDE_ENOUGH = 1024


@dataclass(frozen=True)
class Schedule:
    """How one loss and its gradients are computed.

    Attributes:
        name: "loss_only", "gradient_in_forward", "recompute" or "hybrid".
        chunk_tokens: Rows of a logits tile.
        vocab_window: Columns of a logits tile, or of a converted piece of the weights.
        passes: Products of all tokens with the whole head, forward and backward together.
        workspace_bytes: Beyond inputs, outputs and gradients in their own dtype.
        gradient_bytes: The gradients themselves.
        kept_share: Share of the exponentials that is kept instead of recomputed.
        fits: Whether `workspace_bytes` is within the budget.
        reason: A sentence for people.
        late_rounding: Whether the head's gradient, summed over chunks in float32, is rounded when
            the tile is gone, where that was; otherwise by the last chunk's product.
    """

    name: str
    chunk_tokens: int
    vocab_window: int
    passes: float
    workspace_bytes: int
    gradient_bytes: int
    kept_share: float
    fits: bool
    reason: str
    late_rounding: bool = False

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.passes:g} passes, tiles of {self.chunk_tokens} tokens x "
            f"{self.vocab_window} columns, workspace {_mib(self.workspace_bytes)}, "
            f"gradients {_mib(self.gradient_bytes)}; {self.reason}"
        )


@lru_cache(maxsize=1024)
def plan(
    *,
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    impl: str,
    device_type: str,
    grad_hidden: bool,
    grad_weight: bool,
    per_token: bool = False,
    memory_budget_mib: float | None = None,
    grad_columns: int | None = None,
    scratch_blocks: int = 2,
    smoothing: bool = False,
    shared_hidden: bool = False,
) -> Schedule:
    """The schedule that an engine follows.

    Args:
        num_tokens: Tokens that count.
        hidden_size: Columns of the head; of all its matrices together for a sum of products.
        vocab_size: Rows of the head.
        dtype: Of hidden states and head.
        impl: "torch", "triton" or "reference".
        device_type: "cpu", "cuda", ...
        grad_hidden: Whether the hidden states need a gradient.
        grad_weight: Whether the head does.
        per_token: Whether the upstream gradient is a vector that arrives with the backward.
        memory_budget_mib: Largest workspace; None for the default. If nothing fits, the smallest
            step is taken and `fits` is False.
        grad_columns: Columns of the head that need a gradient, where that is not all of them.
        scratch_blocks: What "torch" needs beside a tile: a block for a softcap, one for entropies.
        smoothing: Whether the gradients of a scalar loss have the rank-one term of smoothing.
        shared_hidden: Whether ranks sum their parts of the hidden states' gradient, in float32.
    """
    candidates = schedules(
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        dtype=dtype,
        impl=impl,
        device_type=device_type,
        grad_hidden=grad_hidden,
        grad_weight=grad_weight,
        per_token=per_token,
        memory_budget_mib=memory_budget_mib,
        grad_columns=grad_columns,
        scratch_blocks=scratch_blocks,
        smoothing=smoothing,
        shared_hidden=shared_hidden,
    )
    return candidates[0]


def schedules(
    *,
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    impl: str,
    device_type: str,
    grad_hidden: bool,
    grad_weight: bool,
    per_token: bool = False,
    memory_budget_mib: float | None = None,
    grad_columns: int | None = None,
    scratch_blocks: int = 2,
    smoothing: bool = False,
    shared_hidden: bool = False,
) -> list[Schedule]:
    """Every way to run, the one that `plan` takes first; arguments as there."""
    mib = DEFAULT_MEMORY_BUDGET_MIB if memory_budget_mib is None else memory_budget_mib
    step = _Step(
        num_tokens=max(num_tokens, 1),
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        item=dtype.itemsize,
        acc=8 if dtype == torch.float64 else 4,
        impl=impl,
        device_type=device_type,
        grad_hidden=grad_hidden,
        grad_columns=(hidden_size if grad_columns is None else grad_columns) if grad_weight else 0,
        grad_weight=grad_weight,
        scratch_blocks=scratch_blocks,
        smoothing=smoothing,
        shared_hidden=shared_hidden and grad_hidden,
        widened=dtype == torch.float16 and not per_token,
        budget=int(mib * 2**20),
    )
    if not (grad_hidden or grad_weight):
        names = ["loss_only"]
    elif per_token:
        names = ["recompute"]
    else:
        names = ["gradient_in_forward", "recompute"]
    if impl == "reference":
        names = names[:1]
    elif impl == "triton" and len(names) > 1:
        names.append("hybrid")
    best = [step.best(name) for name in names]
    if not any(schedule.fits for schedule in best):
        smallest = min(schedule.workspace_bytes for schedule in best)
        step = replace(step, budget=int(_RAISE * smallest), asked=step.budget)
        best = [step.best(name) for name in names]
    return sorted(best, key=step.rank)


_REASONS = {
    "loss_only": "nobody needs a gradient",
    "gradient_in_forward": "gradients are made in the forward, chunk by chunk of the tokens",
    "recompute": "statistics first, then the logits again in windows of the vocabulary",
    "hybrid": "a share of the exponentials is kept, the rest made again in windows",
}


@dataclass(frozen=True)
class _Step(Problem):
    """One problem and its budget: what every schedule would cost it."""

    budget: int
    asked: int | None = None  # the budget before it was raised

    def best(self, name: str) -> Schedule:
        """The smallest tile of this schedule whose cost is within the slack of the best."""
        tiles = [(self.taken(name, tile), tile) for tile in self.tiles(name)]
        fitting = [entry for entry in tiles if entry[0] <= self.budget]
        if not fitting:
            # The smallest step is mostly what no tile can avoid; the tile itself may be usable.
            smallest = _RAISE * min(tiles)[0]
            fitting = [entry for entry in tiles if entry[0] <= smallest]
        costs = [self.cost(name, tile) + self.idle(tile[0]) for _, tile in fitting]
        limit = _SLACK * min(costs)
        cheap = [
            (workspace, cost, tile)
            for (workspace, tile), cost in zip(fitting, costs, strict=True)
            if cost <= limit
        ]
        workspace, _, tile = min(cheap)
        return self.schedule(name, tile, workspace)

    def taken(self, name: str, tile: Tile) -> int:
        """The workspace; the head's gradient lies beside the tile if the budget holds both."""
        return self.workspace(name, tile, late=self.is_late(name, tile))

    def is_late(self, name: str, tile: Tile) -> bool:
        """Whether the head's gradient is rounded when the tile is gone, where that was."""
        beside = self.workspace(name, tile)
        if beside <= self.workspace(name, tile, late=True):
            return False
        return beside > self.budget or self.hidden_size not in _ROUNDS

    def tiles(self, name: str) -> Iterator[Tile]:
        """Every tile that the engine could use for this schedule."""
        if self.impl == "reference":
            yield self.num_tokens, self.vocab_size, 0.0
        elif name == "hybrid":
            yield from self.kept_tiles()
        elif self.impl == "triton" and name != "gradient_in_forward":
            for window in self.windows():
                yield self.num_tokens, window, 0.0
        else:
            yield from self.chunked_tiles(whole_rows=name == "gradient_in_forward")

    def chunked_tiles(self, whole_rows: bool) -> Iterator[Tile]:
        """Chunks of tokens times windows; with whole rows a window is of the weights only."""
        converts = self.impl == "torch" and self.item != self.acc
        largest = self.num_tokens * self.vocab_size
        if self.impl == "torch":
            largest = -(-self.num_tokens // _LOGITS_PARTS) * self.vocab_size
        for chunk in self.chunks():
            for window in self.windows() if converts or not whole_rows else (self.vocab_size,):
                if chunk * (self.vocab_size if whole_rows else window) <= largest:
                    yield chunk, window, 0.0

    def kept_tiles(self) -> Iterator[Tile]:
        """As many whole kept columns as the budget holds, with every window that is no wider."""
        column = self.num_tokens * self.item
        free = self.budget - self.workspace("hybrid", (self.num_tokens, 0, 0.0))
        columns = min(free // column, self.vocab_size - 1) // _SMALLEST_WINDOW * _SMALLEST_WINDOW
        columns = max(columns, min(self.smallest_window, self.vocab_size))
        for window in self.windows():
            if window <= columns:
                yield self.num_tokens, window, columns / self.vocab_size

    def chunks(self) -> Iterator[int]:
        """All tokens, and even splits of them from the largest chunk down to the smallest."""
        smallest, largest = _SMALLEST_CHUNK[self.impl], self.num_tokens
        if self.impl == "triton":
            largest = _LARGEST_CHUNK.get(self.device_type, largest)
        if self.impl == "torch":
            smallest = min(smallest, -(-self.num_tokens // _LOGITS_PARTS))
        parts, last = 1, 0
        while True:
            chunk = -(-self.num_tokens // parts)
            if self.impl == "triton":
                chunk = min(-(-chunk // smallest) * smallest, self.num_tokens)
            if chunk != last and chunk >= min(smallest, self.num_tokens):
                yield chunk
            last = chunk
            if chunk <= smallest:
                return
            parts = max(parts + max(1, parts // 4), -(-self.num_tokens // largest))

    @property
    def smallest_window(self) -> int:
        """Columns; of narrower windows no budget makes use."""
        window = _SMALLEST_WINDOW
        on_gpu = self.impl == "triton" and self.device_type == "cuda"
        while on_gpu and window < _WIDE_ENOUGH:
            if self.num_tokens * self.hidden_size * window >= _SMALLEST_PRODUCT:
                break
            window *= 2
        return window

    def windows(self) -> Iterator[int]:
        """The whole vocabulary; powers of two below it and what lies half way between them."""
        yield self.vocab_size
        window = self.smallest_window
        while window < self.vocab_size:
            yield window
            if window * 3 // 2 < self.vocab_size and window > self.smallest_window:
                yield window * 3 // 2
            window *= 2

    def cost(self, name: str, tile: Tile) -> float:
        """Modelled passes, restarts included."""
        chunk, window, kept = tile
        restart = _RESTART.get(self.device_type, _RESTART["cuda"])
        overhead = restart / chunk
        # Whole rows in one piece start over with every chunk only.
        if name != "gradient_in_forward" or window < self.vocab_size:
            overhead += restart / window
        converts = self.item != self.acc and self.device_type == "cpu"
        if name == "gradient_in_forward" and converts and window < self.vocab_size:
            overhead += _CONVERT / chunk
        cost = self.passes(name, kept) * (1 + overhead)
        if name == "gradient_in_forward" and self.grad_weight and chunk < self.num_tokens:
            share = self.grad_columns / self.hidden_size
            cost += _ACCUMULATE.get(self.device_type, 0) * share / chunk
        return cost

    def idle(self, chunk: int) -> float:
        """Modelled passes lost where the gradient of a chunk's hidden states leaves a GPU idle."""
        if not self.grad_hidden or self.device_type not in _WAVE:
            return 0.0
        width, tile_size, share = _WAVE[self.device_type]
        tiles = -(-chunk // tile_size) * -(-self.hidden_size // tile_size)
        return share * (-(-tiles // width) * width / tiles - 1)

    def rank(self, schedule: Schedule) -> tuple[bool, float]:
        """Orders schedules: by cost those within the budget, then by size those that are not."""
        if schedule.workspace_bytes > self.budget:
            return True, schedule.workspace_bytes
        tile = schedule.chunk_tokens, schedule.vocab_window, schedule.kept_share
        return False, self.cost(schedule.name, tile)

    def passes(self, name: str, kept: float) -> float:
        """Products of all tokens with the whole head."""
        backward = self.grad_hidden + self.grad_weight
        if name == "loss_only":
            return 1
        return 1 + backward if name == "gradient_in_forward" else 2 + backward - kept

    def schedule(self, name: str, tile: Tile, workspace: int) -> Schedule:
        """The record for people and engines."""
        chunk, window, kept = tile
        asked = self.budget if self.asked is None else self.asked
        fits = workspace <= asked
        verdict = f"within the budget of {_mib(asked)}"
        if not fits and self.asked is None:
            verdict = f"more than the budget of {_mib(asked)}"
        elif not fits:
            verdict = f"the budget of {_mib(asked)} was raised, the smallest step needs more"
        gradient = self.num_tokens * self.hidden_size if self.grad_hidden else 0
        gradient += self.vocab_size * self.grad_columns
        return Schedule(
            name=name,
            chunk_tokens=chunk,
            vocab_window=window,
            passes=self.passes(name, kept),
            workspace_bytes=workspace,
            gradient_bytes=gradient * self.item,
            kept_share=kept,
            fits=fits,
            reason=f"{_REASONS[name]}; {verdict}",
            late_rounding=self.is_late(name, tile),
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
