"""Telling classes apart."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from geta.recipes.batches import Batch
from geta.recipes.settings import Settings
from geta.recipes.tasks.task import Call, Metric, logits_of


class Classification(Settings):
    """Cross-entropy; the metric is the percentage of test images that get the right class. Batches: `images`, `labels`."""

    name: Literal["classification"] = "classification"
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)

    @property
    def metric(self) -> Metric:
        return Metric("accuracy", "%")

    @property
    def evaluation_batch(self) -> int | None:
        return None

    def call(self, batch: Batch) -> Call:
        return (batch["images"],), {}

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(logits_of(output), batch["labels"], label_smoothing=self.label_smoothing)

    def tally(self, output: Any, batch: Batch) -> Tensor:
        right = (logits_of(output).argmax(dim=-1) == batch["labels"]).double()
        return torch.stack((right.sum(), right.new_tensor(len(right))))

    def score(self, total: Tensor) -> float:
        return float(100.0 * total[0] / total[1])
