"""`hf-fused-head bench`: contenders side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_fused_head.commands import common
from hf_fused_head.commands.common import DeviceOption, ForceOption, JsonOption

if TYPE_CHECKING:
    import torch

    from hf_fused_head.benchmark.contenders import Entrant
    from hf_fused_head.benchmark.suite import Case, Settings


class Format(str, Enum):
    """How `bench` shows results."""

    table = "table"
    markdown = "markdown"
    matrix = "matrix"


def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WORKLOAD]...",
            help="Names; default: those meant for the device.",
            autocompletion=common.workload_names,
        ),
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            "--contender", "-c", help="Repeat or separate by commas; ours@MIB sets a budget."
        ),
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option("--mode", "-m", help="fwd, fwd+bwd (default) or frozen.")
    ] = None,
    ignored: Annotated[
        list[float] | None,
        typer.Option("--ignored", min=0.0, max=0.99, help="Fraction of the labels ignored."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Default: the workload's own.")
    ] = None,
    budget_mib: Annotated[
        list[int] | None, typer.Option("--budget-mib", min=1, help="For ours; repeat for several.")
    ] = None,
    every_schedule: Annotated[
        bool, typer.Option("--every-schedule", help="Ours once for every schedule there is.")
    ] = False,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed rounds.")] = 10,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Untimed rounds before.")] = 2,
    check: Annotated[
        bool, typer.Option("--check", help="Stop before timing if ours is not as near as stock.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the data.")] = 0,
    device: DeviceOption = None,
    from_json: Annotated[
        Path | None,
        typer.Option("--from-json", metavar="FILE", help="Show a saved run instead of measuring."),
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="matrix: a line a workload, a column a contender.")
    ] = Format.table,
    json_file: JsonOption = None,
    commit: Annotated[
        str | None,
        typer.Option("--commit", help="Of this source, for the header; default: what git says."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw time over peak memory."),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Measure contenders side by side: time, peak memory, error, distance from bare products.

    Two saved runs: hf-fused-head bench compare OLD.json NEW.json

    On several ranks: torchrun --nproc-per-node=2 -m hf_fused_head.benchmark.parallel --help
    """
    common.refuse_overwriting(json_file, plot, force=force)
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise common.UserError(
            f"`--plot` must end in .png, .svg or .pdf, got {plot}: choose such a name"
        )
    # The meter of CPU memory is torch's profiler, whose start and stop would be logged.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from hf_fused_head.benchmark import contenders, report, suite
    from hf_fused_head.benchmark import plot as drawing

    names = list(contenders.DEFAULT_CONTENDERS) if contender is None else _split(contender)
    modes = _split(mode) or ["fwd+bwd"]
    kind = dtype and str(common.dtype_named(dtype)).removeprefix("torch.")
    try:
        if plot is not None:
            drawing.require_matplotlib()
        target = common.device_named(device)
        cases = suite.cases(workloads or (), modes, ignored or [0.0], kind, target)
        entrants = contenders.entrants(names, budget_mib or [])
        content = None if from_json is None else report.load(from_json)
    except (ValueError, ImportError) as error:
        raise common.UserError(common.in_options(str(error))) from error
    if content is None:
        settings = suite.Settings(repeats, warmup, check, every_schedule, seed)
        content = _measure(cases, entrants, settings, target, commit, json_file)
    else:
        common.write_json(json_file, content)
    _show_bench(content, form)
    if plot is not None:
        drawing.save_plot(content, plot)
    if content["header"].get("stopped"):
        raise common.UserError(content["header"]["stopped"])


def _split(values: Iterable[str] | None) -> list[str]:
    return [part for value in values or () for part in value.split(",") if part]


def _measure(
    cases: list[Case],
    entrants: list[Entrant],
    settings: Settings,
    device: torch.device,
    commit: str | None,
    json_file: Path | None,
) -> dict:
    """Measures the cases one by one; the file holds what is done, should the run be killed."""
    from hf_fused_head.benchmark import contenders, environment, report, suite

    steps = None if settings.every_schedule else suite.num_steps(len(entrants), settings)
    header = environment.header(device, contenders.PEER_PACKAGES, settings.protocol(device))
    header["commit"] = commit or header["commit"]
    records = []
    try:
        with common.progress_bar() as progress:
            for number, case in enumerate(cases, 1):
                task = progress.add_task(f"{number}/{len(cases)} {case}", total=steps)
                advance: Callable[[], None] = lambda task=task: progress.advance(task)  # noqa: E731
                try:
                    records += suite.run_case(case, entrants, settings, device, advance)
                except suite.DoesNotFit as error:
                    # What is measured already may have cost an hour: it is shown and written.
                    header["stopped"] = str(error)
                    break
                finally:
                    if records:
                        common.write_json(json_file, report.document(header, records))
                progress.remove_task(task)
    except suite.CheckFailed as error:
        raise typer.Exit(common.fail(f"check failed, nothing was timed: {error}", 1)) from error
    return report.document(header, records)


def _show_bench(content: dict, form: Format) -> None:
    from hf_fused_head.benchmark import report

    if form is not Format.table:
        typer.echo((report.markdown if form is Format.markdown else report.matrix)(content))
        return
    for line in report.header_lines(content["header"]):
        common.say(line)
    for table in report.tables(content):
        common.console().print(table)
