"""Two files of `bench --json` side by side: ratios to the floor, which machines do not change."""

from __future__ import annotations

from dataclasses import dataclass

from hf_fused_head.benchmark.columns import number
from hf_fused_head.benchmark.report import cases_of
from hf_fused_head.benchmark.terminal import Grid

_BROKEN = ("failed", "out of memory")


@dataclass(frozen=True)
class Change:
    """One contender in one case.

    Attributes:
        case: Title of its table.
        contender: Its name.
        old_ratio: Time over that of the bare matrix products in the old file; None without.
        new_ratio: The same in the new file.
        growth: `new_ratio / old_ratio - 1`; None where one of them is missing.
        verdict: "slower" where it grew by more than the threshold, "broken" where it no longer
            runs, "only in one file", or "".
    """

    case: str
    contender: str
    old_ratio: float | None
    new_ratio: float | None
    growth: float | None
    verdict: str

    @property
    def is_regression(self) -> bool:
        """Whether the new file is worse."""
        return self.verdict in ("slower", "broken")


def compare(old: dict, new: dict, threshold: float) -> list[Change]:
    """Every contender but the floor, in the order of the new file.

    Args:
        old: A document of `bench --json`.
        new: Another one.
        threshold: By which share a ratio may grow.

    Raises:
        ValueError: If no ratio is in both files.
    """
    before, after = _rows(old), _rows(new)
    changes = [
        _change(key, before.get(key), after.get(key), threshold)
        for key in dict.fromkeys((*after, *before))
    ]
    if all(change.growth is None and change.verdict != "broken" for change in changes):
        raise ValueError(
            "`OLD` and `NEW` must share a ratio to the floor, got none: measure the same workloads "
            "with the contender `floor` in both"
        )
    return changes


def _rows(content: dict) -> dict[tuple[str, str], dict]:
    return {
        (title, row["contender"]): row
        for title, rows in cases_of(content).items()
        for row in rows
        if row["contender"] != "floor"
    }


def _change(key: tuple[str, str], old: dict | None, new: dict | None, threshold: float) -> Change:
    old_ratio, new_ratio = ((row or {}).get("floor_ratio") for row in (old, new))
    growth, verdict = None, ""
    if old_ratio and new_ratio:
        growth = new_ratio / old_ratio - 1
        verdict = "slower" if growth > threshold else ""
    elif old is None or new is None:
        verdict = "only in one file"
    elif old["status"] == "ok" and new["status"] in _BROKEN:
        verdict = "broken"
    case, contender = key
    return Change(case, contender, old_ratio, new_ratio, growth, verdict)


def table(changes: list[Change], threshold: float) -> Grid:
    """The comparison, for a terminal."""
    columns = ("workload", "contender", "old ratio", "new ratio", "change", "verdict")
    rows = [
        (
            change.case,
            change.contender,
            number(change.old_ratio, ".3f"),
            number(change.new_ratio, ".3f"),
            number(change.growth, "+.1%"),
            change.verdict,
        )
        for change in changes
    ]
    title = f"ratios to the floor: time over that of the bare products; slower: +{threshold:.1%}"
    styles = ["red" if change.is_regression else "" for change in changes]
    return Grid(title, columns, rows, words=("workload", "contender", "verdict"), styles=styles)
