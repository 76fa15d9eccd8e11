"""Time over peak memory, one panel a case."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

from hf_fused_head.benchmark.contenders import CONTENDERS, OUR_IMPLS
from hf_fused_head.benchmark.report import cases_of

_MIB = 2**20
# By place among all contenders, so that a colour does not depend on who was measured.
_PEERS = tuple(name for name in CONTENDERS if name not in OUR_IMPLS and name != "floor")
_OURS_COLOR = "tab:red"


def require_matplotlib() -> None:
    """Fails early, before minutes of measurement.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("`--plot` needs matplotlib: pip install 'hf-fused-head[bench]'")


def save_plot(content: dict, path: Path) -> None:
    """Writes the picture of a document; nothing is known below and left of the grey line.

    A contender has the same colour in every picture, whoever else is in it.

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
    figure = Figure(figsize=(5.2 * columns, 4.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, (title, rows) in zip(axes, cases.items(), strict=False):
        _draw(panel, title, rows, _floor_ms(content, title))
    for panel in axes[len(cases) :]:
        panel.set_axis_off()
    named = {
        label: handle
        for panel in axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    labels = sorted(named, key=_place_in_legend)
    figure.legend(
        [named[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 4 * columns) or 1,
        fontsize=9,
    )
    device = content["header"]["device"]["name"]
    whole_step = content["header"].get("kind") == "training step"
    what = "peak memory of a step" if whole_step else "peak memory beyond inputs"
    figure.suptitle(f"Time over {what}\n{device}", fontsize=11)
    figure.savefig(path, dpi=150)


def _color(contender: str) -> str:
    """Of a peer; those that are not contenders here, such as "alone", share grey."""
    # The colour of ours is left out; beyond nine peers colours repeat.
    palette = [f"C{index}" for index in range(10) if index != 3]
    known = contender in _PEERS
    return palette[_PEERS.index(contender) % len(palette)] if known else "dimgray"


def _place_in_legend(label: str) -> tuple[int, str]:
    """Ours first, then the peers in one order, then the lines."""
    if label.startswith("ours"):
        return 0, label
    return (1 + _PEERS.index(label) if label in _PEERS else 1 + len(_PEERS)), label


def _is_peer(contender: str) -> bool:
    return not contender.startswith("ours")


def _floor_ms(content: dict, title: str) -> float | None:
    rows = cases_of(content)[title]
    return next((row["time_ms"] for row in rows if row["contender"] == "floor"), None)


def _draw(panel, title: str, rows: list[dict], floor_ms: float | None) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    points = {row["contender"]: (row["peak_bytes"] / _MIB, row["time_ms"]) for row in rows}
    for name, point in points.items():
        if _is_peer(name):
            panel.plot(*point, marker="s", linestyle="", color=_color(name), label=name)
    ours = [point for name, point in points.items() if not _is_peer(name)]
    if ours:
        many = "ours, by budget" if len(ours) > 1 else "ours"
        panel.plot(*zip(*sorted(ours), strict=True), "o-", color=_OURS_COLOR, label=many)
    panel.step(
        *zip(*_pareto(list(points.values())), strict=True),
        where="post",
        color="black",
        alpha=0.25,
        label="best known",
    )
    if floor_ms:
        panel.axhline(floor_ms, color="black", linewidth=0.8, linestyle=":", label="floor")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.margins(0.1)
    for axis, (low, high) in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim())):
        if high < 8 * low:
            # Too few powers of two to read values from.
            axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    name, _, shape = title.partition(" ")
    panel.set_title(f"{name}\n{shape}", fontsize=9)
    panel.set_xlabel("peak memory, MiB")
    panel.set_ylabel("time, ms")


def _pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both directions, by growing memory."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best
