"""The history of an optimizer as a matplotlib figure, and stages as shades, which other figures use as well."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from geta.graph.plot import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from geta.optim.history import HistoryRow

STAGE_COLOURS = {"warm-up": "#f4f4f4", "projection": "#fdebd0", "joint": "#d6eaf8", "cool-down": "#d5f5e3"}


def plot_history(rows: Sequence[HistoryRow], groups: int) -> Figure:
    """See `History.plot`. groups: in all."""
    quantized = any(row.mean_weight_bits is not None or row.upper_bound is not None for row in rows)
    rated = any(row.learning_rate is not None for row in rows)
    figure = new_figure("history.plot()", (8, 2.6 * (1 + quantized + rated)))
    panels = list(figure.subplots(1 + quantized + rated, 1, sharex=True, squeeze=False)[:, 0])
    steps = [row.step for row in rows]
    spans = stage_spans(steps, [row.stage for row in rows])
    for place, axes in enumerate(panels):
        shade_stages(axes, spans, named=place == 0)
    first = panels.pop(0)
    shares = [100 * row.redundant_groups / groups if groups else 0.0 for row in rows]
    first.plot(steps, [100 * row.group_sparsity for row in rows], color="tab:red", label="zero")
    first.plot(steps, shares, color="tab:red", linestyle=":", label="on their way to zero")
    first.set(ylabel="groups (%)", ylim=(-3, 103))
    first.legend(loc="upper left", fontsize="small")
    if quantized:
        _draw_bits(panels.pop(0), rows)
    if rated:
        last = panels.pop(0)
        known = [row for row in rows if row.learning_rate is not None]
        last.plot([row.step for row in known], [row.learning_rate for row in known], color="tab:blue")
        last.set(ylabel="learning rate", ylim=(0, None))
    figure.axes[-1].set(xlabel="step")
    return figure


def stage_spans(places: Sequence[float], stages: Sequence[str]) -> list[tuple[str, float, float]]:
    """(stage, start, end) of each run of equal stages; a row stands for what lies between it and the row before."""
    spans: list[tuple[str, float, float]] = []
    for (start, end), stage in zip(pairwise([0, *places]), stages, strict=True):
        if spans and spans[-1][0] == stage:
            spans[-1] = (stage, spans[-1][1], end)
        else:
            spans.append((stage, start, end))
    return spans


def shade_stages(axes: Any, spans: Sequence[tuple[str, float, float]], *, named: bool) -> None:
    """Shade the background of matplotlib axes; named: with the stages' names above."""
    for stage, start, end in spans:
        axes.axvspan(start, end, color=STAGE_COLOURS.get(stage, "white"), zorder=0, linewidth=0)
        if named:
            axes.text((start + end) / 2, 1.01, stage, transform=axes.get_xaxis_transform(), ha="center", size="small")


def _draw_bits(axes: Any, rows: Sequence[HistoryRow]) -> None:
    for label, key, style in (("mean of the weights", "mean_weight_bits", "-"), ("upper bound", "upper_bound", ":")):
        known = [(row.step, getattr(row, key)) for row in rows if getattr(row, key) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color="tab:green", linestyle=style, label=label)
    axes.set(ylabel="bits", ylim=(0, None))
    axes.legend(loc="upper right", fontsize="small")
