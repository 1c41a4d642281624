"""The report of a run as Markdown: tables that a repository or a ticket shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from geta.report import run_facts, words
from geta.report.charts import Point
from geta.report.run_records import Run

_MOST = 40
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#&])")


def run_markdown(run: Run, points: Sequence[Point]) -> str:
    """The whole report, curves as a few rows."""
    metric = run.result.metric
    parts = [f"# {escape(run.name)}", _facts(run)]
    parts += [
        "## Dense against compact",
        table(["", "dense", "compact", "compact / dense"], [[r.label, *r.texts] for r in run_facts.headlines(run)]),
    ]
    if len(points) > 1 and metric is not None:
        rows = [[p.label, words.percent(p.cost), words.score(p.score, metric.unit), "yes" if p.front else ""] for p in points]
        parts += ["## Score against cost", table(["network", "relative BOPs", metric.name, "on the front"], rows)]
    missed = run_facts.missed(run)
    if missed:
        parts += ["## Missed targets", _list(missed)]
    if run.result.notes:
        parts += ["## Notes", _list(run.result.notes)]
    parts += _training(run)
    parts += _layers(run)
    kept = [[code(k.family.name), f"{k.kept:,}", f"{k.family.size:,}", k.family.unit] for k in run_facts.kept(run)]
    parts += _cut("Kept groups per family", ["family", "kept", "of", "unit"], kept)
    costs = [
        [code(c.module), "" if c.dense_macs is None else words.magnitude(c.dense_macs), words.magnitude(c.macs),
         "" if c.dense_bops is None else words.magnitude(c.dense_bops), words.magnitude(c.bops)]
        for c in sorted(run_facts.module_costs(run), key=lambda c: -(c.dense_bops if c.dense_bops is not None else c.bops))
    ]  # fmt: skip
    parts += _cut("Where the computation went", ["module", "MACs, dense", "MACs, compact", "BOPs, dense", "BOPs, compact"], costs)
    times = [
        [f"batch {batch}, {name}", words.milliseconds(time.median), "" if time.p95 is None else words.milliseconds(time.p95)]
        for batch, found in run.result.latency_ms.items()
        for name, time in found.items()
    ]
    parts += _cut("Latency", ["", "median", "95 % are below"], times)
    reasons = [
        [
            f"it {each.reason}",
            words.plural(len(each.families), "family", "families"),
            ", ".join(f.name for f in each.families[:3]),
            each.suggestion,
        ]
        for each in run_facts.stuck(run)
    ]
    parts += _cut("What was not pruned, and why", ["because", "how many", "such as", "suggestion"], reasons)
    parts += _reproduce(run)
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """A name in backticks, as raw Markdown; `table` leaves it alone."""
    return f"\x00{' '.join(text.split()) or '(the model itself)'}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column to the left, others to the right."""
    lines = [f"| {' | '.join(escape(heading) for heading in headings)} |", f"| --- |{' ---: |' * (len(headings) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)])


def fenced(text: str, language: str = "") -> str:
    """A block of code whose fence is longer than any in the text."""
    longest = max((len(found) for found in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _cell(cell: str) -> str:
    if not cell.startswith("\x00"):
        return escape(cell)
    name = cell[1:]
    fence = "`" * (max((len(found) for found in re.findall(r"`+", name)), default=0) + 1)
    pad = " " if name.startswith("`") or name.endswith("`") else ""
    return f"{fence}{pad}{name}{pad}{fence}".replace("|", "\\|")


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _facts(run: Run) -> str:
    environment = run.environment
    facts = [
        run.result.task,
        f"seed {run.result.seed}" if run.result.seed is not None else "",
        f"started {environment.started}" if environment is not None and environment.started else "",
        words.duration(run.result.seconds) if run.result.seconds is not None else "",
    ]
    return escape(", ".join(fact for fact in facts if fact))


def _training(run: Run) -> list[str]:
    """First, last and the ends of stages."""
    rows = []
    for name in ("dense", "compact"):
        found = [row for row in run.history if row.run == name]
        ends = [list(group)[-1] for _, group in groupby(found, key=lambda row: row.stage)]
        for row in dict.fromkeys([*found[:1], *ends]):
            bits = "" if row.mean_weight_bits is None else f"{row.mean_weight_bits:.2f}"
            loss = "" if row.loss is None else f"{row.loss:.4g}"
            score = "" if row.score is None else f"{row.score:.4g}"
            rows.append([name, f"{row.step:,}", row.stage, loss, score, words.percent(row.group_sparsity), bits])
    return _cut("Training, at the ends of the stages", ["run", "step", "stage", "loss", "score", "zero groups", "mean bits"], rows)


def _layers(run: Run) -> list[str]:
    found = run_facts.layers(run)
    rows = [
        [code(layer.name), *("" if width is None else f"{width:g}" for width in (layer.weight, layer.inputs, layer.result))]
        for layer in found
    ]
    summary = run_facts.bits_in_words(found)
    parts = _cut("Bits per layer", ["tensor", "weight", "input", "result"], rows)
    return [parts[0], f"{escape(summary)}.", *parts[1:]] if parts and summary else parts


def _cut(heading: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A section with its table, or nothing; long ones say how much is left out."""
    if not rows:
        return []
    more = [f"And {len(rows) - _MOST:,} more; all are in report.json."] if len(rows) > _MOST else []
    return [f"## {heading}", table(headings, rows[:_MOST]), *more]


def _reproduce(run: Run) -> list[str]:
    import shlex

    environment, parts = run.environment, []
    if environment is not None and environment.command:
        parts.append(fenced(" ".join(shlex.quote(part) for part in environment.command), "sh"))
    if run.recipe:
        parts.append(fenced(run.recipe, "yaml"))
    versions = {**run.result.versions, **(environment.versions if environment is not None else {})}
    if versions:
        parts.append(escape(", ".join(f"{name} {version}" for name, version in versions.items())))
    return ["## Reproduce it", *parts] if parts else []
