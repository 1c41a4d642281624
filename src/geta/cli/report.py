"""`geta report DIR [DIR ...]`: the report of a run, or a comparison of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geta.cli.options import Debug
from geta.cli.output import JsonFile, Output, check_outside


def report_command(
    *,
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Output folder of a run, of a sweep, or of a saved compact model.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The page; Markdown and JSON are written beside it. Default: report.html in the run's folder.",
            show_default=False,
        ),
    ] = None,
    json: JsonFile = None,
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Write the report of a run: report.html (one file, opens offline), report.md and report.json. Several folders are compared."""
    from geta.errors import ConfigError
    from geta.report.run_files import RESULT, SWEEP, check_folder

    if out is not None and out.suffix != ".html":
        raise ConfigError(
            f"--out is '{out}': name an HTML file, such as '{out.with_suffix('.html').name}'; .md and .json get the same name"
        )
    for folder in folders:
        check_folder(folder)
        if not (folder / RESULT).exists():
            check_outside(folder, json, "--json")
    output = Output(json)
    if len(folders) == 1 and not (folders[0] / SWEEP).exists():
        _one(folders[0], out, output)
    else:
        _several(folders, out, output)


def _one(folder: Path, out: Path | None, output: Output) -> None:
    from geta.report.run_files import read_run
    from geta.report.run_json import run_record
    from geta.report.run_report import position, write_report

    _say(write_report(folder, out), output)
    if output.json is not None:
        run = read_run(folder)
        output.finish(run_record(run, position(run)[0]), "record")


def _several(folders: list[Path], out: Path | None, output: Output) -> None:
    from geta.report.comparison import comparison_record, read_comparison, write_comparison

    comparison = read_comparison(folders)
    default = folders[0] / "report.html" if len(folders) == 1 else Path("comparison.html")
    written = write_comparison(comparison, out or default)
    for text in comparison.missing:
        typer.echo(f"left out: {text}", err=True)
    _say(written, output)
    output.finish(comparison_record(comparison), "record")


def _say(written: list[Path], output: Output) -> None:
    for path in written:
        output.line(f"wrote {path} ({path.stat().st_size:,} bytes)")
