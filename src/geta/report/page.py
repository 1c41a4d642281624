"""The frame of a report's page: one self-contained file that opens offline, in light and dark, on any width."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from geta.graph.page import escape_json, page_shell
from geta.report.markup import Html, join, tag

LARGEST_GRAPH = 3_500_000
"""Characters of a graph's data from which it is left out, so that a report stays below 5 MB."""

_SLOT = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Section:
    """A part of the page with its heading; anchor: its id, in the list of contents too."""

    anchor: str
    heading: str
    content: Html


@dataclass(frozen=True)
class Page:
    """All that one page shows.

    eyebrow, title, facts: the head. lead: what stands before the first section. charts: what the script shows under the pointer.
    graph: escaped JSON of `geta.graph.page.page_data`; "" without a drawing.
    """

    eyebrow: str
    title: str
    facts: Sequence[tuple[str, str]]
    lead: Html
    sections: Sequence[Section]
    charts: dict[str, Any]
    graph: str = ""


def fill(page: Page) -> str:
    """The page as text; everything from outside is escaped, in one pass, so that no data is read as a slot."""
    listed = [tag("li", tag("a", section.heading, href=f"#{section.anchor}")) for section in page.sections]
    facts = [tag("div", tag("dt", word), tag("dd", value)) for word, value in page.facts if value]
    sections = [
        tag("section", tag("h2", section.heading, id=f"{section.anchor}-heading"), section.content,
            id=section.anchor, aria_labelledby=f"{section.anchor}-heading")
        for section in page.sections
    ]  # fmt: skip
    slots = {
        "title": join(f"{page.title} \u00b7 {page.eyebrow}"),
        "style": _asset("report.css"),
        "script": _asset("report.js"),
        "eyebrow": join(page.eyebrow),
        "name": join(page.title),
        "facts": join(*facts),
        "contents": join(*listed),
        "lead": page.lead,
        "sections": join(*sections),
        "charts": to_json(page.charts),
        "graph": embedded_graph(page.graph, page.title),
    }
    return _SLOT.sub(lambda slot: slots[slot[1]], _asset("report.html"))


def embedded_graph(graph: str, title: str) -> Html:
    """The page of the graph in two inert blocks: its shell and its data, put together when somebody opens it."""
    if not graph:
        return Html("")
    shell = to_json(list(page_shell(title=f"{title}: dependency graph")))
    return Html(
        f'<script type="application/json" id="graph-shell">{shell}</script>\n'
        f'<script type="application/json" id="graph-data">{escape_json(graph)}</script>'
    )


def to_json(data: Any) -> str:
    """JSON that may stand inside a script element."""
    return escape_json(json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def _asset(name: str) -> str:
    return resources.files("geta.report").joinpath("page_assets", name).read_text(encoding="utf-8")
