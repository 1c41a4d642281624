"""Answers that are spans of a text."""

from __future__ import annotations

import collections
import re
import string
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from geta.errors import BadModelError
from geta.recipes.batches import Batch
from geta.recipes.tasks.task import Call, Inputs, Metric, RowByRow, column, part_of

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class QuestionAnswering(RowByRow):
    """Cross-entropy of the first and the last token of the answer; the metric is SQuAD's F1 or exact match. Batches as from `source:
    squad`.

    The answer is the span (i, j) with the highest `start_i + end_j`, i <= j < i + longest, of all windows of the text. Answers are
    compared as by SQuAD 1.1 (arXiv 1606.05250, section 6.1): lower case, without punctuation, articles and extra spaces; `exact match`
    asks for equal texts; `F1 = 2 P R / (P + R)` with P and R the shares of the common words in the given and the wanted answer; the best
    of the wanted answers counts, and the mean over all questions is taken.

    A model returns `start_logits` and `end_logits` [N, L], or a tensor [N, L, 2].
    """

    name: Literal["question-answering"]
    measure: Literal["f1", "exact-match"] = "f1"
    longest: int = Field(default=30, ge=1)
    inputs: Inputs = Field(default={"input_ids": "tokens", "attention_mask": "mask", "token_type_ids": "types"})

    @property
    def metric(self) -> Metric:
        return Metric("F1" if self.measure == "f1" else "exact match", "%")

    def call(self, batch: Batch) -> Call:
        def flat(name: str) -> Tensor:
            found = column(batch, name, self.name)
            return found.flatten(0, 1) if found.dim() == 3 else found

        if isinstance(self.inputs, dict):
            return (), {argument: flat(name) for argument, name in self.inputs.items()}
        return tuple(flat(name) for name in self.inputs), {}

    def loss(self, output: Any, batch: Batch) -> Tensor:
        start, end = _span_logits(output)
        mask = column(batch, "mask", self.name).bool()
        wanted = column(batch, "starts", self.name), column(batch, "ends", self.name)
        losses = [F.cross_entropy(side.masked_fill(~mask, -torch.inf), place) for side, place in zip((start, end), wanted, strict=True)]
        return (losses[0] + losses[1]) / 2.0

    def tally(self, output: Any, batch: Batch) -> Tensor:
        spans = column(batch, "spans", self.name)
        start, end = (side.float().unflatten(0, spans.shape[:2]) for side in _span_logits(output))
        counts = [0.0, 0.0, float(len(spans))]
        for row in range(len(spans)):
            first, last = _best_span(start[row], end[row], spans[row], self.longest)
            given = bytes(batch["text"][row, first:last].tolist()).decode(errors="ignore")
            wanted = [bytes(text.tolist()).rstrip(b"\0").decode() for text in batch["answers"][row]]
            counts[0] += max(f1(given, text) for text in wanted)
            counts[1] += max(float(normalised(given) == normalised(text)) for text in wanted)
        return torch.tensor(counts, dtype=torch.float64, device=spans.device)

    def score(self, total: Tensor) -> float:
        return float(100.0 * total[0 if self.measure == "f1" else 1] / total[2])


def normalised(text: str) -> str:
    """Lower case, without punctuation, without the words a, an, the, and with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(given: str, wanted: str) -> float:
    """The harmonic mean of precision and recall of words, in [0, 1]; each word counts as often as it occurs."""
    given_words, wanted_words = normalised(given).split(), normalised(wanted).split()
    if not given_words or not wanted_words:
        return float(given_words == wanted_words)
    common = sum((collections.Counter(given_words) & collections.Counter(wanted_words)).values())
    return 2.0 * common / (len(given_words) + len(wanted_words))


def _best_span(start: Tensor, end: Tensor, spans: Tensor, longest: int) -> tuple[int, int]:
    """First and last byte of the best answer; start and end [W, L], spans [W, L, 2]."""
    length = start.shape[-1]
    inside = spans[..., 0] >= 0
    order = torch.arange(length, device=start.device)
    near = (order[None] >= order[:, None]) & (order[None] < order[:, None] + longest)
    allowed = inside[:, :, None] & inside[:, None, :] & near
    scores = (start[:, :, None] + end[:, None, :]).masked_fill(~allowed, -torch.inf)
    window, place = divmod(int(scores.flatten().argmax()), length * length)
    first, last = divmod(place, length)
    return int(spans[window, first, 0]), int(spans[window, last, 1])


def _span_logits(output: Any) -> tuple[Tensor, Tensor]:
    start, end = part_of(output, "start_logits"), part_of(output, "end_logits")
    if start is not None and end is not None:
        return start, end
    if isinstance(output, Tensor) and output.dim() == 3 and output.shape[-1] == 2:
        first, last = output.unbind(dim=-1)
        return first, last
    raise BadModelError(
        f"task.name=question-answering: the model returns {type(output).__name__}; it must return `start_logits` and `end_logits` [N, L], "
        "or a tensor [N, L, 2]"
    )
