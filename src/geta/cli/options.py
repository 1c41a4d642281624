"""What every command shares: the --debug flag and where it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass
class Session:
    """One invocation of the command line; debug: let an error's traceback through."""

    debug: bool = False


def _set_debug(context: typer.Context, value: bool) -> bool:
    session = context.find_root().obj
    if value and isinstance(session, Session):
        session.debug = True
    return value


Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.", callback=_set_debug, expose_value=False)]


def saved_model(folder: Path) -> Path:
    """The folder of the saved model that DIR means: a run's compact model, where DIR is the folder of a run."""
    from geta.report.run_files import COMPACT, RECIPE

    return folder / COMPACT if (folder / RECIPE).is_file() else folder
