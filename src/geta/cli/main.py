"""The command `geta`: its subcommands, and how errors become messages and exit codes.

Exit codes: 0 done; 1 the job failed; 2 bad arguments or settings; 130 interrupted. A traceback appears only with --debug.
"""

from __future__ import annotations

import io
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from geta.cli.analyze import analyze_command
from geta.cli.bench import bench_command
from geta.cli.compress import compress_command
from geta.cli.demo import demo_command
from geta.cli.errors import INTERRUPTED, block
from geta.cli.evaluate import evaluate_command
from geta.cli.examples import epilog
from geta.cli.export import export_command
from geta.cli.inspect import inspect_command
from geta.cli.latency import latency_command
from geta.cli.options import Debug, Session
from geta.cli.report import report_command


class _Commands(TyperGroup):
    """Says that an interrupt was heard. A command that has more to say about it handles it and raises `typer.Exit(130)` itself."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("geta: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="geta",
    cls=_Commands,
    help="Train a network once and get it back smaller: structured pruning and quantization in an ordinary training loop.",
    epilog="Exit codes: 0 done; 1 the job failed; 2 bad arguments or settings; 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("demo", epilog=epilog("demo"))(demo_command)
app.command("analyze", epilog=epilog("analyze"))(analyze_command)
app.command("compress", epilog=epilog("compress"))(compress_command)
app.command("evaluate", epilog=epilog("evaluate"))(evaluate_command)
app.command("inspect", epilog=epilog("inspect"))(inspect_command)
app.command("export", epilog=epilog("export"))(export_command)
app.command("bench", epilog=epilog("bench"))(bench_command)
app.command("latency", epilog=epilog("latency"))(latency_command)
app.command("report", epilog=epilog("report"))(report_command)


def _print_version(value: bool) -> None:
    if value:
        import geta

        typer.echo(f"geta {geta.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)] = False,
    debug: Debug = False,
) -> None:
    """Read the options that stand before the command; each acts in its own callback."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; `arguments` default to those of the process."""
    _print_any_name()
    given = sys.argv[1:] if arguments is None else arguments
    session = Session()
    try:
        code = app(args=given, prog_name="geta", obj=session, standalone_mode=False)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:  # noqa: BLE001 - the outermost frame: whatever went wrong, people get a message and an exit code
        if session.debug:
            traceback.print_exc()
        text, code = block(error) if given else (str(error), 2)  # without arguments the error's text is the help
        typer.echo(text, err=True)
    return code if isinstance(code, int) else 0


def _print_any_name() -> None:
    """Names that the terminal's encoding has no letters for are printed with backslashes instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
