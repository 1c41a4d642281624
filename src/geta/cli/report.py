"""`geta report DIR [DIR ...]`: the report of a run, or a comparison of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geta.cli.options import Debug


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
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and write no files unless --out is given.")] = False,
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Write the report of a run: report.html (one file, opens offline), report.md and report.json. Several folders are compared.

    Examples:

        geta report runs/demo

        geta report runs/a runs/b --out a-and-b.html

        geta report runs/sweep                    # the front of a sweep

        geta report runs/demo/compact             # a saved model alone
    """
    from geta.errors import ConfigError
    from geta.report.run_files import SWEEP, check_folder

    if out is not None and out.suffix != ".html":
        raise ConfigError(
            f"--out is '{out}': name an HTML file, such as '{out.with_suffix('.html').name}'; .md and .json get the same name"
        )
    for folder in folders:
        check_folder(folder)
    if len(folders) == 1 and not (folders[0] / SWEEP).exists():
        _one(folders[0], out, as_json=json)
    else:
        _several(folders, out, as_json=json)


def _one(folder: Path, out: Path | None, *, as_json: bool) -> None:
    from geta.report.run_files import read_run
    from geta.report.run_json import run_record
    from geta.report.run_report import position, write_report

    written = write_report(folder, out) if out is not None or not as_json else []
    if as_json:
        run = read_run(folder)
        _print_json(run_record(run, position(run)[0]))
    else:
        _say(written)


def _several(folders: list[Path], out: Path | None, *, as_json: bool) -> None:
    from geta.report.comparison import comparison_record, read_comparison, write_comparison

    comparison = read_comparison(folders)
    default = folders[0] / "report.html" if len(folders) == 1 else Path("comparison.html")
    written = write_comparison(comparison, out or default) if out is not None or not as_json else []
    if as_json:
        _print_json(comparison_record(comparison))
        return
    for text in comparison.missing:
        typer.echo(f"left out: {text}", err=True)
    _say(written)


def _print_json(record: object) -> None:
    import json

    typer.echo(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))


def _say(written: list[Path]) -> None:
    for path in written:
        typer.echo(f"wrote {path} ({path.stat().st_size:,} bytes)")
