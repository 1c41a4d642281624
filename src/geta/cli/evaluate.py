"""`geta evaluate DIR`: the metric of a saved compact model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geta.cli.options import Debug, saved_model
from geta.cli.output import JsonFile, Output
from geta.errors import ConfigError, GetaError


def evaluate_command(
    *,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved compact model, or the folder of a run.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings instead of the recipe's.")] = None,
    config: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Where data and task come from; a run's own recipe if left out.")
    ] = None,
    json: JsonFile = None,
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Measure a saved compact model on the test split of a recipe's data, with the recipe's task."""
    output = Output(json)
    from geta.recipes.read import read_recipe
    from geta.report.run_files import RECIPE

    if not folder.is_dir():
        raise GetaError(f"there is no folder '{folder}': give a saved compact model, or the folder of a run")
    is_run = (folder / RECIPE).is_file()
    if config is None and not is_run:
        raise ConfigError(f"'{folder}' is no folder of a run, which would hold a {RECIPE}: say where data and task come from with --config")
    recipe = read_recipe(folder / RECIPE if config is None else config, overrides or [])

    import geta
    from geta.recipes.evaluation import evaluate
    from geta.recipes.processes import joined

    model = geta.load(saved_model(folder))
    with joined(recipe.train.device, recipe.train.threads) as place:
        data, task = recipe.data.load(), recipe.task
        size = task.evaluation_batch or recipe.train.evaluation_batch or recipe.train.batch_size
        score = evaluate(model.to(place.device), task, data.test, size, place)
    metric = task.metric
    output.line(f"{metric.name}: {score:.4g}{f' {metric.unit}' if metric.unit else ''} on {len(data.test)} examples")
    record = {"metric": metric.name, "unit": metric.unit, "value": score, "examples": len(data.test), "folder": str(folder)}
    output.finish({"format": 1, **record}, "result")
