"""A dependency graph as a matplotlib figure: families as bars, with the reason where they stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geta.errors import ConfigError, GetaError
from geta.graph.page import touched_parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from geta.graph.dependency import DependencyGraph

PRUNABLE, INEXACT, STAYS = "#2457d6", "#c98a1b", "#a9b0bc"
_LONGEST_NAME, _LONGEST_REASON = 44, 60


@dataclass(frozen=True)
class Row:
    """One bar: a family, or several small ones together (`summed` families). kind: "prunable", "inexact" or "stays"."""

    label: str
    groups: int
    touched: int
    kind: str
    verdict: str
    summed: int = 0


def new_figure(what: str, size: tuple[float, float], extra: str = "plots") -> Figure:
    """An empty figure that belongs to nobody: `pyplot` doesn't know it.

    what: for the error, such as "graph.plot()". size: inches. Raises GetaError when matplotlib is missing, with the extra that brings it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise GetaError(f"{what} needs matplotlib, which is not installed: pip install 'geta[{extra}]'") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_graph(graph: DependencyGraph, most: int = 30) -> Figure:
    """See `DependencyGraph.plot`."""
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ConfigError(f"most is {most!r}: it must be a whole number of families, at least 1")
    shown = rows(graph, most)
    figure = new_figure("graph.plot()", (11, 1.6 + 0.27 * max(1, len(shown))))
    groups, touched = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    own = [row for row in shown if not row.summed]
    most_groups, most_touched = max([1, *(row.groups for row in own)]), max([1, *(row.touched for row in own)])
    room = max([1.25 * most_groups, *(row.groups + 0.017 * most_groups * min(_LONGEST_REASON, len(row.verdict)) for row in own)])
    _bars(groups, shown, [row.groups for row in shown], (most_groups, room))
    _bars(touched, shown, [row.touched for row in shown], (most_touched, 1.35 * most_touched))
    groups.set(title="groups", yticks=range(len(shown)), yticklabels=[row.label for row in shown], ylim=(len(shown) - 0.4, -0.6))
    touched.set(title="parameters in their rows and columns")
    figure.suptitle(_headline(graph), size=11)
    _legend(figure, shown)
    return figure


def rows(graph: DependencyGraph, most: int) -> list[Row]:
    """The families that touch most parameters, in the order of the network, then the others summed by what may happen to them."""
    touched = touched_parameters(graph)
    every = []
    for family, count in zip(graph.families, touched, strict=True):
        kind = ("inexact" if family.inexact else "prunable") if family.prunable else "stays"
        verdict = f"stays: it {family.reason}" if kind == "stays" else f"inexactly: it {family.inexact}" if kind == "inexact" else ""
        every.append(Row(_short(family.name, _LONGEST_NAME, end=True), family.size, count, kind, verdict))
    ranked = sorted(range(len(every)), key=lambda place: (-every[place].touched, place))
    chosen = sorted(ranked[:most])
    rest = [every[place] for place in sorted(ranked[most:])]
    return [*(every[place] for place in chosen), *_summed(rest)]


def _summed(rest: Sequence[Row]) -> list[Row]:
    """One bar for each kind among the families that got none."""
    found = []
    for kind, word in (("prunable", "prunable"), ("inexact", "inexactly prunable"), ("stays", "not prunable")):
        mine = [row for row in rest if row.kind == kind]
        if mine:
            label = f"{len(mine):,} smaller, {word}"
            found.append(Row(label, sum(row.groups for row in mine), sum(row.touched for row in mine), kind, "", len(mine)))
    return found


def _bars(axes: Any, shown: Sequence[Row], values: Sequence[int], limits: tuple[float, float]) -> None:
    """Bars with their values; limits: the longest bar and the end of the axis.

    Bars of many families together are cut off at the longest one, so that the others can be told apart.
    """
    longest, room = limits
    axes.set(xlim=(0, room))
    for place, (row, value) in enumerate(zip(shown, values, strict=True)):
        colour = {"prunable": PRUNABLE, "inexact": INEXACT}.get(row.kind, STAYS)
        cut = row.summed > 0 and value > longest
        length = longest if cut else value
        axes.barh(place, length, color=colour, height=0.66, alpha=0.45 if row.summed else 1.0)
        text = f"{value:,} (bar cut off)" if cut else f"{value:,}"
        if row.verdict and axes.get_subplotspec().is_first_col():
            text = _short(f"{text}  {row.verdict}", _LONGEST_REASON)
        axes.annotate(text, (length, place), (4, 0), textcoords="offset points", va="center", size=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, length=2)
    axes.title.set_size(9)


def _legend(figure: Figure, shown: Sequence[Row]) -> None:
    from matplotlib.patches import Patch

    kinds = {row.kind for row in shown}
    words = (("prunable", PRUNABLE, "can be removed"), ("inexact", INEXACT, "can be removed, inexactly"), ("stays", STAYS, "stays"))
    handles = [Patch(color=colour, label=label) for kind, colour, label in words if kind in kinds]
    if handles:
        figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), fontsize=8, frameon=False)


def _headline(graph: DependencyGraph) -> str:
    name, prunable = type(graph.model).__name__, len(graph.prunable_families)
    return f"{name}: {graph.num_groups:,} groups in {prunable:,} of {len(graph.families):,} families can be removed"


def _short(text: str, most: int, *, end: bool = False) -> str:
    """At most so many characters; `end`: the end says most, as in paths. Dollar signs are no formulas."""
    cut = text if len(text) <= most else f"\u2026{text[-most + 1 :]}" if end else f"{text[: most - 1]}\u2026"
    return cut.replace("$", r"\$")
