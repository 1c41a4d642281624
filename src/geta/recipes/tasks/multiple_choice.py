"""Choosing one of several continuations."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from geta.recipes.batches import Batch
from geta.recipes.tasks.task import Call, Metric, RowByRow, column, logits_of


class MultipleChoice(RowByRow):
    """A language model chooses the continuation that it finds likeliest; the metric is the percentage of right choices.

    Batches as from `source: choices`. `score_c = sum of ln p(token) over the tokens of choice c`, divided by the bytes of the choice with
    `normalise: bytes` (what evaluation suites call acc_norm), undivided with `normalise: none` (acc).

    objective: "answers" minimises -ln p per token of the right choice; "choices" the cross-entropy of the scores.
    argument:  the name under which the model takes the tokens; None = its first argument. Models must be causal: rows are filled up on the
               right, without a mask.
    """

    name: Literal["multiple-choice"]
    objective: Literal["answers", "choices"] = "answers"
    normalise: Literal["none", "bytes"] = "none"
    argument: str | None = None

    @property
    def metric(self) -> Metric:
        return Metric("accuracy", "%")

    def call(self, batch: Batch) -> Call:
        tokens = column(batch, "tokens", self.name).flatten(0, 1)
        return ((tokens,), {}) if self.argument is None else ((), {self.argument: tokens})

    def loss(self, output: Any, batch: Batch) -> Tensor:
        likely, counted = self._log_likelihoods(output, batch)
        labels = batch["labels"]
        if self.objective == "choices":
            return torch.nn.functional.cross_entropy(self._scores(likely, batch), labels)
        rows = torch.arange(len(labels), device=labels.device)
        return -likely[rows, labels].sum() / counted[rows, labels].sum()

    def tally(self, output: Any, batch: Batch) -> Tensor:
        likely, _ = self._log_likelihoods(output, batch)
        right = (self._scores(likely, batch).argmax(dim=1) == batch["labels"]).double()
        return torch.stack((right.sum(), right.new_tensor(len(right))))

    def score(self, total: Tensor) -> float:
        return float(100.0 * total[0] / total[1])

    def _log_likelihoods(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """[N, C] each: ln p of the choice, and how many tokens it has."""
        tokens, mask = column(batch, "tokens", self.name), column(batch, "answer_mask", self.name)[..., 1:]
        logits = logits_of(output).unflatten(0, tokens.shape[:2])[..., :-1, :]
        each = logits.float().log_softmax(dim=-1).gather(-1, tokens[..., 1:, None]).squeeze(-1)
        return (each * mask).sum(dim=-1), mask.sum(dim=-1)

    def _scores(self, likely: Tensor, batch: Batch) -> Tensor:
        scores = likely / batch["answer_bytes"] if self.normalise == "bytes" else likely
        return scores.masked_fill(~batch["present"], -torch.inf)
