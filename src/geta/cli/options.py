"""What every command shares: the --debug flag and where it is kept."""

from __future__ import annotations

from dataclasses import dataclass
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
