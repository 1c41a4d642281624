"""Telling classes apart."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from geta.recipes.batches import Batch
from geta.recipes.tasks.task import Call, Inputs, Metric, RowByRow, call_with, column, logits_of


class Classification(RowByRow):
    """Cross-entropy; the metric is the percentage of test rows that get the right class. Batches: `labels` [N], and the `inputs`.

    inputs: columns that enter the model: `[images]`, or `{argument of the model: column}`.
    A batch mixed by the augmentation `mixup` has `other_labels` and `mix` too: the loss is `mix * CE(labels) + (1 - mix) *
    CE(other_labels)`.
    """

    name: Literal["classification"] = "classification"
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    inputs: Inputs = ("images",)

    @property
    def metric(self) -> Metric:
        return Metric("accuracy", "%")

    def call(self, batch: Batch) -> Call:
        return call_with(batch, self.inputs, self.name)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        logits = logits_of(output)
        if "mix" not in batch:
            return F.cross_entropy(logits, column(batch, "labels", self.name), label_smoothing=self.label_smoothing)
        each = [
            F.cross_entropy(logits, batch[labels], label_smoothing=self.label_smoothing, reduction="none")
            for labels in ("labels", "other_labels")
        ]
        return (batch["mix"] * each[0] + (1.0 - batch["mix"]) * each[1]).mean()

    def tally(self, output: Any, batch: Batch) -> Tensor:
        right = (logits_of(output).argmax(dim=-1) == column(batch, "labels", self.name)).double()
        return torch.stack((right.sum(), right.new_tensor(len(right))))

    def score(self, total: Tensor) -> float:
        return float(100.0 * total[0] / total[1])
