"""The folder of one run: what may lie in it, who may write to it, and the lines of its history."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geta.errors import CheckpointError, ConfigError, GetaError
from geta.recipes.read import check_recipe, parse_yaml, write_recipe
from geta.recipes.recipe import Recipe
from geta.report.files import prepare_folder, write_atomically
from geta.report.run_files import ANALYSIS, CHECKPOINT, COMPACT, COSTS, ENVIRONMENT, GRAPH, HISTORY, RECIPE, RESULT

LOG, CURVES, BOARD = "log.txt", "curves.png", "tensorboard"
_REPORTS = ("report.html", "report.md", "report.json")
OURS = frozenset({RECIPE, RESULT, HISTORY, CHECKPOINT, COMPACT, LOG, CURVES, ANALYSIS, GRAPH, COSTS, ENVIRONMENT, BOARD, *_REPORTS})


def resume_command(folder: Path) -> str:
    """The command that goes on with the run in a folder."""
    import shlex

    return f"geta compress --resume {shlex.quote(str(folder))}"


def check_free(folder: Path, *, replace: bool = False) -> None:
    """Make sure that `folder` can become that of a new run, and be written.

    replace: a complete run, and nothing else, may lie there.

    Raises GetaError when the folder can't be written or holds anything; nothing in it is changed.
    """
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if found:
        _refuse(folder, found, replace=replace)
    prepare_folder(folder)


def claim(folder: Path, recipe: Recipe) -> None:
    """Make `folder`, which `check_free` has looked at, that of a new run; an earlier run's files are removed."""
    for name in sorted(OURS):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_atomically(folder / RECIPE, write_recipe(recipe).encode())


def reopen(folder: Path) -> Recipe:
    """The recipe of the run that a folder holds, to go on with it.

    Raises GetaError when there is no run or it is complete, ConfigError when its recipe is damaged.
    """
    if not (folder / RECIPE).is_file():
        raise GetaError(f"there is no run to resume in '{folder}': it holds no {RECIPE}")
    if (folder / RESULT).is_file():
        raise GetaError(f"the run in '{folder}' is complete: nothing is left to resume. Its result is in {folder / RESULT}")
    recipe = recipe_of(folder)
    prepare_folder(folder)
    return recipe


def recipe_of(folder: Path) -> Recipe:
    """The recipe that a run folder holds. Raises ConfigError when it can't be read."""
    try:
        text = (folder / RECIPE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe '{folder / RECIPE}' can't be read: {error}") from error
    return check_recipe(parse_yaml(text, str(folder / RECIPE)), str(folder / RECIPE))


def rewrite_history(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Make the history what a checkpoint knows: rows of steps after it are gone, they will come again."""
    write_atomically(folder / HISTORY, b"".join(_line(row) for row in rows))


def append_history(folder: Path, row: dict[str, Any]) -> None:
    """Add one row to the history."""
    with (folder / HISTORY).open("ab") as stream:
        stream.write(_line(row))


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def _refuse(folder: Path, found: Sequence[str], *, replace: bool) -> None:
    """Raise GetaError unless `replace` and nothing of value lies there."""
    foreign = [name for name in found if name not in OURS]
    choose = "Nothing was started: choose another folder (output.folder=..., --out), or clear it"
    if foreign:
        raise GetaError(f"'{folder}' holds other files ('{foreign[0]}'), and a run wants a folder of its own. {choose}")
    if RESULT not in found and CHECKPOINT in found and any((folder / CHECKPOINT).iterdir()):
        raise GetaError(
            f"'{folder}' holds an unfinished run. Go on with it: {resume_command(folder)}; or choose another folder, or clear it"
        )
    if not replace:
        state = "complete" if RESULT in found else "unfinished"
        go_on = f" Go on with it: {resume_command(folder)}" if state == "unfinished" and RECIPE in found else ""
        raise GetaError(f"'{folder}' holds a run already, {state}.{go_on} {choose}")
    _check_compact(folder / COMPACT, choose)


def _check_compact(folder: Path, choose: str) -> None:
    """Raise GetaError when `folder` exists and is no saved model."""
    import geta

    if folder.exists():
        try:
            geta.load(folder)
        except CheckpointError as error:
            raise GetaError(f"the small network can't be saved: {error}. {choose}") from error
