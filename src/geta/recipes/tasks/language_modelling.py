"""Predicting the next token."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from geta.recipes.batches import Batch
from geta.recipes.tasks.task import Call, Metric, RowByRow, column, logits_of


class LanguageModelling(RowByRow):
    """Cross-entropy of every next token; the metric is the perplexity. Batches: `tokens` [N, L + 1], and `bytes` [N] for `unit: byte`.

    The model gets `tokens[:, :-1]` and is asked for `tokens[:, 1:]`. `perplexity = exp(sum of -ln p(token) / number of units)`; units are
    tokens, or the bytes that they stand for, which makes tokenizers comparable.

    argument: the name under which the model takes the tokens; None = its first argument.
    """

    name: Literal["language-modelling"]
    unit: Literal["token", "byte"] = "token"
    argument: str | None = None
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)

    @property
    def metric(self) -> Metric:
        return Metric(f"perplexity per {self.unit}", "", higher_is_better=False)

    def call(self, batch: Batch) -> Call:
        tokens = column(batch, "tokens", self.name)[:, :-1]
        return ((tokens,), {}) if self.argument is None else ((), {self.argument: tokens})

    def loss(self, output: Any, batch: Batch) -> Tensor:
        wanted = column(batch, "tokens", self.name)[:, 1:]
        return F.cross_entropy(logits_of(output).flatten(0, 1), wanted.flatten(), label_smoothing=self.label_smoothing)

    def tally(self, output: Any, batch: Batch) -> Tensor:
        wanted = column(batch, "tokens", self.name)[:, 1:]
        lost = F.cross_entropy(logits_of(output).float().flatten(0, 1), wanted.flatten(), reduction="none").double().sum()
        units = column(batch, "bytes", self.name).sum() if self.unit == "byte" else lost.new_tensor(wanted.numel())
        return torch.stack((lost, units.double()))

    def score(self, total: Tensor) -> float:
        return float((total[0] / total[1]).exp())
