"""One self-contained page that shows a dependency graph: families in a table, operators in a drawing, no network needed."""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from torch import nn

from geta.graph.families import Family
from geta.graph.layout import lay_out
from geta.graph.names import find_tensor
from geta.graph.render import covered_fraction
from geta.graph.view import INPUT, OUTPUT

if TYPE_CHECKING:
    from geta.graph.dependency import DependencyGraph

_SLOT = re.compile(r"\{\{(\w+)\}\}")


def build_page(graph: DependencyGraph) -> str:
    """The page as text. All names in it are data of a JSON block that the page's script shows as text, never as markup."""
    return fill_page(page_data(graph), title=f"{type(graph.model).__name__}: dependency graph")


def fill_page(data: dict[str, Any], *, title: str) -> str:
    """Put data, style and script into the template, in one pass, so that no data is read as a slot."""
    before, after = page_shell(title=title)
    return before + escape_json(json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))) + after


def page_shell(*, title: str) -> tuple[str, str]:
    """The page up to its data, and from there on: whoever has the data as escaped JSON (`escape_json`) puts it between."""
    slots = {"title": html.escape(title), "style": _asset("page.css"), "script": _asset("drawing.js") + _asset("page.js")}
    before, after = (_SLOT.sub(lambda slot: slots[slot[1]], part) for part in _asset("page.html").split("{{data}}"))
    return before, after


def escape_json(text: str) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or open a comment."""
    return text.replace("<", "\\u003c")


def _asset(name: str) -> str:
    return resources.files("geta.graph").joinpath("page_assets", name).read_text(encoding="utf-8")


def page_data(graph: DependencyGraph) -> dict[str, Any]:
    """Everything that the page's script shows; repeated texts are numbers into `texts`."""
    view = graph.view
    placed = lay_out(view)
    texts: dict[str, int] = {}
    numbers = {family.name: number for number, family in enumerate(graph.families)}

    def text(value: str) -> int:
        return texts.setdefault(value, len(texts))

    nodes = [
        [
            node.name,
            text(node.op),
            text(node.module),
            [list(shape) for shape in node.shapes],
            text(node.dtype),
            list(node.inputs),
            [text(name) for name in node.parameters],
            [numbers[name] for name in node.families],
            ("", "attached", "inserted").index(node.branch),
            int(placed.x[place]),
            int(placed.y[place]),
            int(placed.column[place]),
        ]
        for place, node in enumerate(view.nodes)
    ]
    families = [
        {
            **family.summary(),
            "touched": touched,
            "members": [[text(name), *rest] for name, *rest in _members(graph, family)],
        }
        for family, touched in zip(graph.families, touched_parameters(graph), strict=True)
    ]
    return {
        "model": type(graph.model).__name__,
        "parameters": sum(parameter.numel() for parameter in graph.model.parameters()),
        "operators": sum(node.op not in (INPUT, OUTPUT) for node in view.nodes),
        "groups": graph.num_groups,
        "share": covered_fraction(graph),
        "exact": graph.example.exact,
        "notes": graph.notes,
        "families": families,
        "nodes": nodes,
        "gutters": list(placed.gutters),
        "bands": [[band.label, band.left, band.top, band.right, band.bottom] for band in placed.bands],
        "texts": list(texts),
    }


def touched_parameters(graph: DependencyGraph) -> list[int]:
    """For every family, the parameter elements that lie in a row or column of it; one in both counts once."""
    sizes = {name: find_tensor(graph.model, name).numel() for name in _touched_names(graph)}
    return [_touched(graph, family, sizes) for family in graph.families]


def _members(graph: DependencyGraph, family: Family) -> list[tuple[str, int, int, str, bool]]:
    """(tensor, dimension, rows per group, role, whether they have to be zero); of a residual branch all tensors that go with it."""
    if not family.is_layer:
        return [(m.param, m.dim, int(m.index.shape[1]), m.role, m.zero) for m in family.members]
    makers = {member.param for member in family.members}
    sizes = {name: find_tensor(graph.model, name).shape for name in family.removes}
    roles = {name: "producer" if name in makers else "consumer" for name in family.removes}
    return [(name, 0, shape[0] if shape else 1, roles[name], name in makers) for name, shape in sizes.items()]


def _touched_names(graph: DependencyGraph) -> list[str]:
    own = [member.param for family in graph.families for member in family.members if member.role != "buffer"]
    return list(dict.fromkeys([*own, *(name for family in graph.families for name in family.removes)]))


def _touched(graph: DependencyGraph, family: Family, sizes: dict[str, int]) -> int:
    """Parameter elements that lie in a row or column of the family; one in both counts once."""
    if family.is_layer:
        return sum(sizes[name] for name in family.removes if isinstance(find_tensor(graph.model, name), nn.Parameter))
    untouched: dict[str, float] = {}
    for member in family.members:
        if member.role != "buffer":
            whole = find_tensor(graph.model, member.param).shape[member.dim]
            untouched[member.param] = untouched.get(member.param, 1.0) * (1 - member.index.numel() / whole)
    return round(sum(sizes[name] * (1 - rest) for name, rest in untouched.items()))
