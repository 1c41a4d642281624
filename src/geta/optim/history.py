"""What an optimizer notes of its own run: a few hundred rows, at next to no cost and without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geta.errors import CheckpointError
from geta.optim.schedule import Stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS_PER_RUN = 200
"""Rows at even steps of a planned run; ends of stages come on top."""

_MOST_ROWS = 2 * ROWS_PER_RUN + 100
_STAGES: tuple[Stage, ...] = ("warm-up", "projection", "joint", "cool-down")
_NONE = -1.0  # no number that a column can hold; a NaN would make equal states differ
_COLUMNS = 7

_Noted = tuple[float | Tensor, ...]


@dataclass(frozen=True)
class HistoryRow:
    """The run after `step` steps.

    stage:            of the last of these steps.
    learning_rate:    of the first parameter group; None where it has none.
    group_sparsity:   share of the groups that are zero for good. redundant_groups: on their way to zero.
    mean_weight_bits: bits; upper_bound: of the widest tensor, in bits. None without quantizers.
    """

    step: int
    stage: Stage
    learning_rate: float | None
    pruned_groups: int
    redundant_groups: int
    group_sparsity: float
    mean_weight_bits: float | None
    upper_bound: float | None


class History:
    """Rows of a run: every `total_steps // 200` steps, at the ends of stages and of the run.

    Runs that go on beyond their plan keep at most 500 rows: every second one is dropped, and the distance doubles.
    Bit widths stay on the device until `rows` is read, so that noting one costs a few small kernels there and no synchronisation.
    """

    def __init__(self, total_steps: int, groups: int) -> None:
        self._total = total_steps
        self._groups = groups
        self._every = max(1, total_steps // ROWS_PER_RUN)
        self._noted: list[_Noted] = []

    def __len__(self) -> int:
        return len(self._noted)

    @property
    def rows(self) -> list[HistoryRow]:
        """All rows in order. Waits for the device."""
        return [self._row(row) for row in self.state()["rows"].tolist()]

    def due(self, step: int, *, ends: bool) -> bool:
        """Whether the state after `step` steps is to be noted; ends: the step was the last of its stage."""
        return ends or step % self._every == 0 or step == self._total

    def note(
        self,
        *,
        step: int,
        stage: Stage,
        learning_rate: float | Tensor | None,
        pruned_groups: int,
        redundant_groups: int,
        mean_weight_bits: Tensor | None,
        upper_bound: float | None,
    ) -> None:
        """Add a row; tensors are kept as they are."""
        rate = learning_rate.detach().clone() if isinstance(learning_rate, Tensor) else learning_rate
        values = (rate, pruned_groups, redundant_groups, mean_weight_bits, upper_bound)
        self._noted.append((step, _STAGES.index(stage), *(_NONE if value is None else value for value in values)))
        if len(self._noted) > _MOST_ROWS:
            self._thin()

    def state(self) -> dict[str, Any]:
        """Rows and their distance, for checkpoints: tensors and numbers. Waits for the device."""
        self._noted = self._read()
        return {"rows": torch.tensor(self._noted, dtype=torch.float64).reshape(-1, _COLUMNS), "every": self._every}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take over what `state` returned; None (a checkpoint of before there was a history) leaves no rows.

        Raises CheckpointError for something else.
        """
        if state is None:
            self._noted = []
            return
        rows, every = state.get("rows"), state.get("every")
        if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] != _COLUMNS or not isinstance(every, int) or every < 1:
            raise CheckpointError("the history in the optimizer state is none: it is damaged or of another version")
        self._noted = [tuple(row) for row in rows.tolist()]
        self._every = every

    def plot(self) -> Figure:
        """Zero groups, bits and the learning rate over steps, the stages shaded.

        Returns a matplotlib figure that `pyplot` doesn't know. Raises GetaError when matplotlib is missing
        (`pip install 'geta[plots]'`).
        """
        from geta.optim.history_plot import plot_history

        return plot_history(self.rows, self._groups)

    def __repr__(self) -> str:
        return f"History of {len(self)} rows; see .rows and .plot()"

    def _read(self) -> list[_Noted]:
        """All rows as numbers; what is still on a device is read in one piece."""
        waiting = [value for row in self._noted for value in row if isinstance(value, Tensor)]
        if not waiting:
            return self._noted
        device = waiting[0].device
        found = iter(torch.stack([value.to(device, torch.float64).reshape(()) for value in waiting]).tolist())
        return [tuple(next(found) if isinstance(value, Tensor) else value for value in row) for row in self._noted]

    def _row(self, values: Sequence[float]) -> HistoryRow:
        step, stage, rate, pruned, redundant, bits, bound = values
        share = pruned / self._groups if self._groups else 0.0
        numbers = [None if value == _NONE else value for value in (rate, bits, bound)]
        return HistoryRow(int(step), _STAGES[int(stage)], numbers[0], int(pruned), int(redundant), share, numbers[1], numbers[2])

    def _thin(self) -> None:
        """Keep the ends of stages and every second row of the others."""
        last = len(self._noted) - 1
        ends = {place for place in range(last) if self._noted[place][1] != self._noted[place + 1][1]} | {last}
        self._every *= 2
        self._noted = [row for place, row in enumerate(self._noted) if place in ends or row[0] % self._every == 0]
