"""What the commands share: options, errors of the caller, consoles, JSON files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hf_fused_head.benchmark.model_configs import CONFIGS
from hf_fused_head.benchmark.terminal import console

if TYPE_CHECKING:
    import torch

JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write what the table shows as JSON.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite existing output files.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu or cuda; default: the first GPU, else the CPU."),
]


def workload_names(incomplete: str) -> list[str]:
    """For the completion of shells."""
    return [name for name in CONFIGS if name.startswith(incomplete)]


class UserError(Exception):
    """Something the caller can mend; the message becomes one line on stderr, the exit code 2."""


def fail(message: str, code: int) -> int:
    """Writes one line to stderr and returns the exit code."""
    typer.echo(f"hf-fused-head: {' '.join(message.split())}", err=True)
    return code


def device_named(name: str | None) -> torch.device:
    """The device that `--device` names; the default without."""
    from hf_fused_head.benchmark import environment

    try:
        return environment.device_named(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def dtype_named(name: str) -> torch.dtype:
    """The dtype that `--dtype` names."""
    from hf_fused_head.options import FLOAT_DTYPES

    known = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
    if name not in known:
        raise UserError(f"`--dtype` must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def refuse_overwriting(*files: Path | None, force: bool) -> None:
    """Raises before any work where an output file exists and `--force` is not given."""
    from hf_fused_head.benchmark import files as paths

    try:
        paths.refuse_overwriting(*files, force=force)
    except ValueError as error:
        raise UserError(str(error)) from error


def write_json(file: Path | None, content: dict) -> None:
    """Writes what a table shows; nothing without a file."""
    if file is None:
        return
    from hf_fused_head.benchmark import report

    try:
        report.write_json(file, content)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def say(line: str) -> None:
    """Prints words, which wrap at the width of the console."""
    console().print(line, highlight=False, markup=False)


# What arguments of functions are called on the command line.
_OPTIONS = {
    "`impl`": "`--impl`",
    "`contender`": "`--contender`",
    "`memory_budget_mib`": "`--budget-mib`",
    "`load_in_4bit`": "`--load-in-4bit`",
}


def in_options(message: str) -> str:
    """The message of a function, in the words of the command line."""
    for argument, option in _OPTIONS.items():
        message = message.replace(argument, option)
    return re.sub(r"\bimpl='(\w+)'", r"`--impl \1`", message)


def progress_bar() -> Progress:
    """A progress bar on stderr, for people only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
