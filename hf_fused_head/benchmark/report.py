"""What people read: the table, the JSON file, and the README's table made from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fused_head.benchmark.columns import WORDS, cells, columns_of, mebibytes, number
from hf_fused_head.benchmark.suite import Record
from hf_fused_head.benchmark.terminal import Grid

if TYPE_CHECKING:
    from hf_fused_head.patches import SupportRow


def write_json(path: Path, content: dict) -> None:
    """Writes a document; what is not a finite number becomes null, as JSON has no name for it."""
    path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, all cells as given."""
    columns = list(columns)
    return "\n".join([_line(columns), "|---" * len(columns) + "|", *(_line(row) for row in rows)])


def support_table(rows: Sequence[SupportRow]) -> Grid:
    """Every row for a terminal: what is known of the family, or why it is not fused."""
    columns = ("family", "classes", "support", "calls")
    cells = [
        (
            row.family,
            ", ".join(row.classes),
            _support(row),
            str(row.scenarios),
        )
        for row in rows
    ]
    title = "model families of transformers; calls: how many were compared with the stock model"
    return Grid(title, columns, cells, words=columns[:-1])


def _support(row: SupportRow) -> str:
    facts = (row.scale, row.softcap, row.added, row.shift, row.extras)
    return "; ".join(filter(None, (row.status, *facts, row.reason)))


def support_markdown(rows: Sequence[SupportRow]) -> str:
    """The support table of the README: counts, families with facts, and what is not fused."""
    swept = [row for row in rows if row.status != "not swept"]
    columns = ("family", "classes", "scale", "softcap", "bias", "labels", "ways compared")
    cells = [
        (
            *(row.family, ", ".join(row.classes)),
            *(row.scale, row.softcap, row.added, row.shift, _ways(row)),
        )
        for row in rows
        if row.registered and row.status in ("fused", "not swept")
    ]
    refused = [
        (name, row.reason) for row in swept if row.status == "refused" for name in row.classes
    ]
    missing = [name for row in swept if row.status == "not built" for name in row.classes]
    return "\n\n".join(
        [
            *(_counts(swept, task) for task in _TASKS),
            markdown_table(columns, cells),
            markdown_table(("refused", "why"), refused),
            f"Never built small, so not compared: {', '.join(missing) or 'none'}.",
        ]
    )


_TASKS = {
    "causal": "causal language models",
    "multimodal": "other multimodal classes, by text",
    "seq2seq": "sequence-to-sequence classes, of text and speech",
    "masked": "masked language models",
    "pretraining": "classes that also judge the whole text",
}


def _counts(rows: Sequence[SupportRow], task: str) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        if row.task == task:
            counts[row.status] = counts.get(row.status, 0) + len(row.classes)
    versions = ", ".join(sorted({row.transformers for row in rows}))
    verdicts = ", ".join(f"{counts[status]} {status}" for status in sorted(counts))
    text = f"transformers {versions}, {sum(counts.values())} {_TASKS[task]}: {verdicts}."
    if task in ("causal", "multimodal"):
        return text
    fused = [row for row in rows if row.task == task and row.status == "fused"]
    return f"{text} Fused: {', '.join(sorted(name for row in fused for name in row.classes))}."


def _ways(row: SupportRow) -> str:
    return f"from {row.transformers}" if row.status == "not swept" else str(row.scenarios)


def document(header: dict, records: Iterable[Record]) -> dict:
    """The content of the JSON file."""
    return {"header": header, "results": [asdict(record) for record in records]}


def load(path: Path, name: str = "--from-json") -> dict:
    """A document from a JSON file.

    Args:
        path: Of the file.
        name: What the caller calls it, for messages.

    Raises:
        ValueError: If the file is not one that `bench --json` wrote.
    """
    refusal = f"`{name}` must be a file of `bench --json`, got {path}"
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{refusal}: {error}") from error
    if not isinstance(content, dict) or not {"header", "results"} <= content.keys():
        raise ValueError(f"{refusal}: no header or no results")
    return content


def cases_of(content: dict) -> dict[str, list[dict]]:
    """Results grouped by case, in the order of the file; the key is the case's title."""
    groups: dict[str, list[dict]] = {}
    for row in content["results"]:
        ignored = f", {row['ignored']:.0%} ignored" if row["ignored"] else ""
        shape = f"{row['num_tokens']}x{row['hidden_size']}x{row['vocab_size']}"
        title = f"{row['workload']} {shape} {row['dtype']}, {row['mode']}{ignored}"
        groups.setdefault(title, []).append(row)
    return groups


def header_lines(header: dict) -> list[str]:
    """The header in words: device, versions, commit, protocol."""
    device = header["device"]
    memory = device.get("memory_bytes")
    size = f", {memory / 2**30:.0f} GiB" if memory else ""
    installed = [f"{name} {version}" for name, version in header["versions"].items() if version]
    protocol = header["protocol"]
    return [
        f"{device['name']}{size}; {header['cpu_threads']} CPU threads; {header['date']}",
        ", ".join(installed) + (f"; commit {_brief(header['commit'])}" if header["commit"] else ""),
        *_rank_lines(header.get("ranks")),
        f"{protocol['repeats']} repeats after {protocol['warmup']} warm-up, {protocol['order']}; "
        f"{protocol['clock']}; time: {protocol['time']}; memory: {protocol['memory']}; "
        f"errors: {protocol['errors']}; data: {protocol['data']}",
    ]


def _rank_lines(ranks: dict | None) -> list[str]:
    if ranks is None:
        return []
    size = ranks["world_size"]
    line = f"{size} rank{'s' if size > 1 else ''} over {ranks['backend']}"
    if ranks["shared_device"]:
        line += ", several on a device: times are NOT meaningful, bytes and errors are"
    return [line]


def _brief(commit: str) -> str:
    digest, plus, changes = commit.partition("+")
    return digest[:12] + plus + changes


def tables(content: dict) -> list[Grid]:
    """One table a case, for a terminal."""
    columns = columns_of(content)
    return [
        Grid(
            title,
            list(columns),
            [cells(row, columns) for row in rows],
            words=WORDS,
            styles=[_style(row) for row in rows],
        )
        for title, rows in cases_of(content).items()
    ]


def _style(row: dict) -> str:
    if row["status"] == "ok" and (row["check"] or "passed") != "passed":
        return "red"
    return "bold" if row["contender"].startswith("ours") else ""


def markdown(content: dict) -> str:
    """The header and one Markdown table a case."""
    lines = [f"{line}  " for line in header_lines(content["header"])]
    columns = columns_of(content)
    rule = "".join("---|" if column in WORDS else "---:|" for column in columns)
    for title, rows in cases_of(content).items():
        lines += ["", f"**{title}**", "", _line(columns), f"|{rule}"]
        lines += [_line(cells(row, columns)) for row in rows]
    return "\n".join(lines) + "\n"


def matrix(content: dict) -> str:
    """One Markdown table a mode: a line a workload, a column a contender, `ms / peak MiB`."""
    names = list(dict.fromkeys(row["contender"] for row in content["results"]))
    modes: dict[str, dict[str, dict[str, dict]]] = {}
    for title, rows in cases_of(content).items():
        mode = title.rpartition(f" {rows[0]['dtype']}, ")[2]
        case = f"{title[: -len(mode) - 2]}"
        modes.setdefault(mode, {})[case] = {row["contender"]: row for row in rows}
    lines = [f"{line}  " for line in header_lines(content["header"])]
    for mode, by_case in modes.items():
        lines += ["", f"**{mode}**, ms / peak MiB", "", _line(["workload", *names])]
        lines.append("|---|" + "---:|" * len(names))
        for case, by_name in by_case.items():
            lines.append(
                _line([case, *(_matrix_cell(by_name.get(name), by_name) for name in names)])
            )
    return "\n".join(lines) + "\n"


def _matrix_cell(row: dict | None, by_name: dict[str, dict]) -> str:
    if row is None or row["status"] != "ok":
        return "-" if row is None else row["status"]
    times = [
        other["time_ms"]
        for other in by_name.values()
        if other["time_ms"] and other["contender"] != "floor"
    ]
    time = number(row["time_ms"], ".1f")
    if row["contender"] != "floor" and row["time_ms"] == min(times):
        time = f"**{time}**"
    return f"{time} / {mebibytes(row['peak_bytes'])}" if row["peak_bytes"] is not None else time


def _line(parts: Iterable[str]) -> str:
    return "| " + " | ".join(part.replace("|", "/") for part in parts) + " |"
