"""A class for every pixel."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from geta.recipes.batches import Batch
from geta.recipes.tasks.task import Call, Inputs, Metric, RowByRow, call_with, column, logits_of


class Segmentation(RowByRow):
    """Cross-entropy per pixel; the metric is the mean intersection over union. Batches: `labels` [N, H, W], and the `inputs`.

    `IoU_c = true_c / (predicted_c + wanted_c - true_c)` over all pixels of the test split, averaged over the classes that occur (predicted
    or wanted). Pixels with the label `ignore` count nowhere. Logits [N, classes, h, w] of another size are enlarged (bilinear) to [H, W].
    """

    name: Literal["segmentation"]
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    ignore: int = 255
    inputs: Inputs = ("images",)

    @property
    def metric(self) -> Metric:
        return Metric("mean IoU", "%")

    def call(self, batch: Batch) -> Call:
        return call_with(batch, self.inputs, self.name)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        labels = column(batch, "labels", self.name)
        return F.cross_entropy(self._logits(output, labels), labels, ignore_index=self.ignore, label_smoothing=self.label_smoothing)

    def tally(self, output: Any, batch: Batch) -> Tensor:
        """The confusion matrix [wanted, predicted]."""
        labels = column(batch, "labels", self.name)
        logits = self._logits(output, labels)
        classes = logits.shape[1]
        counted = labels != self.ignore
        places = labels[counted] * classes + logits.argmax(dim=1)[counted]
        return torch.bincount(places, minlength=classes * classes).view(classes, classes).double()

    def score(self, total: Tensor) -> float:
        true = total.diagonal()
        either = total.sum(dim=0) + total.sum(dim=1) - true
        return float(100.0 * (true[either > 0] / either[either > 0]).mean())

    @staticmethod
    def _logits(output: Any, labels: Tensor) -> Tensor:
        logits = logits_of(output)
        if logits.shape[-2:] == labels.shape[-2:]:
            return logits
        return F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
