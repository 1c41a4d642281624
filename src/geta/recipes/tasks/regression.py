"""Predicting numbers."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from geta.errors import BadModelError
from geta.recipes.batches import Batch
from geta.recipes.tasks.task import Call, Inputs, Metric, RowByRow, call_with, column, logits_of

ErrorName = Literal["mse", "l1", "smooth-l1"]


def error_of(name: ErrorName, found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over all elements of (x - y)^2 ("mse"), |x - y| ("l1"), or half the square below 1 and |x - y| - 1/2 above ("smooth-l1")."""
    if name == "mse":
        return F.mse_loss(found, wanted)
    return F.l1_loss(found, wanted) if name == "l1" else F.smooth_l1_loss(found, wanted)


class Regression(RowByRow):
    """The metric is the root of the mean squared error over all numbers of the test split. Batches: `targets` [N, ...], and the `inputs`.

    error: "mse", "l1" or "smooth-l1". inputs: columns that enter the model, as with classification.
    """

    name: Literal["regression"]
    error: ErrorName = "mse"
    inputs: Inputs = ("images",)

    @property
    def metric(self) -> Metric:
        return Metric("root mean squared error", "", higher_is_better=False)

    def call(self, batch: Batch) -> Call:
        return call_with(batch, self.inputs, self.name)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return error_of(self.error, *self._pair(output, batch))

    def tally(self, output: Any, batch: Batch) -> Tensor:
        found, wanted = self._pair(output, batch)
        squares = (found.double() - wanted.double()).square()
        return torch.stack((squares.sum(), squares.new_tensor(squares.numel())))

    def score(self, total: Tensor) -> float:
        return float((total[0] / total[1]).sqrt())

    def _pair(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        found, wanted = logits_of(output), column(batch, "targets", self.name)
        if found.dim() == wanted.dim() + 1 and found.shape[-1] == 1:
            found = found.squeeze(-1)
        if found.shape != wanted.shape:
            raise BadModelError(f"task.name=regression: the model returns {tuple(found.shape)}, and the targets are {tuple(wanted.shape)}")
        dtype = torch.promote_types(found.dtype, torch.float32)  # half precision is too coarse for the squares of small errors
        return found.to(dtype), wanted.to(dtype)
