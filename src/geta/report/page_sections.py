"""The sections of a run's page: each takes the run and returns markup, or None where there is nothing to say."""

from __future__ import annotations

from collections.abc import Mapping

from geta.report import run_facts, words
from geta.report.charts import Chart, Point, Series, line_chart, pareto_chart, stage_class
from geta.report.markup import Html, join, tag
from geta.report.page import LARGEST_GRAPH, Section
from geta.report.page_tables import MOST_ROWS, bar, folded, path, table, values_of
from geta.report.run_records import Run, Times
from geta.report.treemap import treemap

STAGES = ("warm-up", "projection", "joint", "cool-down")
_FEW_FAMILIES = 6


def tiles(run: Run) -> Html:
    """The numbers that people look for first."""
    shown = []
    for row in run_facts.headlines(run):
        if row.key == "metric":
            change = f"{row.texts[2]} against dense" if row.dense is not None else "no dense baseline"
            shown.append((row.label, row.texts[1], change))
        elif row.key in ("bops", "macs", "params", "weight_bytes") and row.relative is not None:
            what = {"bops": "of the BOPs", "macs": "of the MACs", "params": "of the parameters", "weight_bytes": "of the bytes"}[row.key]
            shown.append((what, row.texts[2], _times(row.relative)))
    parts = [tag("div", tag("dt", label), tag("dd", value), tag("dd", note, class_="soft")) for label, value, note in shown]
    return tag("dl", *parts, class_="tiles") if parts else Html("")


def _times(relative: float) -> str:
    """How many times less (or more) a cost is."""
    if not relative:
        return ""
    return f"{words.magnitude(1 / relative)}\u00d7 less" if relative < 1 else f"{words.magnitude(relative)}\u00d7 as much"


def headline(run: Run) -> Section:
    """Dense against compact."""
    quoted = run_facts.published(run)
    columns = ["", "dense", "compact", "compact / dense"]
    published = {
        "metric": (quoted.get(run.result.metric.name) if run.result.metric else None, run.result.metric.unit if run.result.metric else ""),
        **{cost: (quoted.get(f"relative_{cost}"), "share") for cost in ("bops", "macs", "params")},
    }
    rows: list[list[str | None]] = []
    for row in run_facts.headlines(run):
        cells: list[str | None] = [row.label, *row.texts]
        if quoted:
            value, unit = published.get(row.key, (None, ""))
            cells.append("" if value is None else words.percent(value) if unit == "share" else words.score(value, unit))
        rows.append(cells)
    caption = "The dense network and the compact one; costs for one example"
    parts = [table(caption, [*columns, *(["published"] if quoted else [])], rows)]
    provenance = run.settings.get("provenance")
    if quoted and isinstance(provenance, Mapping):
        setting = f" ({provenance['setting']})" if provenance.get("setting") else ""
        parts.append(tag("p", f"Published: {provenance.get('source') or 'source not named'}{setting}.", class_="soft"))
    if not run.trained:
        parts.append(
            tag("p", "Made from a saved compact model alone: scores, curves and times are in the folder of its run.", class_="note")
        )
    return Section("headline", "Dense against compact", join(*parts))


def problems(run: Run) -> Section | None:
    """Missed targets and notes."""
    missed, notes = run_facts.missed(run), run.result.notes
    if not missed and not notes:
        return None
    parts = [tag("ul", *[tag("li", text) for text in missed], class_="missed")] if missed else [tag("p", "Every target was met.")]
    if notes:
        parts.append(tag("ul", *[tag("li", note) for note in notes], class_="notes"))
    return Section("notes", "Missed targets and notes" if missed else "Notes", join(*parts))


def position(run: Run, points: list[Point], key: str = "") -> Section | None:
    """Score against relative BOPs."""
    metric = run.result.metric
    if metric is None or len(points) < 2:
        return None
    higher = "higher" if metric.higher_is_better else "lower"
    words_ = f"Left is cheaper, {higher} is better."
    if key:
        words_ += f" The line is the front of the sweep over {key}: no other run is both cheaper and better."
    rows = [
        [point.label, words.percent(point.cost), words.score(point.score, metric.unit), "yes" if point.front else ""]
        for point in sorted(points, key=lambda p: p.cost)
    ]
    values = table("Networks by cost", ["network", "relative BOPs", metric.name, "on the front"], rows)
    chart = pareto_chart(points, f"test {metric.name}", higher_is_better=metric.higher_is_better)
    figure = tag("figure", tag("figcaption", f"test {metric.name} ({metric.unit})" if metric.unit else f"test {metric.name}"), chart)
    return Section("pareto", "Score against cost", join(tag("p", words_, class_="soft"), tag("div", figure, values, class_="charts")))


def training(charts: list[Chart], rows: int) -> Section | None:
    """Curves with the stages shaded."""
    if not charts:
        return None
    styles = {series.label: series.style for chart in charts for series in chart.series}
    lines = [tag("li", tag("span", class_=f"key {style}", aria_hidden="true"), label) for label, style in styles.items()]
    stages = dict.fromkeys(span.stage for chart in charts for span in chart.spans)
    ordered = sorted(stages, key=lambda stage: STAGES.index(stage) if stage in STAGES else len(STAGES))
    shades = [tag("li", tag("span", class_=f"swatch {stage_class(stage)}", aria_hidden="true"), stage) for stage in ordered]
    legend = tag("ul", *lines, *shades, class_="legend")
    note = f"{run_facts.MOST_POINTS} of {rows:,} rows are drawn." if rows > 2 * run_facts.MOST_POINTS else None
    figures = tag("div", *[line_chart(chart) for chart in charts], class_="charts")
    tables = folded("Values as tables", join(*[values_of(chart) for chart in charts]))
    return Section("training", "Training", join(legend, figures, tag("p", note, class_="soft") if note else None, tables))


def bits_chart(run: Run) -> Chart | None:
    """Bits of every quantized weight and of what enters its module, in the order of the network."""
    found = [layer for layer in run_facts.layers(run) if layer.weight is not None or layer.inputs is not None]
    if not found:
        return None
    xs = tuple(float(number) for number in range(1, len(found) + 1))
    series = [Series("weights", "compact", xs, tuple(layer.weight for layer in found))]
    if any(layer.inputs is not None for layer in found):
        series.append(Series("inputs", "inputs", xs, tuple(layer.inputs for layer in found)))
    names = tuple(layer.name for layer in found)
    return Chart("layers", "bits", "", "layers, from input to output", tuple(series), zero=True, whole=True, steps=True, names=names)


def bits(run: Run) -> Section | None:
    """Bits per layer."""
    chart, found = bits_chart(run), run_facts.layers(run)
    if chart is None:
        return None
    keys = [tag("li", tag("span", class_=f"key {series.style}", aria_hidden="true"), series.label) for series in chart.series]
    rows = [[path(layer.name), *(_bits_bar(width) for width in (layer.weight, layer.inputs, layer.result))] for layer in found[:MOST_ROWS]]
    caption = "Bits per layer" if len(found) <= MOST_ROWS else f"Bits of the first {MOST_ROWS} of {len(found):,} layers"
    values = table(caption, ["tensor", "weight", "input", "result"], rows, scrolls=True)
    parts = (tag("p", run_facts.bits_in_words(found), class_="soft"), tag("ul", *keys, class_="legend"), line_chart(chart))
    return Section("bits", "Bits per layer", join(*parts, folded("Values as a table", values)))


def _bits_bar(width: float | None) -> Html:
    return Html("") if width is None else bar(width / 16, "compact", f"{width:g}")


def groups(run: Run) -> Section | None:
    """What is left of every family."""
    found = run_facts.kept(run)
    if not found:
        return None
    rows = [
        [path(each.family.name), bar(share, "compact", words.percent(share)), f"{each.kept:,} of {each.family.size:,} {each.family.unit}"]
        for each in found
        for share in (each.kept / max(1, each.family.size),)
    ]
    kept, size = sum(each.kept for each in found), sum(each.family.size for each in found)
    target = run.result.groups.target_groups
    wanted = f"; {target:,} were to go" if target is not None else ""
    line = (
        f"{kept:,} of {size:,} groups are left in {words.plural(len(found), 'family', 'families')}, {size - kept:,} were removed{wanted}."
    )
    values = table("Kept groups per family", ["family", "kept", "groups"], rows[:MOST_ROWS], scrolls=True)
    more = f"And {len(rows) - MOST_ROWS:,} more families; all are in report.json." if len(rows) > MOST_ROWS else None
    return Section("groups", "Kept groups per family", join(tag("p", line), values, tag("p", more, class_="soft") if more else None))


def costs(run: Run) -> Section | None:
    """Where MACs and BOPs went."""
    found = run_facts.module_costs(run)
    if not found:
        return None
    panels = []
    for kind, unit in (("macs", "MACs"), ("bops", "BOPs")):
        before, now = run_facts.shares(found, kind)
        maps = []
        if before:
            label = f"{unit} of the dense network by module; the solid part of each tile is left"
            caption = tag(
                "figcaption", f"Dense: {words.magnitude(sum(s.value for s in before))} {unit}; solid is what is left of each module"
            )
            maps.append(tag("figure", caption, treemap(before, unit, label)))
        caption = tag("figcaption", f"Compact: {words.magnitude(sum(s.value for s in now))} {unit}, and who takes them")
        maps.append(tag("figure", caption, treemap(now, unit, f"{unit} of the compact network by module")))
        panels.append(tag("div", *maps, class_="charts", data_panel=kind, hidden=kind == "macs"))
    choice = [
        tag("button", unit, type="button", data_show=kind, aria_pressed="true" if kind == "bops" else "false")
        for kind, unit in (("bops", "BOPs"), ("macs", "MACs"))
    ]
    ranked = sorted(found, key=lambda cost: -(cost.dense_bops if cost.dense_bops is not None else cost.bops))
    rows = [
        [path(cost.module), *_pair(cost.dense_macs, cost.macs), *_pair(cost.dense_bops, cost.bops)] for cost in ranked[:MOST_ROWS]
    ]  # fmt: skip
    headings = ["module", "MACs, dense", "compact", "left", "BOPs, dense", "compact", "left"]
    title = "Costs per module and example" if len(found) <= MOST_ROWS else f"The {MOST_ROWS} costliest of {len(found):,} modules"
    values = table(title, headings, rows, scrolls=True)
    switch = tag("div", *choice, class_="switch", role="group", aria_label="What the tiles count")
    return Section("costs", "Where the computation went", join(switch, *panels, folded("Values as a table", values)))


def _pair(dense: float | None, compact: float) -> tuple[str, str, str]:
    left = words.percent(compact / dense) if dense else ""
    return ("" if dense is None else words.magnitude(dense), words.magnitude(compact), left)


def latency(run: Run) -> Section | None:
    """Milliseconds per call."""
    found = run.result.latency_ms
    if not found:
        return None
    rows: list[list[str | None]] = []
    for batch, times in found.items():
        slowest = max(time.median for time in times.values())
        dense = times.get("dense")
        for name, time in times.items():
            ratio = words.percent(time.median / dense.median) if dense is not None and name != "dense" else ""
            rows.append(
                [f"batch {batch}, {name}", bar(time.median / slowest, _style(name), words.milliseconds(time.median)), _p95(time), ratio]
            )
    environment = run.environment
    where = ", ".join(
        part
        for part in (environment.device, f"{environment.threads} thread(s)" if environment.threads else "", environment.platform)
        if part
    ) if environment else ""  # fmt: skip
    note = join(
        f"In PyTorch{f' on {where}' if where else ''}, which emulates integer networks in floats; ",
        tag("code", "geta bench"),
        " times other runtimes.",
    )
    values = table("Milliseconds per call", ["", "median", "95 % are below", "of dense"], rows)
    return Section("latency", "Latency", join(values, tag("p", note, class_="soft")))


def _style(name: str) -> str:
    return name if name in ("dense", "compact") else "other"


def _p95(time: Times) -> str:
    return "" if time.p95 is None else words.milliseconds(time.p95)


def not_pruned(run: Run) -> Section | None:
    """Reasons, each with its families."""
    found = run_facts.stuck(run)
    if not found:
        return None
    rows = []
    for each in found:
        names = [join(path(family.name), Html(" ")) for family in each.families]
        rest = tag("details", tag("summary", f"and {len(names) - _FEW_FAMILIES} more"), *names[_FEW_FAMILIES:MOST_ROWS])
        shown = tag("div", *names[:_FEW_FAMILIES], rest if len(names) > _FEW_FAMILIES else None, class_="names")
        hint = tag("p", each.suggestion, class_="hint") if each.suggestion else None
        size = sum(family.size for family in each.families)
        rows.append([join(f"it {each.reason}", hint), shown, f"{size:,}"])
    values = table("What was not pruned and why", ["because", "families", "groups"], rows, words=2)
    line = f"{words.plural(sum(len(each.families) for each in found), 'family', 'families')} stayed whole."
    return Section("not-pruned", "What was not pruned, and why", join(tag("p", line), values))


def graph(run: Run) -> Section | None:
    """The drawing of operators and families, made when it is opened."""
    if not run.graph:
        return None
    if len(run.graph) > LARGEST_GRAPH:
        text = (
            f"The graph of this network is too large for this file ({len(run.graph) / 1e6:.1f} MB). Its families are listed above; "
            "geta analyze TARGET --html FILE draws the operators."
        )
        return Section("graph", "Dependency graph", tag("p", text, class_="note"))
    line = "Operators of the network and the families that run through them: what is removed together."
    button = tag("button", "Show the graph", type="button", id="open-graph", class_="strong")
    frame = tag("div", id="graph-frame", class_="frame", hidden=True)
    return Section("graph", "Dependency graph", join(tag("p", line), button, frame))


def reproduce(run: Run) -> Section | None:
    """Command, recipe and environment, with buttons that copy."""
    parts: list[Html] = []
    environment = run.environment
    if environment is not None and environment.command:
        parts.append(_copied("Command", " ".join(_quoted(part) for part in environment.command), "command"))
    if run.recipe:
        parts.append(_copied("recipe.yaml", run.recipe.rstrip("\n"), "recipe"))
    versions = {**run.result.versions, **(environment.versions if environment else {})}
    facts = [(name, str(version)) for name, version in versions.items()]
    if environment is not None:
        facts += [("python", environment.python), ("platform", environment.platform), ("device", environment.device)]
        facts += [("threads", "" if environment.threads is None else str(environment.threads)), ("started", environment.started)]
    facts = [(name, value) for name, value in dict(facts).items() if value]
    if facts:
        parts.append(_copied("Environment", "\n".join(f"{name}: {value}" for name, value in facts), "environment"))
    return Section("reproduce", "Reproduce it", join(*parts)) if parts else None


def _copied(heading: str, text: str, anchor: str) -> Html:
    button = tag("button", "Copy", type="button", data_copy=anchor, aria_label=f"Copy {heading}")
    return tag("div", tag("div", tag("h3", heading), button, class_="bar-row"), tag("pre", text, id=anchor, tabindex="0"), class_="copied")


def _quoted(part: str) -> str:
    import shlex

    return shlex.quote(part)
