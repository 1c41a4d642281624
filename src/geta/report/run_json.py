"""The report of a run as plain data: report.json, format 1 (docs/report.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from geta.report import run_facts
from geta.report.charts import Point
from geta.report.run_records import Run

FORMAT = 1


def run_record(run: Run, points: Sequence[Point]) -> dict[str, Any]:
    """Everything that the page shows, as JSON data without NaN; keys never change their meaning within a format."""
    result = run.result
    record = {
        "format": FORMAT,
        "kind": "run" if run.trained else "model",
        "name": run.name,
        "task": result.task,
        "seed": result.seed,
        "seconds": result.seconds,
        "metric": None if result.metric is None else asdict(result.metric),
        "headline": [headline_record(row) for row in run_facts.headlines(run)],
        "published": run_facts.published(run),
        "pareto": [point_record(point) for point in points],
        "history": [asdict(row) for row in run.history],
        "bits": [asdict(layer) for layer in run_facts.layers(run)],
        "groups": [
            {"family": each.family.name, "unit": each.family.unit, "size": each.family.size, "kept": each.kept}
            for each in run_facts.kept(run)
        ],
        "not_pruned": [
            {
                "reason": each.reason,
                "suggestion": each.suggestion,
                "groups": sum(family.size for family in each.families),
                "families": [family.name for family in each.families],
            }
            for each in run_facts.stuck(run)
        ],
        "modules": [
            {
                "module": cost.module,
                "macs": {"dense": cost.dense_macs, "compact": cost.macs},
                "bops": {"dense": cost.dense_bops, "compact": cost.bops},
            }
            for cost in run_facts.module_costs(run)
        ],
        "latency_ms": {batch: {name: asdict(time) for name, time in times.items()} for batch, times in result.latency_ms.items()},
        "missed": run_facts.missed(run),
        "notes": list(result.notes),
        "checks": {
            "max_rel_difference": result.max_rel_difference,
            "max_rel_difference_float32": result.max_rel_difference_float32,
            "reloaded_equal": result.reloaded_equal,
        },
        "environment": None if run.environment is None else asdict(run.environment),
        "versions": dict(result.versions),
        "recipe": run.recipe,
    }
    found: dict[str, Any] = plain(record)
    return found


def headline_record(row: run_facts.Headline) -> dict[str, Any]:
    """A row of the headline table."""
    return {"key": row.key, "label": row.label, "dense": row.dense, "compact": row.compact, "relative": row.relative}


def point_record(point: Point) -> dict[str, Any]:
    """A network by cost and score; network: "compact", "dense", "published" or "other"."""
    return {"label": point.label, "network": point.style, "relative_bops": point.cost, "score": point.score, "front": point.front}


def plain(value: Any) -> Any:
    """Data that JSON can hold: no number that is none (None instead), no tuples, and words for what is neither."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
