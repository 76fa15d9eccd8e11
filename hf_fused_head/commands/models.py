"""`hf-fused-head models`: the support table."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from typing import Annotated

import typer

from hf_fused_head.commands import common
from hf_fused_head.commands.common import ForceOption, JsonOption


class ModelsFormat(str, Enum):
    """How `models` shows its table."""

    table = "table"
    markdown = "markdown"


def models(
    form: Annotated[
        ModelsFormat, typer.Option("--format", help="markdown: the README's table.")
    ] = ModelsFormat.table,
    json_file: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """List every class that was compared with stock, by model family; markdown: condensed."""
    common.refuse_overwriting(json_file, force=force)
    from hf_fused_head.benchmark.report import support_markdown, support_table
    from hf_fused_head.patches import supported_models

    rows = supported_models()
    if form is ModelsFormat.markdown:
        typer.echo(support_markdown(rows))
    else:
        common.console().print(support_table(rows))
    common.write_json(json_file, {"models": [asdict(row) for row in rows]})
