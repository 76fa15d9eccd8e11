"""Time over peak memory, one panel a case."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

from hf_fused_head.benchmark.report import cases_of

_MIB = 2**20


def require_matplotlib() -> None:
    """Fails early, before minutes of measurement.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("`--plot` needs matplotlib: pip install 'hf-fused-head[bench]'")


def save_plot(content: dict, path: Path) -> None:
    """Writes the picture of a document; contenders below and left of the line are the best known.

    Args:
        content: What `report.document` or `report.load` returns.
        path: Where the image goes; its suffix says the format.
    """
    from matplotlib.figure import Figure

    cases = {
        title: measured
        for title, rows in cases_of(content).items()
        if (measured := [row for row in rows if row["time_ms"] and row["peak_bytes"]])
    }
    columns = min(3, max(1, len(cases)))
    lines = max(1, math.ceil(len(cases) / columns))
    figure = Figure(figsize=(5.2 * columns, 4.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, (title, rows) in zip(axes, cases.items(), strict=False):
        _draw(panel, title, rows, _floor_ms(content, title))
    for panel in axes[len(cases) :]:
        panel.set_axis_off()
    device = content["header"]["device"]["name"]
    figure.suptitle(f"Time over peak memory beyond inputs, {device}", fontsize=11)
    figure.savefig(path, dpi=150)


def _floor_ms(content: dict, title: str) -> float | None:
    rows = cases_of(content)[title]
    return next((row["time_ms"] for row in rows if row["contender"] == "floor"), None)


def _draw(panel, title: str, rows: list[dict], floor_ms: float | None) -> None:
    for row in rows:
        ours = row["contender"].startswith("ours")
        point = (row["peak_bytes"] / _MIB, row["time_ms"])
        panel.plot(*point, marker="o" if ours else "s", color="tab:red" if ours else "tab:gray")
        panel.annotate(
            row["contender"], point, textcoords="offset points", xytext=(5, 4), fontsize=8
        )
    best = _pareto([(row["peak_bytes"] / _MIB, row["time_ms"]) for row in rows])
    panel.step(*zip(*best, strict=True), where="post", color="tab:red", alpha=0.3)
    if floor_ms:
        panel.axhline(floor_ms, color="black", linewidth=0.8, linestyle=":")
        panel.annotate("floor", (0.01, floor_ms), xycoords=("axes fraction", "data"), fontsize=8)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_title(title, fontsize=9)
    panel.set_xlabel("peak memory, MiB")
    panel.set_ylabel("time, ms")
    panel.margins(0.15)
    panel.set_ylim(bottom=0)


def _pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both directions, by growing memory."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best
