"""Training curves as one PNG: loss, accuracy, and what the constraints did meanwhile."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geta.errors import GetaError
from geta.report.files import write_atomically

_STAGE_COLOURS = {"warm-up": "#f4f4f4", "projection": "#fdebd0", "joint": "#d6eaf8", "cool-down": "#d5f5e3"}


@dataclass(frozen=True)
class Epoch:
    """One epoch of one run.

    epoch:    passes over the training data so far. loss: mean training loss. accuracy: on the test images, in percent, or another metric.
    stage:    of the optimizer, "" for a plain one. sparsity: share of the groups that are zero, in percent.
    bits:     mean bit width of the weight quantizers; bound: their current upper bound (None where there is none).
    """

    epoch: float
    loss: float
    accuracy: float
    stage: str = ""
    sparsity: float = 0.0
    bits: float | None = None
    bound: float | None = None


def save_curves(path: Path, runs: Mapping[str, Sequence[Epoch]], *, metric: str = "test accuracy (%)") -> None:
    """Draw the epochs of every run into the PNG file `path`, atomically.

    runs: label -> its epochs. metric: what `accuracy` is, for the axis. Raises GetaError when matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise GetaError("drawing curves needs matplotlib, which is not installed: pip install 'geta[demo]'") from None
    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, limits = figure.subplots(3, 1, sharex=True)
    for label, epochs in runs.items():
        numbers = [row.epoch for row in epochs]
        loss.plot(numbers, [row.loss for row in epochs], label=label)
        accuracy.plot(numbers, [row.accuracy for row in epochs], label=label)
    loss.set(ylabel="training loss", yscale="log")
    accuracy.set(ylabel=metric)
    accuracy.legend(loc="lower right")
    staged = {label: epochs for label, epochs in runs.items() if any(row.stage for row in epochs)}
    for epochs in staged.values():
        _draw_limits(limits, epochs)
        for axes in (loss, accuracy, limits):
            _shade_stages(axes, epochs, named=axes is loss)
    limits.set(ylabel="zero groups (%)", xlabel="epoch", ylim=(-3, 103))
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120, metadata={"Software": "geta"})
    write_atomically(path, stream.getvalue())


def _draw_limits(axes: Any, epochs: Sequence[Epoch]) -> None:
    numbers = [row.epoch for row in epochs]
    lines = axes.plot(numbers, [row.sparsity for row in epochs], color="tab:red", label="zero groups")
    quantized = [row for row in epochs if row.bits is not None and row.bound is not None]
    if quantized:
        bits = axes.twinx()
        numbers = [row.epoch for row in quantized]
        lines += bits.plot(numbers, [row.bits for row in quantized], color="tab:green", label="mean weight bits")
        lines += bits.plot(numbers, [row.bound for row in quantized], color="tab:green", linestyle=":", label="upper bound of the bits")
        bits.set(ylabel="bits", ylim=(0, None))
    axes.legend(handles=lines, loc="lower right")


def _shade_stages(axes: Any, epochs: Sequence[Epoch], *, named: bool) -> None:
    start = 0.0
    for number, row in enumerate(epochs):
        last = number == len(epochs) - 1
        if last or epochs[number + 1].stage != row.stage:
            axes.axvspan(start, row.epoch, color=_STAGE_COLOURS.get(row.stage, "white"), zorder=0, linewidth=0)
            if named:
                axes.text((start + row.epoch) / 2, 1.01, row.stage, transform=axes.get_xaxis_transform(), ha="center", size="small")
            start = row.epoch
