"""Pictures and texts that belong together."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from geta.errors import BadModelError
from geta.recipes.batches import Batch
from geta.recipes.settings import Settings
from geta.recipes.tasks.task import Call, Inputs, Metric, call_with, column, part_of


class ImageText(Settings):
    """The contrastive loss of CLIP (arXiv 2103.00020); the metric is retrieval accuracy among `evaluation_batch` rows.

    Batches: `images`, `tokens` [N, T]. A model returns a pair of features [N, D], whose products are the logits (so the temperature is in
    one of them), or the logits themselves as `logits_per_image` [N, N].

    `loss = (CE(logits, own) + CE(logits', own)) / 2`, where `own` are the rows with the same text, equally likely.
    Deviation: CLIP takes only the row itself for right; where captions repeat, that punishes right answers.

    The metric is the percentage of right answers to both questions: which text has this picture (right: the same text as its own), and
    which picture has this text (right: a picture with this text). It depends on how many rows compete, hence the fixed `evaluation_batch`.
    """

    name: Literal["image-text"]
    inputs: Inputs = ("images", "tokens")
    evaluation_batch: int | None = Field(default=64, ge=2)

    @property
    def metric(self) -> Metric:
        return Metric(f"retrieval accuracy among {self.evaluation_batch}", "%")

    def call(self, batch: Batch) -> Call:
        return call_with(batch, self.inputs, self.name)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        logits, same = self._logits(output, batch)
        own = same.to(logits.dtype) / same.sum(dim=1, keepdim=True)
        texts, images = -(own * logits.log_softmax(dim=1)).sum(dim=1), -(own * logits.T.log_softmax(dim=1)).sum(dim=1)
        return (texts.mean() + images.mean()) / 2.0

    def tally(self, output: Any, batch: Batch) -> Tensor:
        logits, same = self._logits(output, batch)
        rows = torch.arange(len(same), device=same.device)
        right = torch.cat([same[rows, side.argmax(dim=1)] for side in (logits, logits.T)]).double()
        return torch.stack((right.sum(), right.new_tensor(len(right))))

    def score(self, total: Tensor) -> float:
        return float(100.0 * total[0] / total[1])

    def _logits(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens = column(batch, "tokens", self.name)
        logits = part_of(output, "logits_per_image")
        if logits is None:
            pair = tuple(output) if isinstance(output, tuple | list) else ()
            if len(pair) != 2 or not all(isinstance(side, Tensor) and side.dim() == 2 for side in pair):
                raise BadModelError(
                    f"task.name=image-text: the model returns {type(output).__name__}; it must return (features of pictures, features of "
                    "texts) [N, D], or `logits_per_image`"
                )
            logits = pair[0] @ pair[1].T
        return logits, (tokens[:, None] == tokens[None]).all(dim=2)
