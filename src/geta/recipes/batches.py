"""What data looks like to a training run: splits that hand out rows by number, so that a run can be resumed at any step.

A batch is a dict of tensors with the rows in dimension 0, e.g. `{"images": [N, C, H, W], "labels": [N]}`. Which rows, in which order, is
the run's business (it follows from the seed, the epoch and the step); a split only knows how to fetch them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

Batch = dict[str, Tensor]


class Split(Protocol):
    """One part of a data set. The same rows always give the same batch."""

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers, in this order."""
        ...


@dataclass(frozen=True)
class Data:
    """A data set: what to train on, what to measure on, and facts that a model may need (`classes`, `channels`, `vocabulary` ...)."""

    train: Split
    test: Split
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorSplit:
    """A split that lies in memory."""

    tensors: Batch

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def batch(self, rows: Sequence[int]) -> Batch:
        index = list(rows)
        return {name: tensor[index] for name, tensor in self.tensors.items()}
