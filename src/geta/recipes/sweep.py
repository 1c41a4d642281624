"""One recipe with several values of one key, run one after the other into folders of their own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from geta.errors import ConfigError, GetaError
from geta.recipes.read import full_key, parse_yaml, read_recipe
from geta.recipes.recipe import Recipe
from geta.recipes.run import resume, run_recipe
from geta.recipes.run_folder import recipe_of
from geta.report.files import prepare_folder, write_json
from geta.report.run_files import RECIPE, RESULT, SWEEP
from geta.report.run_report import write_report

BASELINE = "baseline"


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """Read `sparsity=0.3,0.5,0.7`: a key and its values, as YAML; `weight_bits=[4,8],[2,4]` has two.

    Raises ConfigError for anything else.
    """
    key, separator, values = text.partition("=")
    found = parse_yaml(f"[{values}]", f"--sweep '{text}'") if separator and key else None
    if not isinstance(found, list) or len(found) < 2:
        raise ConfigError(f"--sweep '{text}' is no list of values: write a key and at least two, e.g. --sweep sparsity=0.3,0.5,0.7")
    return full_key(key), found


def plan_sweep(what: str | Path, overrides: Sequence[str], key: str, values: Sequence[Any]) -> tuple[Path, list[Recipe]]:
    """The sweep's folder, and one checked recipe per value. Raises ConfigError before anything is run."""
    folder = Path(read_recipe(what, overrides).output.folder)
    names = [folder_name(key, value) for value in values]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--sweep names '{twice}' twice: give each value once")
    texts = [f"{key}={json.dumps(value)}" for value in values]
    return folder, [
        read_recipe(what, [*overrides, text, f"output.folder={json.dumps(str(folder / name))}"])
        for text, name in zip(texts, names, strict=True)
    ]


def run_sweep(folder: Path, recipes: Sequence[Recipe], key: str, values: Sequence[Any], console: Console | None = None) -> dict[str, Any]:
    """Run the recipes one after the other; complete runs are skipped, unfinished ones resumed. Returns what `sweep.json` holds.

    The dense network is trained once for all values that don't concern its training.

    Raises GetaError when a folder holds another recipe's run, and whatever `run_recipe` raises.
    """
    prepare_folder(folder)
    _refuse_others(folder, [Path(recipe.output.folder).name for recipe in recipes])
    runs: list[dict[str, Any]] = []
    for value, recipe in zip(values, recipes, strict=True):
        place = Path(recipe.output.folder)
        result = complete_result(place, recipe)
        if result is None:
            (console or Console()).print(f"{place.name}:", markup=False, highlight=False)
            baseline = folder / BASELINE
            if (place / RECIPE).is_file():
                result = resume(place, console=console, baseline=baseline)
            else:
                result = run_recipe(recipe, console=console, baseline=baseline)
        if result is not None:
            runs.append({"value": value, "folder": place.name, "result": result})
            write_json(folder / SWEEP, {"key": key, "runs": runs})
    if len(runs) == len(recipes):
        shutil.rmtree(folder / BASELINE, ignore_errors=True)
    if runs:
        write_report(folder)
    return {"key": key, "runs": runs}


def complete_result(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The result of a complete run of this very recipe; None where there is none yet.

    Raises GetaError when the folder holds the run of another recipe, or a result that can't be read.
    """
    if not (folder / RECIPE).is_file():
        return None
    if recipe_of(folder) != recipe:
        raise GetaError(f"'{folder}' holds a run with other settings than this sweep's: choose another folder, or clear it")
    if not (folder / RESULT).is_file():
        return None
    try:
        found: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise GetaError(f"the result '{folder / RESULT}' can't be read: {error}; clear the folder to run it again") from error
    return found


def folder_name(key: str, value: Any) -> str:
    """The folder of one value: `compress.sparsity=0.5`, without characters that file systems or shells mind."""
    return re.sub(r"[^\w.,=+-]", "_", f"{key}={value if isinstance(value, str) else json.dumps(value)}")


def _refuse_others(folder: Path, ours: Sequence[str]) -> None:
    allowed = {*ours, SWEEP, BASELINE, "report.html", "report.md", "report.json"}
    other = [path.name for path in sorted(folder.iterdir()) if path.name not in allowed]
    if other:
        raise GetaError(
            f"'{folder}' holds other files ('{other[0]}'), and a sweep wants a folder of its own. Nothing was started: choose another "
            "(output.folder=...), or clear it"
        )
