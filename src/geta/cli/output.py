"""Where a command's words and its JSON go.

Without --json, or with --json FILE, the words go to standard output. With `--json -` standard output holds the JSON alone, so that
another program can read it, and the words go to standard error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geta.errors import ConfigError, GetaError

if TYPE_CHECKING:
    from rich.console import Console

JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write the same as JSON to this file; - is standard output, which then holds nothing else."
    ),
]

_STANDARD_OUTPUT = Path("-")


def check_file(path: Path | None, option: str) -> None:
    """Prove, before any work begins, that the file of `option` can be written; makes its folder. None is fine, and `-` for --json.

    Raises ConfigError for a folder, a device or a pipe, GetaError when the system refuses.
    """
    from geta.report.files import prepare_folder

    if path is None or (path == _STANDARD_OUTPUT and option == "--json"):
        return
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no ordinary file"
        raise ConfigError(
            f"{option} '{path}' can't be written: it is {kind}; name a file" + (", or - for standard output" * (option == "--json"))
        )
    prepare_folder(path.parent, option)


def check_outside(folder: Path, path: Path | None, option: str) -> None:
    """Raise ConfigError when the file of `option` would lie in the folder of a saved model, which takes no other files."""
    if path is not None and folder.resolve() in (path.resolve(), *path.resolve().parents):
        raise ConfigError(
            f"{option} '{path}' lies in the saved model '{folder}', which a further file would make unreadable: name a place outside"
        )


def write_file(path: Path, content: bytes, option: str) -> None:
    """Write the file of `option`, whole or not at all; a link is followed. Raises GetaError when the system refuses."""
    from geta.report.files import write_atomically

    try:
        write_atomically(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise GetaError(
            f"{option} '{path}' can't be written ({error.strerror or error}); nothing there was changed: "
            "free some space, or name another file"
        ) from error


class Output:
    """The words and the JSON of one command. json: the value of --json."""

    def __init__(self, json: Path | None) -> None:
        check_file(json, "--json")
        self.json = json
        self._aside = json == _STANDARD_OUTPUT

    def line(self, text: str = "") -> None:
        """Print text as it is."""
        typer.echo(text, err=self._aside)

    def console(self) -> Console:
        """For tables; everything on it goes where `line` goes."""
        from rich.console import Console

        return Console(stderr=self._aside, highlight=False, markup=False, soft_wrap=True)

    def finish(self, record: Mapping[str, Any] | str, what: str) -> None:
        """Write the JSON, if it was asked for, and say so. record: plain data, or text that is JSON already. what: its name."""
        if self.json is None:
            return
        text = record if isinstance(record, str) else json.dumps(record, indent=2, allow_nan=False)
        if self._aside:
            typer.echo(text)
        else:
            write_file(self.json, f"{text.rstrip()}\n".encode(), "--json")
            self.line(f"{what} written to {self.json}")
