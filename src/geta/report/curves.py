"""Training curves as one PNG: loss, score, and what the constraints did meanwhile."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geta.graph.plot import new_figure
from geta.optim.history_plot import shade_stages, stage_spans
from geta.report.files import write_atomically
from geta.report.run_records import HistoryRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_history(path: Path, history: Sequence[HistoryRow], score: str) -> None:
    """Draw the rows of a run folder's history into the PNG file `path`, atomically; score: what to call the score, with its unit.

    Raises GetaError when matplotlib is missing.
    """
    save_figure(path, curves_figure({name: [row for row in history if row.run == name] for name in ("dense", "compact")}, score))


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, atomically; equal figures give equal bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120, metadata={"Software": "geta"})
    write_atomically(path, stream.getvalue())


def curves_figure(runs: Mapping[str, Sequence[HistoryRow]], score: str) -> Figure:
    """Loss, score and limits over epochs, or over steps where a row has no epoch; runs: label -> its rows, empty ones are left out."""
    known = {label: rows for label, rows in runs.items() if rows}
    by_epoch = all(row.epoch is not None for rows in known.values() for row in rows)
    figure = new_figure("drawing curves", (8, 9), "demo")
    loss, scores, limits = figure.subplots(3, 1, sharex=True)
    for label, rows in known.items():
        loss.plot(*_points(rows, "loss", by_epoch), label=label)
        scores.plot(*_points(rows, "score", by_epoch), label=label)
    loss.set(ylabel="training loss", yscale="log")
    scores.set(ylabel=score)
    scores.legend(loc="lower right")
    for rows in known.values():
        if any(row.stage for row in rows):
            _draw_limits(limits, rows, by_epoch)
            spans = stage_spans([_place(row, by_epoch) for row in rows], [row.stage for row in rows])
            for axes in (loss, scores, limits):
                shade_stages(axes, spans, named=axes is loss)
    limits.set(ylabel="zero groups (%)", xlabel="epoch" if by_epoch else "step", ylim=(-3, 103))
    return figure


def _place(row: HistoryRow, by_epoch: bool) -> float:
    return float(row.epoch) if by_epoch and row.epoch is not None else float(row.step)


def _points(rows: Sequence[HistoryRow], key: str, by_epoch: bool) -> tuple[list[float], list[float]]:
    """Places and values of the rows in which the value is known."""
    found = [row for row in rows if getattr(row, key) is not None]
    return [_place(row, by_epoch) for row in found], [getattr(row, key) for row in found]


def _draw_limits(axes: Any, rows: Sequence[HistoryRow], by_epoch: bool) -> None:
    places, shares = _points(rows, "group_sparsity", by_epoch)
    lines = axes.plot(places, [100 * share for share in shares], color="tab:red", label="zero groups")
    if any(row.mean_weight_bits is not None and row.upper_bound is not None for row in rows):
        bits = axes.twinx()
        lines += bits.plot(*_points(rows, "mean_weight_bits", by_epoch), color="tab:green", label="mean weight bits")
        lines += bits.plot(*_points(rows, "upper_bound", by_epoch), color="tab:green", linestyle=":", label="upper bound of the bits")
        bits.set(ylabel="bits", ylim=(0, None))
    axes.legend(handles=lines, loc="lower right")
