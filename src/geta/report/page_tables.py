"""Tables of a report: plain ones, ones whose cells are bars, and the tables that stand beside a chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from geta.report.charts import Chart
from geta.report.markup import Html, breakable, join, tag
from geta.report.scales import tick_label

MOST_ROWS = 250


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str | None]], *, words: int = 1, scrolls: bool = False) -> Html:
    """A table whose first cell of each row is a heading; the columns from number `words` on are aligned as numbers."""
    head = tag("tr", *[tag("th", text, scope="col", class_="number" if place >= words else None) for place, text in enumerate(headings)])
    body = [tag("tr", *[_cell(place, cell, words) for place, cell in enumerate(row)]) for row in rows]
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    inside = "scroll tall" if scrolls and len(body) > 12 else "scroll"
    return tag("div", whole, class_=inside, tabindex="0" if scrolls and len(body) > 12 else None, role="group", aria_label=caption)


def _cell(place: int, cell: str | None, words: int) -> Html:
    if place == 0:
        return tag("th", cell, scope="row")
    return tag("td", cell, class_="number" if place >= words else None)


def path(name: str) -> Html:
    """A module path or tensor name; what is called by the model itself says so."""
    return tag("code", breakable(name)) if name else tag("span", "(the model itself)", class_="soft")


def bar(share: float, style: str, text: str) -> Html:
    """A cell with a bar and its value in words."""
    filled = tag("span", class_=f"fill {style}", style=f"width:{100 * min(1.0, max(0.0, share)):.1f}%")
    return join(tag("span", filled, class_="bar", aria_hidden="true"), tag("span", text, class_="value"))


def folded(summary: str, content: Html, *, opened: bool = False) -> Html:
    """Something that is shown on request."""
    return tag("details", tag("summary", summary), content, open=opened)


def values_of(chart: Chart) -> Html:
    """The table beside a chart."""
    data: dict[str, Any] = chart.hover()
    places = _spread(len(data["x"]))
    headings = [chart.x_label, *(f"{s['label']}{f' ({chart.unit})' if chart.unit else ''}" for s in data["series"])]
    rows = [
        [tick_label(data["x"][place]), *(_value(s["y"][place]) for s in data["series"]), *([data["stages"][place]] if chart.spans else [])]
        for place in places
    ]
    caption = chart.title if len(places) == len(data["x"]) else f"{chart.title} ({len(places)} of {len(data['x'])} rows)"
    return table(caption, [*headings, *(["stage"] if chart.spans else [])], rows, scrolls=True)


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _spread(rows: int) -> list[int]:
    """All rows, or `MOST_ROWS` of them spread evenly."""
    if rows <= MOST_ROWS:
        return list(range(rows))
    return [round(number * (rows - 1) / (MOST_ROWS - 1)) for number in range(MOST_ROWS)]
