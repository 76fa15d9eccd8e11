"""From a problem and a memory budget to chunk, window, passes and bytes. Integers, no device.

The unit of cost is one pass: a product of all tokens with the whole head. What else a step does is
modelled as tokens or columns that such a pass could have handled in that time, so small chunks and
narrow windows pay for starting over. The model only ranks schedules; it predicts no milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from hf_fused_head.planning.problem import Problem
from hf_fused_head.planning.workspace import Tile, workspace_bytes

# A smaller workspace is preferred to a modelled gain of less than this.
_SLACK = 1.005

# A budget that is too small is raised to this many times the smallest workspace: the very smallest
# tiles would spend most of their time on starting over.
_RAISE = 1.1

# Hidden sizes at which the last chunk's product had better round the float32 sum of the head's
# gradient than leave it to a pass after it (measured on one H200, 8192 tokens of bfloat16: 3.86 and
# 3.92 ms at 1024x151936, 13.70 and 13.56 ms at 4096x128256).
_ROUNDS = range(256, 2049)
# Where products take float32 only, every chunk converts the weights to it twice.
_CONVERT = 100

# "torch" never holds more than one part in so many of the logits, however large the budget.
_LOGITS_PARTS = 5

# Below these a product is mostly overhead: no budget makes a tile smaller.
_SMALLEST_CHUNK = {"torch": 32, "triton": 256}
_SMALLEST_WINDOW = 256
# Windows this wide cost little memory and are not made wider to keep a device from waiting for
# launches.
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
        product_bytes: Memory for the products of hidden states and head that the vendor's library
            makes ("triton"); 0 where kernels make them.
        tile_tokens: Rows of every product of statistics, the last one padded, where a row's bits
            must not depend on the batch; 0 where they may.
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
    product_bytes: int = 0
    tile_tokens: int = 0

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.passes:g} passes, tiles of {self.chunk_tokens} tokens x "
            f"{self.vocab_window} columns, workspace {_mib(self.workspace_bytes)}, "
            f"gradients {_mib(self.gradient_bytes)}; {self.reason}"
        )


@lru_cache(maxsize=1024)
def plan(problem: Problem) -> Schedule:
    """The schedule that an engine follows.

    Args:
        problem: What is computed, on which card, within which budget.
    """
    return schedules(problem)[0]


def schedules(problem: Problem) -> list[Schedule]:
    """Every way to run a problem, the one that `plan` takes first."""
    planner = _Planner(replace(problem, num_tokens=max(problem.num_tokens, 1)))
    if not problem.needs_gradient:
        names = ["loss_only"]
    elif problem.impl == "reference":
        names = ["recompute" if problem.per_token else "gradient_in_forward"]
    elif problem.per_token or problem.windows_only:
        names = ["recompute"]
    elif problem.impl == "triton":
        names = ["gradient_in_forward", "recompute", "hybrid"]
    else:
        names = ["gradient_in_forward", "recompute"]
    best = [planner.best(name) for name in names]
    if not any(schedule.fits for schedule in best):
        smallest = min(schedule.workspace_bytes for schedule in best)
        planner = replace(planner, raised_to=int(_RAISE * smallest))
        best = [planner.best(name) for name in names]
    return sorted(best, key=planner.rank)


_REASONS = {
    "loss_only": "nobody needs a gradient",
    "gradient_in_forward": "gradients are made in the forward, chunk by chunk of the tokens",
    "recompute": "statistics first, then the logits again in windows of the vocabulary",
    "hybrid": "a share of the exponentials is kept, the rest made again in windows",
}


@dataclass(frozen=True)
class _Planner:
    """What every schedule would cost a problem."""

    problem: Problem
    raised_to: int | None = None  # bytes, where the budget holds no step

    @property
    def budget(self) -> int:
        """Bytes that a workspace may take."""
        return self.problem.budget_bytes if self.raised_to is None else self.raised_to

    def best(self, name: str) -> Schedule:
        """The smallest tile of this schedule whose cost is within the slack of the best."""
        tiles = [(self.workspace(name, tile), tile) for tile in self.tiles(name)]
        fitting = [entry for entry in tiles if entry[0] <= self.budget]
        if not fitting:
            # The smallest step is mostly what no tile can avoid; the tile itself may be usable.
            smallest = _RAISE * min(tiles)[0]
            fitting = [entry for entry in tiles if entry[0] <= smallest]
        costs = [self.cost(name, tile) + self.idle(tile.chunk_tokens) for _, tile in fitting]
        limit = _SLACK * min(costs)
        cheap = [
            (workspace, cost, tile)
            for (workspace, tile), cost in zip(fitting, costs, strict=True)
            if cost <= limit
        ]
        workspace, _, tile = min(cheap)
        return self.schedule(name, tile, workspace)

    def workspace(self, name: str, tile: Tile) -> int:
        """Bytes; the head's gradient lies beside the tile if the budget holds both."""
        return workspace_bytes(self.problem, name, tile, late=self.is_late(name, tile))

    def is_late(self, name: str, tile: Tile) -> bool:
        """Whether the head's gradient is rounded once the tile is freed, in its memory."""
        beside = workspace_bytes(self.problem, name, tile)
        if beside <= workspace_bytes(self.problem, name, tile, late=True):
            return False
        return beside > self.budget or self.problem.hidden_size not in _ROUNDS

    def tiles(self, name: str) -> Iterator[Tile]:
        """Every tile that the engine could use for this schedule."""
        problem = self.problem
        if problem.impl == "reference":
            yield Tile(problem.num_tokens, problem.vocab_size)
        elif name == "hybrid":
            yield from self.kept_tiles()
        elif problem.impl == "triton" and name != "gradient_in_forward":
            for window in self.windows():
                yield Tile(problem.num_tokens, window)
        else:
            yield from self.chunked_tiles(whole_rows=name == "gradient_in_forward")

    def chunked_tiles(self, whole_rows: bool) -> Iterator[Tile]:
        """Chunks of tokens times windows; with whole rows a window is of the weights only."""
        problem = self.problem
        converts = problem.impl == "torch" and problem.item_bytes != problem.sum_bytes
        largest = problem.num_tokens * problem.vocab_size
        if problem.impl == "torch":
            largest = -(-problem.num_tokens // _LOGITS_PARTS) * problem.vocab_size
        windows = list(self.windows()) if converts or not whole_rows else [problem.vocab_size]
        for chunk in self.chunks():
            for window in windows:
                if chunk * (problem.vocab_size if whole_rows else window) <= largest:
                    yield Tile(chunk, window)

    def kept_tiles(self) -> Iterator[Tile]:
        """As many whole kept columns as the budget holds, with every window that is no wider."""
        num_tokens, vocab_size = self.problem.num_tokens, self.problem.vocab_size
        column = num_tokens * self.problem.item_bytes
        free = self.budget - workspace_bytes(self.problem, "hybrid", Tile(num_tokens, 0))
        columns = min(free // column, vocab_size - 1) // _SMALLEST_WINDOW * _SMALLEST_WINDOW
        columns = max(columns, min(self.smallest_window, vocab_size))
        for window in self.windows():
            if window <= columns:
                yield Tile(num_tokens, window, columns / vocab_size)

    def chunks(self) -> Iterator[int]:
        """All tokens, and even splits of them from the largest chunk down to the smallest."""
        impl, num_tokens = self.problem.impl, self.problem.num_tokens
        smallest, largest = _SMALLEST_CHUNK[impl], num_tokens
        if impl == "triton":
            largest = self.problem.card.largest_chunk or largest
        if impl == "torch":
            smallest = min(smallest, -(-num_tokens // _LOGITS_PARTS))
        count, last = 1, 0
        while True:
            chunk = -(-num_tokens // count)
            if impl == "triton":
                chunk = min(-(-chunk // smallest) * smallest, num_tokens)
            if chunk != last and chunk >= min(smallest, num_tokens):
                yield chunk
            last = chunk
            if chunk <= smallest:
                return
            count = max(count + max(1, count // 4), -(-num_tokens // largest))

    @property
    def smallest_window(self) -> int:
        """Columns; of narrower windows no budget makes use."""
        problem, window = self.problem, _SMALLEST_WINDOW
        if problem.impl == "triton":
            rows = problem.num_tokens * problem.hidden_size
            while window < _WIDE_ENOUGH and rows * window < problem.card.launch_bound_product:
                window *= 2
        return window

    def windows(self) -> Iterator[int]:
        """The whole vocabulary; powers of two below it and what lies half way between them."""
        vocab_size, window = self.problem.vocab_size, self.smallest_window
        yield vocab_size
        while window < vocab_size:
            yield window
            if window * 3 // 2 < vocab_size and window > self.smallest_window:
                yield window * 3 // 2
            window *= 2

    def cost(self, name: str, tile: Tile) -> float:
        """Modelled passes, restarts included."""
        problem, card = self.problem, self.problem.card
        chunk, window, kept = tile
        overhead = card.restart_tokens / chunk
        # Whole rows in one piece start over with every chunk only.
        if name != "gradient_in_forward" or window < problem.vocab_size:
            overhead += card.restart_tokens / window
        converts = card.converts and problem.item_bytes != problem.sum_bytes
        if name == "gradient_in_forward" and converts and window < problem.vocab_size:
            overhead += _CONVERT / chunk
        cost = self.passes(name, kept) * (1 + overhead)
        if name == "gradient_in_forward" and problem.grad_weight and chunk < problem.num_tokens:
            share = problem.weight_columns / problem.hidden_size
            cost += card.accumulate_tokens * share / chunk
        return cost

    def idle(self, chunk: int) -> float:
        """Modelled passes lost where the gradient of a chunk's hidden states leaves a GPU idle."""
        card = self.problem.card
        if not self.problem.grad_hidden or not (card.wave_tile and card.multiprocessors):
            return 0.0
        tiles = -(-chunk // card.wave_tile) * -(-self.problem.hidden_size // card.wave_tile)
        waves = -(-tiles // card.multiprocessors)
        return card.wave_loss * (waves * card.multiprocessors / tiles - 1)

    def rank(self, schedule: Schedule) -> tuple[bool, float]:
        """Orders schedules: by cost those within the budget, then by size those that are not."""
        if schedule.workspace_bytes > self.budget:
            return True, schedule.workspace_bytes
        tile = Tile(schedule.chunk_tokens, schedule.vocab_window, schedule.kept_share)
        return False, self.cost(schedule.name, tile)

    def passes(self, name: str, kept: float) -> float:
        """Products of all tokens with the whole head."""
        backward = self.problem.grad_hidden + self.problem.grad_weight
        if name == "loss_only":
            return 1
        return 1 + backward if name == "gradient_in_forward" else 2 + backward - kept

    def schedule(self, name: str, tile: Tile, workspace: int) -> Schedule:
        """The record for people and engines."""
        problem, asked = self.problem, self.problem.budget_bytes
        fits = workspace <= asked
        verdict = f"within the budget of {_mib(asked)}"
        if not fits and self.raised_to is None:
            verdict = f"more than the budget of {_mib(asked)}"
        elif not fits:
            verdict = f"the budget of {_mib(asked)} was raised, the smallest step needs more"
        gradient = problem.num_tokens * problem.hidden_size if problem.grad_hidden else 0
        gradient += problem.vocab_size * problem.weight_columns
        return Schedule(
            name=name,
            chunk_tokens=tile.chunk_tokens,
            vocab_window=tile.vocab_window,
            passes=self.passes(name, tile.kept_share),
            workspace_bytes=workspace,
            gradient_bytes=gradient * problem.item_bytes,
            kept_share=tile.kept_share,
            fits=fits,
            reason=f"{_REASONS[name]}; {verdict}",
            late_rounding=self.is_late(name, tile),
            product_bytes=problem.product_bytes,
            tile_tokens=tile.chunk_tokens if problem.batch_invariant else 0,
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
