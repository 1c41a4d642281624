"""The contract of a task: how a batch enters the model, what is minimised, and what is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from geta.errors import BadModelError
from geta.recipes.batches import Batch

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named inputs of a model."""


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


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, an object with `.logits`, or a dict with "logits".

    Raises BadModelError that says what came instead.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise BadModelError(f"the task needs logits, and the model returns {type(output).__name__}: return a tensor, or `logits` in it")
    return found
