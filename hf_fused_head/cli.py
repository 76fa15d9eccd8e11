"""`hf-fused-head`: doctor, models, plan, bench and bench compare, each a file of `commands`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_fused_head.commands.bench import bench
from hf_fused_head.commands.common import UserError, fail
from hf_fused_head.commands.compare import compare
from hf_fused_head.commands.doctor import doctor
from hf_fused_head.commands.models import models
from hf_fused_head.commands.plan import plan

app = typer.Typer(
    name="hf-fused-head",
    help="The loss of a causal language model inside its LM head: check, plan and measure it.",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (doctor, models, plan):
    app.command()(_command)


class _BenchGroup(TyperGroup):
    """`bench WORKLOAD...` means `bench run WORKLOAD...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Names the command where only its arguments are given."""
        return super().parse_args(ctx, args if args[:1] == ["compare"] else ["run", *args])


bench_app = typer.Typer(cls=_BenchGroup, rich_markup_mode="markdown")
bench_app.command("run")(bench)
bench_app.command("compare")(compare)
app.add_typer(bench_app, name="bench", help=bench.__doc__)

# The base of typer's usage errors; some releases of typer carry a click of their own, so that the
# class is reached through the one name that all of them export.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 a check failed, 2 a user error."""
    try:
        code = app(args=arguments, prog_name="hf-fused-head", standalone_mode=False)
    except UserError as error:
        code = fail(str(error), 2)
    except typer.Abort:
        code = fail("interrupted", 130)
    except _USAGE_ERROR as error:
        code = fail(error.format_message(), 2)
    sys.exit(code if isinstance(code, int) else 0)


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


if __name__ == "__main__":
    main()
