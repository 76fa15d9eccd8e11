"""`hf-fused-head`: doctor, models, plan, bench.

Every module that needs torch is imported inside its command, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    import torch

    from hf_fused_head.benchmark.contenders import Entrant
    from hf_fused_head.benchmark.suite import Case, Settings

app = typer.Typer(
    name="hf-fused-head",
    help="The loss of a causal language model inside its LM head: check, plan and measure it.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

# The base of typer's usage errors; some releases of typer carry a click of their own, so that the
# class is reached through the one name that all of them export.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]

JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write what the table shows as JSON.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite existing output files.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu or cuda; default: the first GPU, else the CPU."),
]


class UserError(Exception):
    """Something the caller can mend; the message becomes one line."""


class ModelsFormat(str, Enum):
    """How `models` shows its table."""

    table = "table"
    markdown = "markdown"


class Format(str, Enum):
    """How `bench` shows results."""

    table = "table"
    markdown = "markdown"
    matrix = "matrix"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 a check failed, 2 a user error."""
    try:
        code = app(args=arguments, prog_name="hf-fused-head", standalone_mode=False)
    except UserError as error:
        code = _complain(str(error), 2)
    except typer.Abort:
        code = _complain("interrupted", 130)
    except _USAGE_ERROR as error:
        code = _complain(error.format_message(), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str, code: int) -> int:
    typer.echo(f"hf-fused-head: {' '.join(message.split())}", err=True)
    return code


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """The loss of a causal language model inside its LM head: check, plan and measure it."""
    if version:
        from hf_fused_head.version import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def doctor(
    device: DeviceOption = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Ignore kernels that Triton compiled before.")
    ] = False,
    json_file: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Check this machine: versions, every implementation against float64, what auto chooses."""
    _refuse_overwriting(json_file, force=force)
    with tempfile.TemporaryDirectory() as empty:
        if cold:
            # Read when triton is imported, which nothing has done yet.
            os.environ["TRITON_CACHE_DIR"] = empty
        from hf_fused_head import doctor as logic
        from hf_fused_head.benchmark import environment

        target = _device(device)
        content = {
            "versions": environment.versions(),
            "devices": [environment.describe(found) for found in environment.devices()],
            "checked_device": str(target),
            "cold": cold,
            "auto": [asdict(choice) for choice in logic.auto_choices(target)],
            "checks": [asdict(check) for check in logic.self_checks(target)],
        }
    console = _console()
    for line in logic.lines(content):
        console.print(line, highlight=False, markup=False)
    for table in logic.tables(content):
        console.print(table)
    _write_json(json_file, content)
    if any(check["status"] == "failed" for check in content["checks"]):
        raise typer.Exit(_complain("a self-check failed", 1))


@app.command()
def models(
    form: Annotated[
        ModelsFormat, typer.Option("--format", help="markdown: the README's table.")
    ] = ModelsFormat.table,
    json_file: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """List every class that was compared with stock, by model family; markdown: condensed."""
    _refuse_overwriting(json_file, force=force)
    from hf_fused_head.benchmark.report import support_markdown, support_table
    from hf_fused_head.patches import supported_models

    rows = supported_models()
    if form is ModelsFormat.markdown:
        typer.echo(support_markdown(rows))
    else:
        _console().print(support_table(rows))
    _write_json(json_file, {"models": [asdict(row) for row in rows]})


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG",
            help="Hub name, model folder, config file, or the name of a bench workload.",
        ),
    ],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens a step, batch x length.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the weights; default: what the model states.")
    ] = None,
    budget_mib: Annotated[
        int | None, typer.Option("--budget-mib", min=1, help="Workspace the head may use.")
    ] = None,
    frozen_head: Annotated[
        bool, typer.Option("--frozen-head", help="The head gets no gradient, as with LoRA.")
    ] = False,
    per_token: Annotated[
        bool, typer.Option("--per-token", help='Gradients arrive per token (reduction="none").')
    ] = False,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Ranks that share the vocabulary.")] = 1,
    fsdp: Annotated[int, typer.Option("--fsdp", min=1, help="Ranks that share the weights.")] = 1,
    sp: Annotated[int, typer.Option("--sp", min=1, help="Ranks that share every sequence.")] = 1,
    impl: Annotated[str, typer.Option("--impl", help="auto, triton, torch or reference.")] = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Show memory and passes of the stock head and of every schedule of the fused one.

    With --tp, --fsdp or --sp all of it is of one rank, and what that rank holds and sends beside it
    is shown too.
    """
    _refuse_overwriting(json_file, force=force)
    from hf_fused_head.benchmark import environment, estimate, scaling

    # A plan may be for a machine that this one is not, so the device need not be here.
    device_type = device or environment.default_device().type
    if device_type not in ("cpu", "cuda"):
        raise UserError(f"`--device` must be cpu or cuda, got {device_type!r}")
    layout = scaling.Layout(tp, fsdp, sp)
    try:
        shape = estimate.read_shape(model, None if dtype is None else _dtype(dtype))
        share = scaling.per_rank(shape, tokens, layout, frozen_head)
        result = estimate.estimate(
            replace(shape, vocab_size=share.rows),
            share.tokens,
            device_type=device_type,
            impl=impl,
            frozen_head=frozen_head,
            per_token=per_token,
            memory_budget_mib=budget_mib,
            shared_hidden=tp > 1,
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    content = result.document()
    console = _console()
    if layout.ranks > 1:
        content["rank"] = asdict(share)
        console.print(estimate.rank_line(content["rank"]), highlight=False, markup=False)
    console.print(estimate.headline(content), highlight=False, markup=False)
    console.print(estimate.table(content))
    _write_json(json_file, content)


@app.command()
def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORKLOAD]...", help="Names; default: those meant for the device."),
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

    On several ranks: torchrun --nproc-per-node=2 -m hf_fused_head.benchmark.parallel --help
    """
    _refuse_overwriting(json_file, plot, force=force)
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"`--plot` must end in .png, .svg or .pdf, got {plot}: choose such a name")
    # The meter of CPU memory is torch's profiler, whose start and stop would be logged.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from hf_fused_head.benchmark import contenders, report, suite
    from hf_fused_head.benchmark import plot as drawing

    names = list(contenders.DEFAULT_CONTENDERS) if contender is None else _split(contender)
    modes = _split(mode) or ["fwd+bwd"]
    kind = dtype and str(_dtype(dtype)).removeprefix("torch.")
    try:
        if plot is not None:
            drawing.require_matplotlib()
        target = _device(device)
        cases = suite.cases(workloads or (), modes, ignored or [0.0], kind, target)
        entrants = contenders.entrants(names, budget_mib or [])
        content = None if from_json is None else report.load(from_json)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    if content is None:
        settings = suite.Settings(repeats, warmup, check, every_schedule, seed)
        content = _measure(cases, entrants, settings, target, commit, json_file)
    else:
        _write_json(json_file, content)
    _show_bench(content, form)
    if plot is not None:
        drawing.save_plot(content, plot)
    if content["header"].get("stopped"):
        raise UserError(content["header"]["stopped"])


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
        with _progress() as progress:
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
                        _write_json(json_file, report.document(header, records))
                progress.remove_task(task)
    except suite.CheckFailed as error:
        raise typer.Exit(_complain(f"check failed, nothing was timed: {error}", 1)) from error
    return report.document(header, records)


def _show_bench(content: dict, form: Format) -> None:
    from hf_fused_head.benchmark import report

    if form is not Format.table:
        typer.echo((report.markdown if form is Format.markdown else report.matrix)(content))
        return
    console = _console()
    for line in report.header_lines(content["header"]):
        console.print(line, highlight=False, markup=False)
    for table in report.tables(content):
        console.print(table)


def _device(name: str | None) -> torch.device:
    from hf_fused_head.benchmark import environment

    try:
        return environment.device_named(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def _dtype(name: str) -> torch.dtype:
    from hf_fused_head.options import FLOAT_DTYPES

    known = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
    if name not in known:
        raise UserError(f"`--dtype` must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def _refuse_overwriting(*files: Path | None, force: bool) -> None:
    from hf_fused_head.benchmark.files import refuse_overwriting

    try:
        refuse_overwriting(*files, force=force)
    except ValueError as error:
        raise UserError(str(error)) from error


def _write_json(file: Path | None, content: dict) -> None:
    if file is None:
        return
    from hf_fused_head.benchmark import report

    try:
        report.write_json(file, content)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def _console() -> Console:
    # A pipe has no width: wide enough for every table there, instead of 80 columns of ellipses.
    return Console() if sys.stdout.isatty() else Console(width=200)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


if __name__ == "__main__":
    main()
