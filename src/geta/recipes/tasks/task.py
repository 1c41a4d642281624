"""The contract of a task: how a batch enters the model, what is minimised, and what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from geta.errors import BadModelError, ConfigError
from geta.recipes.batches import Batch
from geta.recipes.settings import Settings

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named inputs of a model."""


Inputs = tuple[str, ...] | dict[str, str]
"""Columns of a batch that enter the model: in order, or as `argument of the model: column`."""


@dataclass(frozen=True)
class Metric:
    """What is measured on the test split. unit: "%", "dB" or ""."""

    name: str
    unit: str = ""
    higher_is_better: bool = True


class Task(Protocol):
    """Everything that training and evaluation need to know about a task.

    A score is computed from sums: `tally` of every batch is added up (over processes too), and `score` reads the sum.
    """

    @property
    def name(self) -> str:
        """What recipes call it."""
        ...

    @property
    def metric(self) -> Metric: ...

    @property
    def evaluation_batch(self) -> int | None:
        """How many rows one batch of the test split must have; None: whatever the recipe says."""
        ...

    def call(self, batch: Batch) -> Call:
        """The inputs of the model: `model(*args, **kwargs)`."""
        ...

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The scalar to minimise, mean over the batch."""
        ...

    def tally(self, output: Any, batch: Batch) -> Tensor:
        """What this batch adds to the score: a float64 tensor of any fixed shape."""
        ...

    def score(self, total: Tensor) -> float:
        """The metric, from the sum of all tallies."""
        ...


class RowByRow(Settings):
    """Settings of a task whose score doesn't depend on how the test rows are put into batches."""

    @property
    def evaluation_batch(self) -> int | None:
        return None


def column(batch: Batch, name: str, task: str) -> Tensor:
    """A column of a batch. Raises ConfigError that says which columns there are when it isn't one of them."""
    if name not in batch:
        raise ConfigError(
            f"task.name={task} needs the column '{name}', and the data gives {', '.join(batch)}; choose another data.source or task"
        )
    return batch[name]


def call_with(batch: Batch, inputs: Inputs, task: str) -> Call:
    """Columns of a batch as the inputs of a model. Raises ConfigError for a column that isn't there."""
    if isinstance(inputs, Mapping):
        return (), {argument: column(batch, name, task) for argument, name in inputs.items()}
    return tuple(column(batch, name, task) for name in inputs), {}


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, an object with `.logits`, or a dict with "logits".

    Raises BadModelError that says what came instead.
    """
    found = output if isinstance(output, Tensor) else part_of(output, "logits")
    if found is None:
        raise BadModelError(f"the task needs logits, and the model returns {type(output).__name__}: return a tensor, or `logits` in it")
    return found


def part_of(output: Any, name: str) -> Tensor | None:
    """The tensor called `name` in what a model returned (an attribute, or a key of a dict); None when there is none."""
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None
