"""Several runs on one page: the headline side by side, differing settings, curves over each other, the front of a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from geta.errors import ConfigError, GetaError
from geta.report import page_sections as sections
from geta.report import run_facts, words
from geta.report.charts import Chart, Point, Series
from geta.report.markup import Html, join, tag
from geta.report.page import Page, Section, fill
from geta.report.page_tables import table
from geta.report.run_facts import Headline
from geta.report.run_files import Sweep, check_folder, differing, read_run, read_sweep
from geta.report.run_json import headline_record, plain, point_record
from geta.report.run_markdown import escape
from geta.report.run_markdown import table as markdown_table
from geta.report.run_records import Run
from geta.report.writing import write_together

_STYLES = ("compact", *(f"compact line-{number}" for number in range(2, 7)))


@dataclass(frozen=True)
class Comparison:
    """Runs by label. key: the recipe key that a sweep varied, "" without one. missing: runs that could not be read, with the reason."""

    title: str
    runs: Mapping[str, Run]
    key: str = ""
    missing: tuple[str, ...] = ()

    @property
    def points(self) -> list[Point]:
        """All networks by cost and score."""
        return run_facts.pareto(self.runs)


def read_comparison(folders: Sequence[Path]) -> Comparison:
    """Read the runs to compare: several folders, or that of one sweep.

    Raises GetaError when a folder can't be read; in a sweep only when no run can.
    """
    for folder in folders:
        check_folder(folder)
    if len(folders) == 1:
        sweep = read_sweep(folders[0])
        if sweep is None:
            raise ConfigError(f"'{folders[0]}' is one run and no sweep: name two folders to compare")
        return _of_sweep(folders[0], sweep)
    return Comparison(" / ".join(_labels(folders)), dict(zip(_labels(folders), map(read_run, folders), strict=True)))


def _of_sweep(folder: Path, sweep: Sweep) -> Comparison:
    name = sweep.key.rpartition(".")[2]
    runs, missing = {}, []
    for each in sweep.runs:
        try:
            check_folder(folder / each.folder)
            runs[f"{name} = {each.value}"] = read_run(folder / each.folder)
        except GetaError as error:
            missing.append(f"{name} = {each.value}: {error}")
    if not runs:
        raise GetaError(f"no run of the sweep in '{folder}' can be reported. {missing[0]}")
    return Comparison(f"{folder.resolve().name}: sweep over {sweep.key}", runs, sweep.key, tuple(missing))


def _labels(folders: Sequence[Path]) -> list[str]:
    """Names of the folders; paths where names are equal. Raises ConfigError for a folder that is named twice."""
    resolved = [folder.resolve() for folder in folders]
    twice = [folder for folder, path in zip(folders, resolved, strict=True) if resolved.count(path) > 1]
    if twice:
        raise ConfigError(f"'{twice[0]}' is named twice: name different folders to compare")
    names = [path.name for path in resolved]
    return names if len(set(names)) == len(names) else [str(path) for path in resolved]


def write_comparison(comparison: Comparison, target: Path) -> list[Path]:
    """Write HTML, Markdown and JSON beside each other, named after `target`; returns the paths."""
    record = json.dumps(comparison_record(comparison), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return write_together(target, {".html": comparison_page(comparison), ".md": comparison_markdown(comparison), ".json": record})


def headline_table(runs: Mapping[str, Run]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: the compact networks' numbers, one column per run; where there is one dense network, it comes first."""
    by_key: dict[str, dict[str, Headline]] = {}
    for label, run in runs.items():
        for row in run_facts.headlines(run):
            by_key.setdefault(row.key, {})[label] = row
    rows = []
    for found in by_key.values():
        first = next(iter(found.values()))
        rows.append([first.label, *(_shown(found.get(label)) for label in runs)])
    return ["", *runs], rows


def _shown(row: Headline | None) -> str:
    if row is None:
        return words.UNKNOWN
    known = row.relative is not None or row.key == "weight_bits"
    return f"{row.texts[1]} ({row.texts[2]})" if known else row.texts[1]


def comparison_record(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data, format 1."""
    record = {
        "format": 1,
        "kind": "sweep" if comparison.key else "comparison",
        "key": comparison.key or None,
        "runs": [
            {"label": label, "name": run.name, "headline": [headline_record(row) for row in run_facts.headlines(run)]}
            for label, run in comparison.runs.items()
        ],
        "missing": list(comparison.missing),
        "pareto": [point_record(point) for point in comparison.points],
        "differing": [{"key": key, "values": values} for key, values in differing(comparison.runs).items()],
    }
    found: dict[str, Any] = plain(record)
    return found


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    headings, rows = headline_table(comparison.runs)
    parts = [f"# {escape(comparison.title)}", "## Compact networks (and what that is of dense)", markdown_table(headings, rows)]
    parts += ["## Runs that are missing", *[f"- {escape(text)}" for text in comparison.missing]] if comparison.missing else []
    if len(comparison.points) > 1:
        points = [
            [p.label, words.percent(p.cost), f"{p.score:.4g}", "yes" if p.front else ""]
            for p in sorted(comparison.points, key=lambda p: p.cost)
        ]
        parts += ["## Score against cost", markdown_table(["network", "relative BOPs", "score", "on the front"], points)]
    different = differing(comparison.runs)
    if different:
        parts += ["## Differing settings", markdown_table(["key", *comparison.runs], _setting_rows(comparison.runs, different))]
    return "\n\n".join(parts) + "\n"


def _setting_rows(runs: Mapping[str, Run], different: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    return [[key, *(str(values[label]) if label in values else words.UNKNOWN for label in runs)] for key, values in different.items()]


def comparison_page(comparison: Comparison) -> str:
    """The page as text."""
    runs, charts = comparison.runs, overlaid(comparison.runs)
    first = next((run for run in runs.values() if run.result.metric is not None), next(iter(runs.values())))
    headings, rows = headline_table(runs)
    caption = "Compact networks; in brackets what that is of the dense one, or the difference to it"
    head = join(tag("p", f"{caption}.", class_="soft"), table(caption, headings, rows))
    missing = tag("ul", *[tag("li", text) for text in comparison.missing], class_="missed") if comparison.missing else None
    found = [
        Section("headline", "Side by side", join(missing, head)),
        sections.position(first, comparison.points, comparison.key),
        _settings(runs),
        sections.training(charts, max(len(run.history) for run in runs.values())),
    ]
    return fill(
        Page(
            eyebrow="geta sweep" if comparison.key else "geta comparison",
            title=comparison.title,
            facts=(("runs", str(len(runs))), ("task", first.result.task)),
            lead=Html(""),
            sections=[section for section in found if section is not None],
            charts={chart.key: chart.hover() for chart in charts},
        )
    )


def overlaid(runs: Mapping[str, Run]) -> list[Chart]:
    """The compact networks' curves in one chart each; stages are shaded where all runs have the same."""
    rows = {label: [row for row in run.history if row.run == "compact"] for label, run in runs.items()}
    styled = {label: (_STYLES[number % len(_STYLES)], found) for number, (label, found) in enumerate(rows.items()) if found}
    metric = next((run.result.metric for run in runs.values() if run.result.metric is not None), None)
    drawn = [replace(chart, series=_without_bounds(chart)) for chart in run_facts.charts(styled, metric, spans=False)]
    shaded = [chart.spans for run in runs.values() for chart in run_facts.curves(run)[:1]]
    if not shaded or any(spans != shaded[0] for spans in shaded):
        return drawn
    return [replace(chart, spans=shaded[0]) for chart in drawn]


def _without_bounds(chart: Chart) -> tuple[Series, ...]:
    """A line per run is enough to compare."""
    return tuple(series for series in chart.series if "bound" not in series.style.split())


def _settings(runs: Mapping[str, Run]) -> Section:
    different = differing(runs)
    if not different:
        return Section("settings", "Differing settings", tag("p", "All runs have the same recipe."))
    return Section(
        "settings", "Differing settings", table("Recipe keys in which the runs differ", ["key", *runs], _setting_rows(runs, different))
    )
