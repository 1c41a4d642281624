"""What a run tells while it goes on: a live view, lines in a log, a history for machines, TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from geta.errors import ConfigError
from geta.recipes.recipe import Recipe
from geta.recipes.run_folder import BOARD, LOG, append_history
from geta.recipes.tasks.task import Metric
from geta.report.progress import RunLog

_SCALARS = ("loss", "score", "group_sparsity", "mean_weight_bits", "upper_bound", "learning_rate")


class Record:
    """Where the numbers of a run go. board: TensorBoard's writer; writes: whether this process writes files."""

    def __init__(self, folder: Path, log: RunLog, metric: Metric, board: Any = None, *, writes: bool = True) -> None:
        self.folder, self.log, self.metric = folder, log, metric
        self._board, self._writes = board, writes

    def row(self, row: dict[str, Any]) -> None:
        """Keep one row of the history."""
        if self._writes:
            append_history(self.folder, row)
        if self._board is not None:
            for name in _SCALARS:
                if row[name] is not None:
                    self._board.add_scalar(f"{row['run']}/{name}", row[name], row["step"])
            self._board.flush()

    def words(self, row: Mapping[str, Any]) -> dict[str, str]:
        """A row for people."""
        unit = f" {self.metric.unit}" if self.metric.unit else ""
        fields = {"epoch": f"{row['epoch']:g}", "loss": f"{row['loss']:.4f}", self.metric.name: f"{row['score']:.2f}{unit}"}
        return fields | ({"stage": row["stage"], **self.constraints(row)} if row["stage"] else {})

    @staticmethod
    def constraints(now: Mapping[str, Any]) -> dict[str, str]:
        """How far pruning and quantization have come, for people, from a row or from an optimizer's `progress()`."""
        fields = {"zero groups": f"{now['group_sparsity']:.1%}"}
        if now.get("mean_weight_bits") is not None:
            fields |= {"mean bits": f"{now['mean_weight_bits']:.2f}", "bound": f"{now['upper_bound']:.1f}"}
        return fields


@contextmanager
def recording(folder: Path, recipe: Recipe, console: Console | None, *, first: bool, append: bool) -> Iterator[Record]:
    """The record of a run. first: whether this process is the one that writes and talks; append: go on with the log that is there."""
    if not first:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, RunLog(None, Console(file=nowhere)) as log:
            yield Record(folder, log, recipe.task.metric, writes=False)
        return
    board = board_class()(str(folder / BOARD)) if recipe.output.tensorboard else None
    try:
        with RunLog(folder / LOG, console, append=append) as log:
            yield Record(folder, log, recipe.task.metric, board)
    finally:
        if board is not None:
            board.close()


def board_class() -> Any:
    """TensorBoard's writer. Raises ConfigError when it isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("output.tensorboard = true needs TensorBoard, which is not installed: pip install 'geta[tensorboard]'") from None
    return SummaryWriter
