"""Charts of a report as inline SVG: lines over stages, points with a front, steps per layer.

Every chart is drawn twice, for wide and for narrow windows, so that text keeps its size; the style sheet shows one of them.
What is under the pointer comes from `Chart.hover`, which the page's script reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from geta.report.markup import Html, join, tag
from geta.report.scales import Scale, around, tick_label

WHOLE, WIDE, NARROW = 1030, 490, 316
"""Widths in pixels: of the whole column, of half of it, of a phone."""
_HEIGHT = 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 34
_LOG_FROM = 20.0  # highest / lowest value from which a logarithmic axis reads better


@dataclass(frozen=True)
class Series:
    """One line: its label, its style (a class of the style sheet), and its points; y is None where nothing is known."""

    label: str
    style: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]


@dataclass(frozen=True)
class Span:
    """A part of the x axis that belongs to one stage."""

    stage: str
    start: float
    end: float


@dataclass(frozen=True)
class Chart:
    """Lines over a common x axis. zero: the y axis starts at zero. whole: its ticks are whole numbers. log: where the values span much.

    steps: lines are drawn as steps. names: what an x stands for where it is no number; such a chart takes the whole width.
    """

    key: str
    title: str
    unit: str
    x_label: str
    series: tuple[Series, ...]
    spans: tuple[Span, ...] = ()
    zero: bool = False
    whole: bool = False
    steps: bool = False
    log: bool = False
    names: tuple[str, ...] = field(default=(), repr=False)

    def hover(self) -> dict[str, Any]:
        """What the script shows: {x, names, xLabel, unit, series: [{label, style, y}], stages}; all lists as long as x."""
        xs = sorted({x for series in self.series for x in series.x})
        lines = [{"label": s.label, "style": s.style, "y": _looked_up(s, xs)} for s in self.series]
        stages = [next((span.stage for span in self.spans if span.start < x <= span.end), "") for x in xs]
        return {"x": xs, "names": list(self.names), "xLabel": self.x_label, "unit": self.unit, "series": lines, "stages": stages}


@dataclass(frozen=True)
class Point:
    """A network in the plane of cost and score. style: a class; front: whether it is on the front."""

    label: str
    style: str
    cost: float
    score: float
    front: bool = False


def both(draw: Callable[[int], Html], wide: int = WIDE) -> Html:
    """The wide and the narrow drawing of one chart."""
    return join(tag("div", draw(wide), class_="wide"), tag("div", draw(NARROW), class_="narrow"))


def line_chart(chart: Chart) -> Html:
    """The chart with its title; focusable, so that arrow keys read values."""
    known = [y for series in chart.series for y in series.y if y is not None]
    log = chart.log and bool(known) and min(known) > 0 and max(known) / min(known) >= _LOG_FROM
    title = f"{chart.title} ({chart.unit})" if chart.unit else chart.title
    note = tag("span", " logarithmic", class_="soft") if log else None
    drawn = both(lambda width: _lines(chart, width, known, log), WHOLE if chart.names else WIDE)
    return tag("figure", tag("figcaption", title, note), drawn, class_="chart")


def _lines(chart: Chart, width: int, known: list[float], log: bool) -> Html:
    xs = [x for series in chart.series for x in series.x]
    low, high = (min([*xs, *(span.start for span in chart.spans)]), max(xs)) if xs else (0.0, 1.0)
    low, high = (low - 0.5, high + 0.5) if chart.steps else (low, high)
    x = Scale(low, high if high > low else low + 1, _LEFT, width - _RIGHT)
    y = Scale(*around(known, log=log, zero=chart.zero), _HEIGHT - _BOTTOM, _TOP, log)
    parts = [
        *[_shade(span, x) for span in chart.spans],
        *_axes(x, y, width, chart),
        *[_path(series, x, y, steps=chart.steps) for series in chart.series],
    ]
    values = [f"{s.label} ends at {tick_label(last)}" for s in chart.series if (last := _last(s)) is not None]
    label = f"{chart.title}: {'; '.join(values) or 'no values'}. Arrow keys read the values."
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width} {_HEIGHT}",
        class_="plot",
        role="img",
        tabindex="0",
        aria_label=label,
        data_chart=chart.key,
        data_left=x.start,
        data_right=x.end,
        data_low=str(x.low),
        data_high=str(x.high),
        data_top=_TOP,
        data_bottom=_HEIGHT - _BOTTOM,
    )


def _shade(span: Span, x: Scale) -> Html:
    start, end = x(span.start), x(span.end)
    return tag("rect", x=start, y=_TOP, width=end - start, height=_HEIGHT - _BOTTOM - _TOP, class_=f"stage {stage_class(span.stage)}")


def stage_class(stage: str) -> str:
    """The style of a stage: one of the four, or "stage-other"."""
    return f"stage-{stage}" if stage in ("warm-up", "projection", "joint", "cool-down") else "stage-other"


def _axes(x: Scale, y: Scale, width: int, chart: Chart) -> list[Html]:
    bottom, named = _HEIGHT - _BOTTOM, bool(chart.names)
    parts: list[Html] = []
    for value in y.ticks(whole=chart.whole):
        at = y(value)
        parts.append(tag("line", x1=_LEFT, x2=width - _RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", tick_label(value), x=_LEFT - 6, y=at + 4, class_="tick end"))
    for value in () if named else x.ticks(6 if width > NARROW else 4):
        parts.append(tag("text", tick_label(value), x=x(value), y=bottom + 15, class_="tick middle"))
    parts.append(tag("line", x1=_LEFT, x2=width - _RIGHT, y1=bottom, y2=bottom, class_="axis"))
    parts.append(tag("text", chart.x_label, x=(_LEFT + width - _RIGHT) / 2, y=_HEIGHT - (12 if named else 4), class_="tick middle"))
    return parts


def _path(series: Series, x: Scale, y: Scale, *, steps: bool) -> Html:
    points = [(x(at), y(value)) for at, value in zip(series.x, series.y, strict=True) if value is not None]
    if len(points) == 1:
        return tag("circle", cx=points[0][0], cy=points[0][1], r=3, class_=f"dot {series.style}")
    return tag("path", d=_steps(points) if steps else _joined(points), class_=f"line {series.style}")


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in points) if points else ""


def _steps(points: Sequence[tuple[float, float]]) -> str:
    """A line that keeps its height around each point."""
    if not points:
        return ""
    half = (points[1][0] - points[0][0]) / 2 if len(points) > 1 else 4
    return f"M{points[0][0] - half:.1f},{points[0][1]:.1f}" + "".join(f"V{py:.1f}H{px + half:.1f}" for px, py in points)


def _last(series: Series) -> float | None:
    return next((y for y in reversed(series.y) if y is not None), None)


def _looked_up(series: Series, xs: Sequence[float]) -> list[float | None]:
    known = {x: y for x, y in zip(series.x, series.y, strict=True) if y is not None}
    return [known.get(x) for x in xs]


def pareto_chart(points: Sequence[Point], metric: str, *, higher_is_better: bool) -> Html:
    """Scores over relative BOPs (logarithmic), with the front as steps."""
    return both(lambda width: _pareto(points, metric, width, higher_is_better=higher_is_better))


def _pareto(points: Sequence[Point], metric: str, width: int, *, higher_is_better: bool) -> Html:
    height = 300
    x = Scale(*around([p.cost for p in points], log=True, margin=0.1), _LEFT, width - _RIGHT - 6, log=True)
    y = Scale(*around([p.score for p in points], margin=0.14), height - _BOTTOM, _TOP)
    parts: list[Html] = []
    for value in y.ticks():
        parts.append(tag("line", x1=_LEFT, x2=width - _RIGHT, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", tick_label(value), x=_LEFT - 6, y=y(value) + 4, class_="tick end"))
    for value in x.ticks(5 if width > NARROW else 3):
        parts.append(tag("text", f"{100 * value:.3g} %", x=x(value), y=height - _BOTTOM + 15, class_="tick middle"))
    parts.append(tag("line", x1=_LEFT, x2=width - _RIGHT, y1=height - _BOTTOM, y2=height - _BOTTOM, class_="axis"))
    parts.append(tag("text", "BOPs, compact / dense", x=(_LEFT + width) / 2, y=height - 4, class_="tick middle"))
    front = sorted((p for p in points if p.front), key=lambda p: p.cost)
    if len(front) > 1:
        corners = "".join(f"H{x(p.cost):.1f}V{y(p.score):.1f}" for p in front[1:])
        parts.append(tag("path", d=f"M{x(front[0].cost):.1f},{y(front[0].score):.1f}{corners}", class_="line front"))
    parts += _marks(points, x, y, width)
    best = "up" if higher_is_better else "down"
    label = f"{metric} over relative BOPs, better is {best} and to the left: " + "; ".join(
        f"{p.label} {tick_label(p.score)} at {100 * p.cost:.3g} %" for p in points
    )
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", class_="pareto", role="img", aria_label=label)


def _marks(points: Sequence[Point], x: Scale, y: Scale, width: int) -> list[Html]:
    """Points with their labels, each label at the first of four places where nothing else is."""
    marks, labels = [], []
    taken = [(x(p.cost) - 6, y(p.score) - 6, x(p.cost) + 6, y(p.score) + 6) for p in points]
    for point in sorted(points, key=lambda p: p.style == "other"):
        px, py = x(point.cost), y(point.score)
        title = tag("title", f"{point.label}: {tick_label(point.score)} at {100 * point.cost:.3g} % of the BOPs")
        marks.append(tag("circle", title, cx=px, cy=py, r=6 if point.style == "compact" else 4.5, class_=f"dot {point.style}"))
        text = point.label if len(point.label) <= 26 else f"{point.label[:25]}\u2026"
        long = 6.3 * len(text)
        for left, down in ((False, -9), (True, -9), (False, 18), (True, 18)):
            area = (
                (px - 4 - long, py + down - 10, px - 4, py + down + 2) if left else (px + 4, py + down - 10, px + 4 + long, py + down + 2)
            )
            inside = area[0] >= 0 and area[2] <= width
            if inside and not any(a < area[2] and area[0] < c and b < area[3] and area[1] < d for a, b, c, d in taken):
                taken.append(area)
                labels.append(tag("text", text, x=px - 4 if left else px + 4, y=py + down, class_="name end" if left else "name"))
                break
    return [*marks[::-1], *labels]


def pareto_front(points: Sequence[tuple[float, float]], *, higher_is_better: bool) -> list[bool]:
    """For each (cost, score): whether no other point is at most as costly and at least as good, and better in one of the two."""
    sign = 1 if higher_is_better else -1

    def beaten(cost: float, score: float) -> bool:
        return any(
            other <= cost and sign * value >= sign * score and (other < cost or sign * value > sign * score) for other, value in points
        )

    return [math.isfinite(cost) and not beaten(cost, score) for cost, score in points]
