"""What terminals show: nothing cut off at 80 columns, `-h`, completion, plots that keep colours."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from rich.console import Console

from hf_fused_head.benchmark import plot, report
from hf_fused_head.benchmark.terminal import Grid

RESULTS = Path(report.__file__).parent / "results"
COMMANDS = {
    "models": ("models",),
    "plan --tokens": ("plan", "llama3-8b", "--tokens", 8192),
    "plan --memory": ("plan", "smoke", "--memory", "80GiB"),
    "bench": ("bench", "--from-json", RESULTS / "h200_training.json"),
    "bench, training": ("bench", "--from-json", RESULTS / "h200x2_training_step.json"),
    "bench, sharded": ("bench", "--from-json", RESULTS / "h200x2_vocab_parallel.json"),
    "compare": (
        *("bench", "compare", RESULTS / "h200_training.json", RESULTS / "h200_training.json"),
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_tables_fit_80_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*COMMANDS[command]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown


@pytest.mark.parametrize(
    "command", [(), ("doctor",), ("models",), ("plan",), ("bench",), ("bench", "compare")]
)
def test_h_is_help_that_fits_80_columns(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*command, "-h") == 0
    shown = capsys.readouterr().out
    assert "Usage: hf-fused-head" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown


@pytest.mark.parametrize("width", [40, 60, 80, 120, 400])
def test_a_grid_shows_every_cell_at_any_width(width: int) -> None:
    columns = ("name", *(f"number {letter}" for letter in "abcdefgh"), "words")
    rows = [
        (f"row{i}", *(f"{i}{j}.123456" for j in range(8)), f"[not markup] {'word ' * 9}end{i}")
        for i in range(3)
    ]
    out = io.StringIO()
    Console(file=out, width=width).print(Grid("title", columns, rows, words=("name", "words")))
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert all(cell in shown for row in rows for cell in row[:-1])
    assert all(f"end{i}" in shown for i in range(3)) and "[not" in shown and "…" not in shown
    assert shown.count("word ") + shown.count("word\n") >= 3 * 9


def test_a_pipe_without_columns_keeps_a_row_on_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert run("bench", "--from-json", RESULTS / "h200_training.json") == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("ours@4096"))
    assert line.split()[-1] == "passed"


@pytest.mark.parametrize(
    ("words", "expected"),
    [("hf-fused-head pl", "plan"), ("hf-fused-head plan llama3-8b-3", "llama3-8b-32k")],
)
def test_shells_complete_commands_and_workloads(words: str, expected: str) -> None:
    environment = {
        **os.environ,
        "_HF_FUSED_HEAD_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    program = "from hf_fused_head.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert expected in done.stdout.split(), done.stderr


def scaled(tmp_path: Path, name: str, factor: float, contender: str = "ours@4096") -> Path:
    """The committed result with one contender's ratios multiplied."""
    content = json.loads((RESULTS / "h200_training.json").read_text())
    for row in content["results"]:
        if row["contender"] == contender and row["floor_ratio"]:
            row["floor_ratio"] *= factor
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("factor", "options", "status"),
    [(1.02, (), 0), (1.04, (), 1), (0.5, (), 0), (1.04, ("--threshold", 0.05), 0)],
)
def test_compare_exits_with_1_where_a_ratio_grew(
    factor: float,
    options: tuple,
    status: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, new = scaled(tmp_path, "old", 1), scaled(tmp_path, "new", factor)
    file = tmp_path / "changes.json"
    assert run("bench", "compare", old, new, *options, "--json", file) == status
    changes = json.loads(file.read_text())["changes"]
    ours = [change for change in changes if change["contender"] == "ours@4096"]
    assert len(ours) == 6
    assert {change["verdict"] for change in ours} == ({"slower"} if status else {""})
    assert {change["verdict"] for change in changes if change not in ours} == {""}
    assert capsys.readouterr().err.count("6 of ") == status


def test_compare_reports_a_contender_that_no_longer_runs(tmp_path: Path) -> None:
    content = json.loads((RESULTS / "h200_training.json").read_text())
    row = next(row for row in content["results"] if row["contender"] == "ours@4096")
    row.update(status="failed", reason="RuntimeError: no", floor_ratio=None, time_ms=None)
    new = tmp_path / "new.json"
    new.write_text(json.dumps(content))
    assert run("bench", "compare", RESULTS / "h200_training.json", new) == 1


def test_compare_needs_ratios_in_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = RESULTS / "h200_training.json", RESULTS / "cpu_smollm2.json"
    assert run("bench", "compare", *files) == 2
    assert "`OLD` and `NEW` must share a ratio to the floor" in capsys.readouterr().err
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    assert run("bench", "compare", files[0], empty) == 2
    assert "`NEW` must be a file of `bench --json`" in capsys.readouterr().err


def test_a_contender_has_one_colour_in_every_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    saved = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: saved.append(self))
    for name in ("h200_training", "cpu_smollm2", "h200_half_ignored", "h200x2_training_step"):
        plot.save_plot(json.loads((RESULTS / f"{name}.json").read_text()), tmp_path / "x.png")
    colors: dict[str, set] = {}
    for drawn in saved:
        drawn.draw_without_rendering()
        width = drawn.bbox.width
        titles = [panel.title for panel in drawn.axes] + [drawn._suptitle]
        extents = [text.get_window_extent() for text in titles]
        assert all(box.x0 >= 0 and box.x1 <= width for box in extents)
        assert drawn.legends[0].get_window_extent().width <= width
        for panel in drawn.axes:
            assert len(panel.get_yticks()) >= 3
            for line in panel.get_lines():
                colors.setdefault(str(line.get_label()), set()).add(line.get_color())
    assert colors["stock"] and all(len(found) == 1 for found in colors.values()), colors
    peers = [colors[name].copy().pop() for name in ("stock", "torch", "liger", "trl", "quack")]
    assert len(set(peers)) == len(peers)
