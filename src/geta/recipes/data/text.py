"""Text in windows, for language models."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Batch, Data
from geta.recipes.data.files import LocalPath, read_text
from geta.recipes.data.tokens import BYTES, Integers, Tokens
from geta.recipes.settings import Settings


class _Windows(Settings):
    """context: tokens that a row predicts. tokenizer: "bytes", or a tokenizer of transformers.

    most_bytes, most_test_bytes: of text to train on and to test on; None = all.

    held_out: the share of the files that is for testing, spread evenly over them, None = 0.1; of a single file, its last part.
    """

    context: int = Field(default=256, ge=2)
    tokenizer: str = BYTES
    held_out: float | None = Field(default=None, gt=0.0, lt=1.0)
    most_bytes: int | None = Field(default=None, ge=1)
    most_test_bytes: int | None = Field(default=None, ge=1)

    def _windows(self, train: list[str], test: list[str]) -> Data:
        tokens = Tokens(self.tokenizer)
        facts = {"vocabulary": tokens.vocabulary, "context": self.context}
        return Data(self._split(train, tokens, "train"), self._split(test, tokens, "test"), facts)

    def _split(self, texts: list[str], tokens: Tokens, part: str) -> WindowSplit:
        ids: list[Integers] = []
        widths: list[Integers] = []
        left = self.most_bytes if part == "train" else self.most_test_bytes
        for text in texts:
            shown = text if left is None else text.encode()[:left].decode(errors="ignore")
            left = None if left is None else left - len(shown.encode()) - 1
            found = tokens.encode(shown + "\n")
            ids.append(found.ids)
            widths.append(np.diff(found.ends, prepend=0))
            if left is not None and left <= 0:
                break
        joined = torch.from_numpy(np.concatenate(ids)).int()
        if len(joined) <= self.context:
            raise GetaError(
                f"data: the {part} split has {len(joined)} tokens, and one row of data.context={self.context} needs {self.context + 1}; "
                "add text or make the context shorter"
            )
        return WindowSplit(joined, torch.from_numpy(np.concatenate(widths)).int(), self.context)

    def _divided(self, texts: list[str]) -> tuple[list[str], list[str]]:
        share = 0.1 if self.held_out is None else self.held_out
        if len(texts) == 1:
            cut = round(len(texts[0]) * (1.0 - share))
            return [texts[0][:cut]], [texts[0][cut:]]
        count = min(len(texts) - 1, max(1, round(len(texts) * share)))
        chosen = {(2 * number + 1) * len(texts) // (2 * count) for number in range(count)}
        train = [text for row, text in enumerate(texts) if row not in chosen]
        return train, [text for row, text in enumerate(texts) if row in chosen]


class TextData(_Windows):
    """A UTF-8 file, or all files `pattern` (None = "*.txt") in a folder and the folders in it; `test_path` replaces what would be held out.

    Rows are `tokens` [N, context + 1], one after the other, each beginning with the token that the row before ended with, so that every
    token but the first is predicted once; `bytes` [N] is how many bytes the predicted tokens stand for. A rest at the end is left out.
    """

    source: Literal["text"]
    path: LocalPath
    pattern: str | None = None
    test_path: LocalPath | None = None

    def load(self) -> Data:
        """Read and encode everything. Raises ConfigError for missing files, GetaError for text that is no UTF-8 or too short."""
        texts = self._texts(self.path)
        if self.test_path is None:
            return self._windows(*self._divided(texts))
        if self.held_out is not None:
            raise ConfigError("data.held_out has no effect beside data.test_path; leave one of them out")
        return self._windows(texts, self._texts(self.test_path))

    def _texts(self, path: Path) -> list[str]:
        if path.is_file():
            if self.pattern is not None:
                raise ConfigError(f"data.pattern has no effect: '{path}' is a file; leave it out")
            return [read_text(path)]
        pattern = self.pattern or "*.txt"
        files = sorted(file for file in path.rglob(pattern) if file.is_file()) if path.is_dir() else []
        if not files:
            what = f"no file '{pattern}' in the folder '{path}'" if path.is_dir() else f"nothing at '{path}'"
            raise ConfigError(f"data: there is {what}; set data.path to a text file or a folder of them, and data.pattern")
        return [read_text(file) for file in files]


class StdlibData(_Windows):
    """The modules and documentation of Python's standard library, which every Python brings along; rows as with `source: text`."""

    source: Literal["stdlib"]

    def load(self) -> Data:
        """Read and encode the modules. Raises GetaError when this Python has no sources."""
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = [*sorted(folder.glob("*.py")), *sorted((folder / "pydoc_data").glob("*.py"))]
        if len(files) < 2:
            raise GetaError(f"data: the standard library in '{folder}' has no .py files; use `source: text` with text of your own")
        return self._windows(*self._divided([read_text(file) for file in files]))


@dataclass(frozen=True)
class WindowSplit:
    """Tokens int32 [T] and the bytes int32 [T] that each stands for, in windows of `context` that share their edge tokens."""

    tokens: Tensor
    widths: Tensor
    context: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def batch(self, rows: Sequence[int]) -> Batch:
        if any(not -len(self) <= row < len(self) for row in rows):
            raise IndexError(f"rows {list(rows)} of {len(self)}")
        places = torch.tensor([[row % len(self)] for row in rows]) * self.context + torch.arange(self.context + 1)
        return {"tokens": self.tokens[places].long(), "bytes": self.widths[places[:, 1:]].sum(dim=1)}
