"""Questions whose answers are spans of a text: SQuAD 1.1."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Batch, Data
from geta.recipes.data.files import LocalPath, existing_file, padded, read_text
from geta.recipes.data.tokens import byte_positions, byte_rows, load_tokenizer
from geta.recipes.settings import Settings


class SquadData(Settings):
    """The JSON of SQuAD 1.1 in `path/train` and `path/test`, cut into windows of `length` tokens that overlap by `stride`.

    Batches to train on: `tokens`, `mask`, `types` [N, length], `starts`, `ends` [N] (0, the first token, where the answer lies outside of
    the window). A row to test on is a question with all W windows of its text: `tokens`, `mask`, `types` [N, W, length], `spans`
    [N, W, length, 2] (bytes of the text that a token stands for; -1 outside of the text), `text` and `answers` [N, bytes], [N, A, bytes]
    (bytes, filled up with 0).

    tokenizer: a folder, a `tokenizer.json`, a `vocab.txt`, or a name on the hub.
    limit:     use so many questions of each file; None = all.
    """

    source: Literal["squad"]
    path: LocalPath
    tokenizer: str
    train: str = "train-v1.1.json"
    test: str = "dev-v1.1.json"
    length: int = Field(default=384, ge=16)
    stride: int = Field(default=128, ge=0)
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _stride_leaves_room(self) -> Self:
        if self.stride >= self.length // 2:
            raise ValueError(f"stride ({self.stride}) must be less than half of length ({self.length})")
        return self

    def load(self) -> Data:
        """Read and encode both files. Raises ConfigError for a missing file or another version, GetaError for a malformed one."""
        tokenizer = load_tokenizer(self.tokenizer)
        questions = [
            _questions(existing_file(self.path / name, "a JSON file of SQuAD 1.1"), self.limit) for name in (self.train, self.test)
        ]
        padding = tokenizer.pad_token_id or 0
        train = tuple(window for question in questions[0] for window in self._windows(tokenizer, question))
        test = tuple(_Asked(question, self._windows(tokenizer, question)) for question in questions[1])
        facts = {"vocabulary": len(tokenizer), "context": self.length}
        return Data(WindowsToTrainOn(train, self.length, padding), QuestionsToTestOn(test, self.length, padding), facts)

    def _windows(self, tokenizer: Any, question: _Question) -> tuple[_Window, ...]:
        try:
            found = tokenizer(
                question.question,
                question.text,
                max_length=self.length,
                stride=self.stride,
                truncation="only_second",
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
        except Exception as error:  # the tokenizer raises bare Exceptions
            raise ConfigError(f"data.length={self.length} with data.stride={self.stride} is too short for '{question.question}'") from error
        before = byte_positions(question.text)
        windows = []
        for number, ids in enumerate(found["input_ids"]):
            inside = [sequence == 1 for sequence in found.sequence_ids(number)]
            spans = [(int(before[start]), int(before[end])) for start, end in found["offset_mapping"][number]]
            spans = [span if belongs else (-1, -1) for span, belongs in zip(spans, inside, strict=True)]
            types = found["token_type_ids"][number] if "token_type_ids" in found else [int(belongs) for belongs in inside]
            windows.append(_Window(ids, types, spans, *_place(spans, int(before[question.start]), question.answers[0])))
        return tuple(windows)


@dataclass(frozen=True)
class _Question:
    """start: the first answer's first character."""

    question: str
    text: str
    answers: tuple[str, ...]
    start: int


@dataclass(frozen=True)
class _Window:
    ids: list[int]
    types: list[int]
    spans: list[tuple[int, int]]
    start: int
    end: int


@dataclass(frozen=True)
class _Asked:
    question: _Question
    windows: tuple[_Window, ...]


@dataclass(frozen=True)
class WindowsToTrainOn:
    """One row per window."""

    windows: tuple[_Window, ...]
    length: int
    padding: int

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, rows: Sequence[int]) -> Batch:
        chosen = [self.windows[row] for row in rows]
        starts, ends = torch.tensor([[window.start, window.end] for window in chosen]).T
        return {**_inputs(chosen, self.length, self.padding), "starts": starts, "ends": ends}


@dataclass(frozen=True)
class QuestionsToTestOn:
    """One row per question, with all windows of its text; questions with fewer windows than the batch's most get empty ones."""

    rows: tuple[_Asked, ...]
    length: int
    padding: int

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        chosen = [self.rows[row] for row in rows]
        most = max(len(row.windows) for row in chosen)
        empty = _Window([self.padding], [0], [(-1, -1)], 0, 0)
        flat = [window for row in chosen for window in (*row.windows, *[empty] * (most - len(row.windows)))]
        spans = torch.full((len(flat), self.length, 2), -1)
        for number, window in enumerate(flat):
            spans[number, : len(window.spans)] = torch.tensor(window.spans)
        answers = [row.question.answers for row in chosen]
        count = max(len(texts) for texts in answers)
        flat_answers = [text for texts in answers for text in (*texts, *[texts[0]] * (count - len(texts)))]
        shape = (len(chosen), most)
        return {
            **{name: tensor.unflatten(0, shape) for name, tensor in _inputs(flat, self.length, self.padding).items()},
            "spans": spans.unflatten(0, shape),
            "text": padded(byte_rows([row.question.text for row in chosen])).to(torch.uint8),
            "answers": padded(byte_rows(flat_answers)).to(torch.uint8).unflatten(0, (len(chosen), count)),
        }


def _inputs(windows: Sequence[_Window], length: int, padding: int) -> Batch:
    return {
        "tokens": padded([window.ids for window in windows], length, padding),
        "mask": padded([[1] * len(window.ids) for window in windows], length),
        "types": padded([window.types for window in windows], length),
    }


def _place(spans: list[tuple[int, int]], first: int, answer: str) -> tuple[int, int]:
    """Tokens where the answer begins and ends, or (0, 0) when the window doesn't hold all of it."""
    last = first + len(answer.encode())
    start = [row for row, (begin, end) in enumerate(spans) if begin <= first < end]
    stop = [row for row, (begin, end) in enumerate(spans) if begin < last <= end]
    return (start[0], stop[-1]) if start and stop else (0, 0)


def _questions(path: Path, limit: int | None) -> list[_Question]:
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise GetaError(f"data: '{path}' is no JSON: {error}; download it again") from error
    rows: list[_Question] = []
    try:
        for question in _walk(found, path):
            if limit is not None and len(rows) == limit:
                break
            rows.append(question)
    except (KeyError, TypeError, IndexError) as error:
        raise GetaError(
            f"data: '{path}' isn't built like SQuAD 1.1 (data, paragraphs, context, qas, question, answers, text, answer_start): "
            f"{type(error).__name__} {error} at question {len(rows) + 1}"
        ) from error
    if not rows:
        raise GetaError(f"data: '{path}' has no questions")
    return rows


def _walk(found: Any, path: Path) -> Iterator[_Question]:
    for article in found["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = asked["answers"]
                if asked.get("is_impossible") or not answers:
                    raise ConfigError(f"data: '{path}': '{asked['question']}' has no answer, as in SQuAD 2.0; only version 1.1 is known")
                texts = tuple(dict.fromkeys(str(answer["text"]) for answer in answers))
                yield _Question(asked["question"], paragraph["context"], texts, int(answers[0]["answer_start"]))
