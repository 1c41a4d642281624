"""The command `geta`: its subcommands, and how errors become messages and exit codes.

Exit codes: 0 done; 1 the job failed; 2 bad arguments or settings; 130 interrupted. A traceback appears only with --debug.
"""

from __future__ import annotations

import traceback
from typing import Annotated

import typer

from geta.cli.analyze import analyze_command
from geta.cli.bench import bench_command
from geta.cli.compress import compress_command
from geta.cli.demo import demo_command
from geta.cli.evaluate import evaluate_command
from geta.cli.export import export_command
from geta.cli.inspect import inspect_command
from geta.cli.latency import latency_command
from geta.cli.options import Session
from geta.cli.report import report_command
from geta.errors import ConfigError, GetaError

app = typer.Typer(
    name="geta",
    help="Train a network once and get it back smaller: structured pruning and quantization in an ordinary training loop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo_command)
app.command("analyze")(analyze_command)
app.command("compress")(compress_command)
app.command("evaluate")(evaluate_command)
app.command("inspect")(inspect_command)
app.command("export")(export_command)
app.command("bench")(bench_command)
app.command("latency")(latency_command)
app.command("report")(report_command)


def _print_version(value: bool) -> None:
    if value:
        import geta

        typer.echo(f"geta {geta.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Read the options that stand before the command; each acts in its own callback."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; `arguments` default to those of the process."""
    session = Session()
    try:
        app(args=arguments, obj=session)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except GetaError as error:
        if session.debug:
            traceback.print_exc()
        typer.echo(f"geta: {error}", err=True)
        return 2 if isinstance(error, ConfigError) else 1
    except Exception as error:  # noqa: BLE001 - the outermost frame: whatever went wrong, people get a message and an exit code
        if session.debug:
            traceback.print_exc()
        typer.echo(f"geta: unexpected {type(error).__name__}: {error}\nRun the same command with --debug for the traceback.", err=True)
        return 1
    return 0
