"""A recipe from its data to the files of the compact network: the whole job, in order, resumable."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import geta
from geta.errors import CheckpointError, GetaError
from geta.recipes.baseline import shared_baseline
from geta.recipes.checkpoints import Checkpoints
from geta.recipes.leg import Leg
from geta.recipes.measure import costs_by_operation, measure, result_table, versions
from geta.recipes.prepare import Job, prepare
from geta.recipes.processes import joined, leave
from geta.recipes.recipe import Recipe
from geta.recipes.record import Record, recording
from geta.recipes.run_folder import CURVES, check_free, claim, reopen, resume_command, rewrite_history
from geta.recipes.stopping import Interrupted, Stop, stoppable
from geta.recipes.training import Training
from geta.report.curves import save_history
from geta.report.files import write_atomically, write_json
from geta.report.run_files import CHECKPOINT, COMPACT, COSTS, ENVIRONMENT, RESULT
from geta.report.run_records import HistoryRow
from geta.report.run_report import write_report


def run_recipe(
    recipe: Recipe, *, replace: bool = False, console: Console | None = None, baseline: Path | None = None
) -> dict[str, Any] | None:
    """Run a recipe in its folder and return what `result.json` holds (None in other processes than the first).

    replace: a complete run that lies in the folder is removed; otherwise a folder with anything in it is refused.
    console: where people read; None = standard output.
    baseline: a folder where runs that train the same dense network leave it for each other; each process by itself only.

    Raises GetaError and ConfigError before anything is trained when settings, data or folder are unfit, GetaError when training diverges or
    a file can't be written, Interrupted when SIGINT or SIGTERM came: the state is on disk then.
    """
    folder = Path(recipe.output.folder)
    with writing(folder), joined(recipe.train.device, recipe.train.threads) as place, stoppable() as stop:
        if place.first:
            check_free(folder, replace=replace)
        job = prepare(recipe, place)
        if place.first:
            claim(folder, recipe)
        return _run(job, folder, stop, console, shared=shared_baseline(baseline, recipe))


def resume(folder: Path, *, console: Console | None = None, baseline: Path | None = None) -> dict[str, Any] | None:
    """Go on with the run in a folder, which ends as it would have without the interruption. Arguments and errors are `run_recipe`'s."""
    recipe = reopen(folder)
    with writing(folder), joined(recipe.train.device, recipe.train.threads) as place, stoppable() as stop:
        return _run(prepare(recipe, place), folder, stop, console, resumed=True, shared=shared_baseline(baseline, recipe))


def _run(
    job: Job, folder: Path, stop: Stop, console: Console | None, *, resumed: bool = False, shared: Checkpoints | None = None
) -> dict[str, Any] | None:
    recipe, place = job.recipe, job.place
    shared = shared if place.ranks == 1 else None
    with recording(folder, recipe, console, first=place.first, append=resumed) as record, saying_how_to_go_on(folder, record):
        checkpoints = Checkpoints(folder / CHECKPOINT)
        legs = [Leg(1, "dense", job.dense, job.base_optimizer(job.dense))] if job.dense is not None else []
        legs.append(Leg(2, "compact", job.model, job.optimizer))
        todo = _restore(legs, checkpoints, record, resumed=resumed)
        if shared is not None and todo[0].number == 1 and _take_over(todo[0], shared, checkpoints, record):
            todo = todo[1:]
        if place.first:
            _describe(job, folder, legs)
        for leg in todo:
            Training(job, leg, record, checkpoints, stop, teacher=job.dense).run()
            if leg.number == 1 and place.first:
                for keeper in (checkpoints, shared):
                    if keeper is not None:
                        keeper.save_trained({"model": leg.model.state_dict(), "rows": leg.rows, "seconds": leg.seconds})
        leave()
        return _finish(job, legs, record, checkpoints) if place.first else None


def _restore(legs: list[Leg], checkpoints: Checkpoints, record: Record, *, resumed: bool) -> list[Leg]:
    """Bring the legs to where the newest checkpoint left them; those that are left to train."""
    state = checkpoints.newest() if resumed else None
    for note in checkpoints.notes:
        record.log.note(f"note: {note}")
    if state is None:
        return legs
    current = next(leg for leg in legs if leg.number == state["leg"])
    current.load(state)
    if current.number == 2 and len(legs) == 2:
        _adopt(legs[0], checkpoints.trained())
    record.log.note(f"resumed: {current.name}, step {current.step}")
    return legs[legs.index(current) :]


def _adopt(dense: Leg, trained: dict[str, Any]) -> None:
    dense.model.load_state_dict(trained["model"])
    dense.model.eval()
    dense.rows, dense.seconds = trained["rows"], trained["seconds"]


def _take_over(dense: Leg, shared: Checkpoints, checkpoints: Checkpoints, record: Record) -> bool:
    """Take the dense network that another run has trained, if there is one."""
    if not shared.has_trained():
        return False
    try:
        trained = shared.trained()
    except CheckpointError as error:
        record.log.note(f"note: {error}; the dense network is trained again")
        return False
    _adopt(dense, trained)
    checkpoints.save_trained(trained)
    record.log.note(f"{dense.name}: taken over from another run of this sweep, {dense.seconds:.0f} seconds of training")
    return True


def _describe(job: Job, folder: Path, legs: list[Leg]) -> None:
    """Write what is known before training."""
    rewrite_history(folder, [row for leg in legs for row in leg.rows])
    for name, text in job.analysis.items():
        write_atomically(folder / name, text.encode())
    write_json(
        folder / ENVIRONMENT,
        {
            "versions": versions(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": str(job.place.device),
            "processes": job.place.ranks,
            "command": ["geta", *sys.argv[1:]],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def _finish(job: Job, legs: list[Leg], record: Record, checkpoints: Checkpoints) -> dict[str, Any]:
    """Cut the small network out, save it, measure both, and write all that there is to read."""
    folder, start = record.folder, time.monotonic()
    job.optimizer.check()
    job.model.to("cpu")
    compact = geta.compact(job.model, job.graph)
    job.optimizer.check_cost(compact.cost)
    compact.save(folder / COMPACT)
    notes = [*job.optimizer.notes, *compact.info.notes]
    result = measure(job, compact, folder / COMPACT, notes)
    result["seconds"] = time.monotonic() - start + sum(leg.seconds for leg in legs)
    write_json(folder / COSTS, costs_by_operation(job, compact))
    notes += draw_curves(job, legs, folder / CURVES)
    record.log.show(result_table(result))
    for note in notes:
        record.log.note(f"note: {note}")
    record.log.note(f"{result['seconds']:.0f} seconds; files in {folder}: compact/, result.json, report.html, curves.png, log.txt")
    write_json(folder / RESULT, result)
    checkpoints.remove()
    write_report(folder)
    return result


def draw_curves(job: Job, legs: list[Leg], path: Path) -> list[str]:
    """Draw the history of both networks; what to say when it can't be drawn."""
    metric = job.task.metric
    label = f"test {metric.name}" + (f" ({metric.unit})" if metric.unit else "")
    try:
        save_history(path, [HistoryRow(**row) for leg in legs for row in leg.rows], label)
    except GetaError as error:
        return [str(error)]
    return []


@contextmanager
def saying_how_to_go_on(folder: Path, record: Record) -> Iterator[None]:
    """Tell, when the run is interrupted, how it can be resumed."""
    try:
        yield
    except Interrupted as error:
        record.log.note(f"{error}: the state is in {folder}. Go on with\n    {resume_command(folder)}")
        raise


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the system's refusals to write into a message: what is on disk already is whole."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno is None:
            raise
        raise GetaError(
            f"a file of the run in '{folder}' can't be written: {os.strerror(error.errno)}. What was written before is whole; make room, "
            f"then go on: {resume_command(folder)}"
        ) from error
