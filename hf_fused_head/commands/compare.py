"""`hf-fused-head bench compare`: whether a newer measurement is slower."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hf_fused_head.commands import common
from hf_fused_head.commands.common import ForceOption, JsonOption


def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD.json", help="Of `bench --json`.")],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="The same, later.")],
    threshold: Annotated[
        float, typer.Option("--threshold", min=0.0, help="By which share a ratio may grow.")
    ] = 0.03,
    json_file: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Compare ratios to the floor of two runs; exit 1 if one grew by more than the threshold.

    A ratio to the floor is a time divided by that of the bare matrix products of the same run.
    """
    common.refuse_overwriting(json_file, force=force)
    from hf_fused_head.benchmark import compare as comparison
    from hf_fused_head.benchmark import report

    try:
        documents = report.load(old, "OLD"), report.load(new, "NEW")
        changes = comparison.compare(*documents, threshold)
    except ValueError as error:
        raise common.UserError(str(error)) from error
    devices = [document["header"]["device"]["name"] for document in documents]
    if devices[0] != devices[1]:
        common.say(f"on different devices: {devices[0]} and {devices[1]}")
    common.console().print(comparison.table(changes, threshold))
    content = {"threshold": threshold, "changes": [asdict(change) for change in changes]}
    common.write_json(json_file, content)
    worse = sum(change.is_regression for change in changes)
    if worse:
        message = f"{worse} of {len(changes)} ratios to the floor grew by more than {threshold:.1%}"
        raise typer.Exit(common.fail(message, 1))
