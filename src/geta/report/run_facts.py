"""What a report says about a run, as plain records: the same for the page, the Markdown and the JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from geta.report import words
from geta.report.charts import Chart, Point, Series, Span, pareto_front
from geta.report.run_records import FamilyRecord, HistoryRow, Operation, Run
from geta.report.treemap import Share

MOST_POINTS = 400
_INPUT, _OUTPUT = ":input", ":output"


@dataclass(frozen=True)
class Headline:
    """A row of the headline table. relative: compact / dense, or the difference of a metric; texts as people read them."""

    key: str
    label: str
    dense: float | None
    compact: float | None
    relative: float | None
    texts: tuple[str, str, str]


@dataclass(frozen=True)
class Layer:
    """Bits of one module's quantized tensors. weights: None where only its input or result is quantized."""

    name: str
    weight: float | None
    inputs: float | None
    result: float | None


@dataclass(frozen=True)
class Kept:
    """What is left of a prunable family."""

    family: FamilyRecord
    kept: int


@dataclass(frozen=True)
class Stuck:
    """Families that can't be pruned for one reason."""

    reason: str
    suggestion: str
    families: tuple[FamilyRecord, ...]


@dataclass(frozen=True)
class ModuleCost:
    """Costs of one module's operations in both networks, per example; dense is None where it was not recorded."""

    module: str
    dense_macs: float | None
    macs: float
    dense_bops: float | None
    bops: float


def headlines(run: Run) -> list[Headline]:
    """Score, parameters, MACs, BOPs, bytes, groups and bits of the dense and the compact network."""
    result, metric = run.result, run.result.metric
    rows: list[Headline] = []
    if metric is not None:
        texts = (words.score(metric.dense, metric.unit), words.score(metric.compact, metric.unit))
        change = words.difference(metric.difference, metric.unit)
        rows.append(Headline("metric", f"test {metric.name}", metric.dense, metric.compact, metric.difference, (*texts, change)))
    pairs = (
        ("params", "parameters", result.params.dense, result.params.compact, words.count),
        ("macs", "MACs per example", result.macs.dense, result.macs.compact, words.count),
        ("bops", "BOPs per example", result.bops.dense, result.bops.compact, words.count),
        ("weight_bytes", "weights", result.bytes.dense_state_dict, result.bytes.compact_weights, _size),
        ("folder_bytes", "saved, with its graph", result.bytes.dense_state_dict, result.bytes.compact_folder, _size),
    )
    for key, label, dense, compact, form in pairs:
        if compact is not None:
            relative = compact / dense if dense else None
            texts = (words.UNKNOWN if dense is None else form(dense), form(compact, dense))
            rows.append(
                Headline(key, label, dense, compact, relative, (*texts, words.UNKNOWN if relative is None else words.percent(relative)))
            )
    groups = result.groups
    left = groups.groups - groups.pruned_groups
    if groups.groups:
        share = left / groups.groups
        rows.append(Headline("groups", "groups", groups.groups, left, share, (f"{groups.groups:,}", f"{left:,}", words.percent(share))))
    weights = [layer.weight for layer in layers(run) if layer.weight is not None]
    if weights:
        mean = sum(weights) / len(weights)
        span = f"{min(weights):g}" if min(weights) == max(weights) else f"{min(weights):g} to {max(weights):g}"
        rows.append(Headline("weight_bits", "weight bits", 32, mean, mean / 32, ("32", span, f"mean {mean:.2f}")))
    return rows


def _size(value: float, _: float | None = None) -> str:
    return words.size(value)


def layers(run: Run) -> list[Layer]:
    """Quantized weights in the order of the network, each with the bits of its module's input and result."""
    bits = run.result.bits
    inputs = {name.removesuffix(_INPUT): width for name, width in bits.items() if name.endswith(_INPUT)}
    results = {name.removesuffix(_OUTPUT): width for name, width in bits.items() if name.endswith(_OUTPUT)}
    found, seen = [], set()
    for name, width in bits.items():
        if not name.endswith((_INPUT, _OUTPUT)):
            module = name.rpartition(".")[0]
            found.append(Layer(name, width, inputs.get(module), results.get(module)))
            seen.add(module)
    rest = dict.fromkeys(name for name in (*inputs, *results) if name not in seen)
    return [*found, *(Layer(name, None, inputs.get(name), results.get(name)) for name in rest)]


def bits_in_words(found: Sequence[Layer]) -> str:
    """e.g. "4 bits: 12 weights; 8 bits: 10 weights"."""
    counts = Counter(layer.weight for layer in found if layer.weight is not None)
    return "; ".join(f"{width:g} bits: {words.plural(number, 'weight')}" for width, number in sorted(counts.items()))


def kept(run: Run) -> list[Kept]:
    """Every prunable family with the number of groups that stayed, in the order of the network."""
    return [Kept(family, run.result.kept.get(family.name, family.size)) for family in run.families if family.prunable]


def stuck(run: Run) -> list[Stuck]:
    """What could not be pruned, by reason; the reason that holds most groups first."""
    by_reason: dict[tuple[str, str], list[FamilyRecord]] = {}
    for family in run.families:
        if not family.prunable:
            by_reason.setdefault((family.reason, family.suggestion), []).append(family)
    found = [Stuck(reason, suggestion, tuple(families)) for (reason, suggestion), families in by_reason.items()]
    return sorted(found, key=lambda each: -sum(family.size for family in each.families))


def module_costs(run: Run) -> list[ModuleCost]:
    """Costs by module path, in the order of the network."""
    compact, dense = _by_module(run.costs.compact), _by_module(run.costs.dense)
    found = []
    for name in dict.fromkeys((*dense, *compact)):
        macs, bops = compact.get(name, (0.0, 0.0))
        before = dense.get(name, (0.0, 0.0)) if dense else (None, None)
        found.append(ModuleCost(name, before[0], macs, before[1], bops))
    return found


def shares(costs: Sequence[ModuleCost], kind: str) -> tuple[list[Share], list[Share]]:
    """Treemap tiles of "macs" or "bops": the dense network with what is left of each tile, and the compact one."""
    now = [Share(cost.module, getattr(cost, kind), getattr(cost, kind)) for cost in costs]
    before = [(cost, getattr(cost, f"dense_{kind}")) for cost in costs]
    return [Share(cost.module, value, getattr(cost, kind)) for cost, value in before if value is not None], now


def _by_module(operations: Sequence[Operation]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for row in operations:
        macs, bops = found.get(row.name, (0.0, 0.0))
        found[row.name] = macs + row.macs, bops + row.bops
    return found


def missed(run: Run) -> list[str]:
    """Targets that were not reached and checks that failed, in words; empty for a run in order."""
    result, groups = run.result, run.result.groups
    found = []
    if groups.target_groups is not None and groups.pruned_groups != groups.target_groups:
        found.append(f"{groups.pruned_groups:,} groups were removed, {groups.target_groups:,} were wanted")
    if result.reloaded_equal is False:
        found.append("the saved compact model, loaded again, computes something else than the one in memory")
    if result.max_rel_difference is not None and result.max_rel_difference > 1e-9 and run.trained:
        found.append(f"the zeroed and the compact network differ by {result.max_rel_difference:.1e} of the largest output (float64)")
    return found


def relative_bops(run: Run) -> float | None:
    """BOPs of the compact network over those of the dense one."""
    return run.result.relative.get("bops", run.result.bops.relative)


def pareto(runs: Mapping[str, Run], others: Mapping[str, tuple[float, float]] | None = None) -> list[Point]:
    """Networks by relative BOPs and score: each run, its dense baseline, its published numbers, and `others` (label -> both).

    Scores of another metric than that of the first run are left out: they can't share an axis.
    """
    first = next((run.result.metric for run in runs.values() if run.result.metric is not None), None)
    if first is None:
        return []
    points: list[Point] = []
    for label, run in runs.items():
        metric, cost = run.result.metric, relative_bops(run)
        if metric is None or metric.name != first.name:
            continue
        if metric.dense is not None and not any(point.style == "dense" and point.score == metric.dense for point in points):
            points.append(Point("dense", "dense", 1.0, metric.dense))
        if metric.compact is not None and cost is not None and cost > 0:
            points.append(Point(label, "compact", cost, metric.compact))
        quoted = published(run).get(metric.name), published(run).get("relative_bops")
        if quoted[0] is not None and quoted[1] is not None and quoted[1] > 0:
            quote = Point("published", "published", quoted[1], quoted[0])
            points += [] if quote in points else [quote]
    points += [Point(label, "other", cost, value) for label, (cost, value) in (others or {}).items() if cost > 0]
    own = [point for point in points if point.style != "published"]
    flags = dict(zip(map(id, own), pareto_front([(p.cost, p.score) for p in own], higher_is_better=first.higher_is_better), strict=True))
    return [Point(p.label, p.style, p.cost, p.score, flags.get(id(p), False)) for p in points]


def published(run: Run) -> dict[str, float]:
    """The paper's numbers that the recipe quotes, as far as they are numbers."""
    provenance = run.settings.get("provenance")
    quoted = provenance.get("published") if isinstance(provenance, Mapping) else None
    if not isinstance(quoted, Mapping):
        return {}
    return {str(key): float(value) for key, value in quoted.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def curves(run: Run, labels: Mapping[str, str] | None = None) -> list[Chart]:
    """The curves of one run; labels: "dense" / "compact" -> what to call them."""
    names = labels or {"dense": "dense", "compact": "compact"}
    by_run = {name: [row for row in run.history if row.run == name] for name in ("dense", "compact")}
    return charts({names[name]: (name, rows) for name, rows in by_run.items() if rows}, run.result.metric, spans=True)


def charts(runs: Mapping[str, tuple[str, Sequence[HistoryRow]]], metric: Any, *, spans: bool) -> list[Chart]:
    """Loss, score, zero groups and bits over epochs (or steps); runs: label -> (style, rows)."""
    rows = [row for _, found in runs.values() for row in found]
    if not rows:
        return []
    epochs = all(row.epoch is not None for row in rows)
    shaded = _spans(next((found for style, found in runs.values() if style == "compact"), []), epochs=epochs) if spans else ()
    x_label = "epoch" if epochs else "step"
    constrained = {label: (style, found) for label, (style, found) in runs.items() if any(row.stage for row in found)}
    unit = metric.unit if metric is not None else ""
    name = metric.name if metric is not None else "score"
    made = [
        Chart("loss", "training loss", "", x_label, _series(runs, "loss", epochs), shaded, log=True),
        Chart("score", f"test {name}", unit, x_label, _series(runs, "score", epochs), shaded),
        Chart("groups", "zero groups", "%", x_label, _series(constrained, "group_sparsity", epochs, 100.0), shaded, zero=True),
        Chart("bits", "mean weight bits", "", x_label, _bits(constrained, epochs), shaded, zero=True, whole=True),
    ]
    return [chart for chart in made if any(y is not None for series in chart.series for y in series.y)]


def _series(runs: Mapping[str, tuple[str, Sequence[HistoryRow]]], key: str, epochs: bool, factor: float = 1.0) -> tuple[Series, ...]:
    found = []
    for label, (style, rows) in runs.items():
        few = thinned(rows)
        values = [getattr(row, key) for row in few]
        if any(value is not None for value in values):
            scaled = tuple(None if value is None else factor * value for value in values)
            found.append(Series(label, style, tuple(at(row, epochs) for row in few), scaled))
    return tuple(found)


def _bits(runs: Mapping[str, tuple[str, Sequence[HistoryRow]]], epochs: bool) -> tuple[Series, ...]:
    mean = _series(runs, "mean_weight_bits", epochs)
    bounds = _series(runs, "upper_bound", epochs)
    return (
        (*mean, *(Series(f"{series.label}: upper bound", f"{series.style} bound", series.x, series.y) for series in bounds)) if mean else ()
    )


def at(row: HistoryRow, epochs: bool) -> float:
    """Where on the x axis a row stands."""
    return float(row.epoch) if epochs and row.epoch is not None else float(row.step)


def thinned(rows: Sequence[HistoryRow]) -> list[HistoryRow]:
    """At most `MOST_POINTS` rows, evenly spread, the last one included."""
    if len(rows) <= MOST_POINTS:
        return list(rows)
    return [rows[round(number * (len(rows) - 1) / (MOST_POINTS - 1))] for number in range(MOST_POINTS)]


def _spans(rows: Sequence[HistoryRow], *, epochs: bool) -> tuple[Span, ...]:
    """Runs of rows of one stage; each row stands for what lies between it and the row before."""
    places = [0.0, *(at(row, epochs) for row in rows)]
    found: list[Span] = []
    for (start, end), row in zip(pairwise(places), rows, strict=True):
        if found and found[-1].stage == row.stage:
            found[-1] = Span(row.stage, found[-1].start, end)
        elif row.stage:
            found.append(Span(row.stage, start, end))
    return tuple(found)
