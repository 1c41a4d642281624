"""The report of one run: one page, the same as Markdown, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from geta.errors import GetaError
from geta.report import page_sections as sections
from geta.report import run_facts, words
from geta.report.charts import Point
from geta.report.comparison import read_comparison, write_comparison
from geta.report.page import LARGEST_GRAPH, Page, fill
from geta.report.run_files import SWEEP, read_result, read_run, read_sweep
from geta.report.run_json import run_record
from geta.report.run_markdown import run_markdown
from geta.report.run_records import Run
from geta.report.writing import write_together

OWN_LABEL = "this run"


def write_report(folder: Path, out: Path | None = None) -> list[Path]:
    """Write the report of a run folder, of a sweep or of a saved compact model: HTML, Markdown and JSON, each atomically.

    folder: what `geta compress` or `geta demo` wrote, or `CompactModel.save`.
    out:    the HTML file; the other two get its name with their own suffix. None = report.html inside of a run folder or sweep, and
            NAME-report.html beside the folder of a saved model, which may hold nothing else.
    Returns the three paths. Raises GetaError for a run that is not complete and for a place that can't be written, CheckpointError for
    damaged files; then nothing was written.
    """
    if (folder / SWEEP).exists():
        return write_comparison(read_comparison([folder]), out or folder / "report.html")
    run = read_run(folder)
    target = out if out is not None else default_target(run)
    points, key = position(run)
    record = json.dumps(run_record(run, points), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    contents = {".html": run_page(run, points, key), ".md": run_markdown(run, points), ".json": record}
    return write_together(target, contents)


def default_target(run: Run) -> Path:
    """Where the page goes when nobody says so."""
    resolved = run.folder.resolve()
    return run.folder / "report.html" if run.trained else resolved.with_name(f"{resolved.name}-report.html")


def position(run: Run) -> tuple[list[Point], str]:
    """The run among the others of its sweep, if it belongs to one, and the key that was varied."""
    others, key = {}, ""
    sweep = read_sweep(run.folder.resolve().parent) if run.trained else None
    if sweep is not None and run.folder.resolve().name in [each.folder for each in sweep.runs]:
        key = sweep.key
        for each in sweep.runs:
            if each.folder != run.folder.resolve().name:
                found = _score(run.folder.resolve().parent / each.folder, run)
                others.update({} if found is None else {f"{key.rpartition('.')[2]} = {each.value}": found})
    return run_facts.pareto({OWN_LABEL: run}, others), key if others else ""


def _score(folder: Path, run: Run) -> tuple[float, float] | None:
    """Relative BOPs and score of another run; None while it is not complete, or measures something else."""
    try:
        other = read_result(folder)
    except GetaError:
        return None
    mine, metric = run.result.metric, other.metric
    cost = other.relative.get("bops", other.bops.relative)
    if mine is None or metric is None or metric.name != mine.name or metric.compact is None or cost is None:
        return None
    return cost, metric.compact


def run_page(run: Run, points: list[Point], key: str = "") -> str:
    """The page of one run as text."""
    curves, layers = run_facts.curves(run), sections.bits_chart(run)
    found = [
        sections.headline(run),
        sections.problems(run),
        sections.position(run, points, key),
        sections.training(curves, max((sum(row.run == name for row in run.history) for name in ("dense", "compact")), default=0)),
        sections.bits(run),
        sections.groups(run),
        sections.costs(run),
        sections.latency(run),
        sections.not_pruned(run),
        sections.graph(run),
        sections.reproduce(run),
    ]
    environment = run.environment
    facts = (
        ("task", run.result.task),
        ("seed", "" if run.result.seed is None else str(run.result.seed)),
        ("took", "" if run.result.seconds is None else words.duration(run.result.seconds)),
        ("started", environment.started if environment is not None else ""),
        ("device", environment.device if environment is not None else ""),
    )
    return fill(
        Page(
            eyebrow="geta report" if run.trained else "geta report of a saved model",
            title=run.name,
            facts=facts,
            lead=sections.tiles(run),
            sections=[section for section in found if section is not None],
            charts={chart.key: chart.hover() for chart in [*curves, *([layers] if layers is not None else [])]},
            graph=run.graph if len(run.graph) <= LARGEST_GRAPH else "",
        )
    )
