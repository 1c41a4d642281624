"""`geta compress RECIPE`: a whole job from one YAML file."""

from __future__ import annotations

from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from geta.cli.options import Debug
from geta.cli.output import JsonFile, Output
from geta.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

Result = TypeVar("Result")


def compress_command(
    *,
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings instead of the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder of the run, or of the sweep: output.folder=DIR.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with the interrupted run in this folder.")] = None,
    sweep: Annotated[str | None, typer.Option(metavar="KEY=V1,V2,...", help="One run per value, into folders of their own.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped recipes and end.")] = False,
    json: JsonFile = None,
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Train a network, dense and compressing itself, as a recipe says, and write the small one with all that was measured.

    Ctrl-C (exit code 130) and SIGTERM (143) finish the step, write a checkpoint and print the command that goes on.
    """
    output = Output(json)
    console = output.console()
    if list_:
        return _list(output)
    if resume is not None:
        if recipe is not None or sweep is not None or out is not None:
            raise ConfigError("--resume goes on with the recipe that lies in the folder: leave RECIPE, KEY=VALUE, --out and --sweep out")
        from geta.recipes.run import resume as resume_run

        folder = resume
        return _report(stopping_with_code(lambda: resume_run(folder, console=console)), output)
    if recipe is None:
        raise ConfigError("give a RECIPE, a YAML file or the name of a shipped one (geta compress --list), or --resume DIR")

    from geta.recipes.read import read_recipe
    from geta.recipes.run import run_recipe

    settings = _with_folder(overrides or [], out)
    if sweep is None:
        wanted = read_recipe(recipe, settings)
        return _report(stopping_with_code(lambda: run_recipe(wanted, console=console)), output)

    from geta.recipes.sweep import parse_sweep, plan_sweep, run_sweep

    key, values = parse_sweep(sweep)
    folder, recipes = plan_sweep(recipe, settings, key, values)
    found = stopping_with_code(lambda: run_sweep(folder, recipes, key, values, console))
    console.print(sweep_table(found))
    return _report(found, output)


def _with_folder(overrides: list[str], out: Path | None) -> list[str]:
    """The overrides with `out` as the folder of the run. Raises ConfigError when both name one."""
    from geta.recipes.read import full_key

    if out is None:
        return overrides
    named = next((text for text in overrides if full_key(text.partition("=")[0]) == "output.folder"), None)
    if named is not None:
        raise ConfigError(f"--out {out} and {named} both name the folder of the run: leave one of them out")
    return [*overrides, f"output.folder={dumps(str(out))}"]


def stopping_with_code(job: Callable[[], Result]) -> Result:
    """Run a job; when it is interrupted, end with the exit code of the signal (130 for Ctrl-C, 143 for SIGTERM)."""
    from geta.recipes.stopping import Interrupted

    try:
        return job()
    except Interrupted as error:
        raise typer.Exit(error.exit_code) from None


def sweep_table(found: dict[str, Any]) -> Table:
    """One row per value of a sweep."""
    from rich.table import Table

    table = Table(title=f"Sweep over {found['key']}", title_justify="left")
    for heading in (found["key"], "metric", "difference", "relative BOPs", "relative parameters"):
        table.add_column(heading, justify="right")
    for run in found["runs"]:
        metric, relative = run["result"]["metric"], run["result"]["relative"]
        difference = "" if metric["difference"] is None else f"{metric['difference']:+.2f}"
        table.add_row(str(run["value"]), f"{metric['compact']:.2f}", difference, f"{relative['bops']:.2%}", f"{relative['params']:.2%}")
    return table


def _report(result: dict[str, Any] | None, output: Output) -> None:
    """result: None in processes that `torchrun` started beside the first."""
    if result is not None:
        output.finish(result, "result")


def _list(output: Output) -> None:
    from rich.table import Table

    from geta.recipes.read import parse_yaml, shipped_recipes

    found = {name: parse_yaml(entry.read_text(encoding="utf-8"), name) for name, entry in shipped_recipes().items()}
    table = Table(title="Shipped recipes", title_justify="left")
    for heading in ("recipe", "task", "data", "from"):
        table.add_column(heading)
    for name, raw in found.items():
        table.add_row(name, raw["task"]["name"], str(raw["data"]["source"]), (raw.get("provenance") or {}).get("source", ""))
    output.console().print(table)
    facts = {name: {"task": raw["task"], "data": raw["data"], "provenance": raw.get("provenance")} for name, raw in found.items()}
    output.finish(facts, "recipes")
