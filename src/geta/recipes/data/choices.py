"""Questions with several answers to choose from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Batch, Data
from geta.recipes.data.files import LocalPath, existing_file, padded, read_text
from geta.recipes.data.tokens import BYTES, Tokens
from geta.recipes.settings import Settings


class ChoicesData(Settings):
    """JSON lines such as `{"question": "Ice is", "choices": ["hot", "cold"], "answer": 1}` in `path/train` and `path/test`.

    Every choice is joined to the question with a space. Batches, with C = the most choices of the batch and L its longest row: `tokens`
    [N, C, L], `answer_mask` [N, C, L] (1 where a token belongs to the choice), `answer_bytes` [N, C] (of the choice), `present` [N, C],
    `labels` [N] (the right choice).

    length:        the most tokens of a question with a choice; what exceeds it is cut from the question's beginning.
    train_choices: "right" leaves the wrong choices out of the split to train on, for an objective that doesn't need them.
    """

    source: Literal["choices"]
    path: LocalPath
    train: str = "train.jsonl"
    test: str = "test.jsonl"
    tokenizer: str = BYTES
    length: int = Field(default=256, ge=2)
    train_choices: Literal["all", "right"] = "all"

    def load(self) -> Data:
        """Read and encode both files. Raises ConfigError when one is missing, GetaError that names a malformed line."""
        tokens = Tokens(self.tokenizer)
        train = self._split(self.path / self.train, tokens, only_right=self.train_choices == "right")
        test = self._split(self.path / self.test, tokens, only_right=False)
        return Data(train, test, {"vocabulary": tokens.vocabulary, "context": self.length})

    def _split(self, path: Path, tokens: Tokens, *, only_right: bool) -> ChoiceSplit:
        rows = []
        for number, line in enumerate(read_text(existing_file(path, "questions as JSON lines")).splitlines(), 1):
            if line.strip():
                question, choices, answer = _record(path, number, line)
                if only_right:
                    choices, answer = [choices[answer]], 0
                rows.append((tuple(self._encoded(question, choice, tokens) for choice in choices), answer))
        if not rows:
            raise GetaError(f"data: '{path}' has no questions")
        return ChoiceSplit(tuple(rows), tokens.padding)

    def _encoded(self, question: str, choice: str, tokens: Tokens) -> _Choice:
        before = len(question.encode())
        found = tokens.encode(f"{question} {choice}")
        belongs = [int(end > before) for end in found.ends]
        if sum(belongs) >= self.length:
            raise ConfigError(f"data.length={self.length} is too short for the choice '{choice}' ({sum(belongs)} tokens) and its question")
        return _Choice(found.ids.tolist()[-self.length :], belongs[-self.length :], len(choice.encode()))


@dataclass(frozen=True)
class _Choice:
    ids: list[int]
    belongs: list[int]
    bytes: int


@dataclass(frozen=True)
class ChoiceSplit:
    """Per row its encoded choices and the number of the right one."""

    rows: tuple[tuple[tuple[_Choice, ...], int], ...]
    padding: int

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        chosen = [self.rows[row] for row in rows]
        most = max(len(choices) for choices, _ in chosen)
        nothing = _Choice([self.padding], [0], 1)
        flat = [choice for choices, _ in chosen for choice in (*choices, *[nothing] * (most - len(choices)))]
        return {
            "tokens": padded([choice.ids for choice in flat], fill=self.padding).unflatten(0, (len(chosen), most)),
            "answer_mask": padded([choice.belongs for choice in flat]).unflatten(0, (len(chosen), most)),
            "answer_bytes": torch.tensor([choice.bytes for choice in flat]).unflatten(0, (len(chosen), most)),
            "present": torch.tensor([[place < len(choices) for place in range(most)] for choices, _ in chosen]),
            "labels": torch.tensor([answer for _, answer in chosen]),
        }


def _record(path: Path, number: int, line: str) -> tuple[str, list[str], int]:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise GetaError(f"data: line {number} of '{path}' is no JSON: {error}") from error
    record = found if isinstance(found, dict) else {}
    question, choices, answer = record.get("question"), record.get("choices"), record.get("answer")
    texts = [item for item in choices if isinstance(item, str) and item] if isinstance(choices, list) else []
    if not isinstance(question, str) or not texts or texts != choices or type(answer) is not int or not 0 <= answer < len(texts):
        raise GetaError(
            f"data: line {number} of '{path}' must have 'question' (text), 'choices' (a list of texts) and 'answer' (the number of the "
            "right one, from 0)"
        )
    return question, texts, answer
