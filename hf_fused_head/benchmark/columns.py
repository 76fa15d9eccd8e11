"""What the tables of each kind of measurement show of a record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MIB = 2**20

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


def number(value: float | None, form: str) -> str:
    """A number in a format, "" for None."""
    return "" if value is None else format(value, form)


def mebibytes(nbytes: int | None) -> str:
    """Bytes in MiB, with digits where there are few; "" for None."""
    if nbytes is None:
        return ""
    return f"{nbytes / _MIB:.0f}" if nbytes >= 10 * _MIB else f"{nbytes / _MIB:.2f}"


def gibibytes(nbytes: int) -> str:
    """Bytes in GiB with two digits."""
    return f"{nbytes / 2**30:,.2f}"


def _verdict(row: Row) -> str:
    failed = (row["check"] or "passed") != "passed"
    return "error > 2x stock" if failed else row["check"] or ""


def _losses(row: Row) -> str:
    return f"{row['losses'][0]:.4f} to {row['losses'][-1]:.4f}"


_FIRST: Columns = {"contender": lambda row: row["contender"]}
_SCHEDULE: Columns = {
    "schedule": lambda row: f"{row['impl']}: {row['schedule']}" if row["impl"] else ""
}
_TIMES: Columns = {
    "ms": lambda row: number(row["time_ms"], ".2f"),
    "min-max ms": lambda row: f"{row['min_ms']:.2f}-{row['max_ms']:.2f}",
}
# Missing in older files, and on a CPU.
_HOST = "host ms"
_PEAK: Columns = {"peak MiB": lambda row: mebibytes(row["peak_bytes"])}
_ERRORS: Columns = {
    "loss error": lambda row: number(row["loss_error"], ".1e"),
    "dX error": lambda row: number(row["dhidden_error"], ".1e"),
    "dW error": lambda row: number(row["dweight_error"], ".1e"),
    "check": _verdict,
}
# By `kind` in the header of a result.
_OF_KIND: dict[str | None, Columns] = {
    None: {
        **_FIRST,
        **_SCHEDULE,
        **_TIMES,
        _HOST: lambda row: number(row.get("host_ms"), ".2f"),
        "x floor": lambda row: number(row["floor_ratio"], ".2f"),
        **_PEAK,
        **_ERRORS,
    },
    "sharded head": {
        **_FIRST,
        **_SCHEDULE,
        "rows a rank": lambda row: str(row["rows"]),
        **_TIMES,
        "efficiency": lambda row: number(row["efficiency"], ".3f"),
        "forward B/token": lambda row: number(row["forward_sent_bytes_per_token"], ".2f"),
        "backward MiB": lambda row: mebibytes(row["backward_sent_bytes"]),
        **_PEAK,
        **_ERRORS,
    },
    "training step": {
        **_FIRST,
        **_TIMES,
        "tokens/s": lambda row: number(row["tokens_per_second"], ".0f"),
        "held MiB": lambda row: mebibytes(row["held_bytes"]),
        **_PEAK,
        "losses": _losses,
        "from stock": lambda row: number(row["loss_distance"], ".1e"),
    },
}
# Columns of words; the others are numbers.
WORDS = ("contender", "schedule", "losses", "check")


def columns_of(content: dict) -> Columns:
    """What the tables of a document show, by the titles of the columns."""
    columns = _OF_KIND[content["header"].get("kind")]
    if any(row.get("host_ms") is not None for row in content["results"]):
        return columns
    return {name: cell for name, cell in columns.items() if name != _HOST}


def cells(row: Row, columns: Columns) -> list[str]:
    """One line of a case's table; a contender that did not run says why in the last cell."""
    if row["status"] != "ok":
        brief = row["status"] in ("not installed", "out of memory")
        verdict = row["status"] if brief else f"{row['status']}: {row['reason']}"
        return [row["contender"], *[""] * (len(columns) - 2), verdict]
    return [cell(row) for cell in columns.values()]
