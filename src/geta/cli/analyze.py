"""`geta analyze TARGET`: which parts of a network live and die together, and why some can't be removed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geta.cli.options import Debug
from geta.errors import ConfigError


def parse_shape(text: str) -> tuple[int, ...]:
    """Read `1,3,224,224`; raises ConfigError for anything that is no list of positive numbers."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ConfigError(f"--input-shape '{text}' is no shape: write positive numbers, batch first, e.g. --input-shape 1,3,224,224")
    return shape


def analyze_command(
    *,
    target: Annotated[str, typer.Argument(help="python.path:factory, timm:NAME or hf:CONFIG_OR_PATH.", show_default=False)],
    input_shape: Annotated[str | None, typer.Option(help="Shape of one random input, batch first, e.g. 1,3,224,224.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the families to this JSON file as well.")] = None,
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Print the table of group families of a model: what can be removed together, and the reason where nothing can.

    A factory is called without arguments and returns a model, (model, args) or (model, args, kwargs).
    """
    shape = None if input_shape is None else parse_shape(input_shape)

    import geta
    from geta.cli.targets import resolve_target
    from geta.report.files import prepare_folder, write_atomically

    if json is not None:
        prepare_folder(json.parent)
    found = resolve_target(target, shape)
    graph = geta.analyze(found.model, found.args, found.kwargs)
    typer.echo(str(graph))
    if json is not None:
        write_atomically(json, graph.to_json().encode())
        typer.echo(f"families written to {json}")
