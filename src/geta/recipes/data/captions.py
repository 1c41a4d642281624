"""Pictures with captions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Batch, Data, TensorSplit
from geta.recipes.data.digits import DigitsData
from geta.recipes.data.files import LocalPath, PictureSettings, Scaling, existing_file, existing_folder, padded, read_text
from geta.recipes.data.pictures_on_disk import as_tensor, fitted, open_picture
from geta.recipes.data.tokens import BYTES, Tokens, byte_rows
from geta.recipes.settings import Settings

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class CaptionsData(PictureSettings):
    """Pictures in the folder `path/images` and a file of captions, `path/file`.

    The file is CSV or TSV with a header that has `image` and `caption` (as Flickr8k's), or JSON lines with these keys. A row is a picture
    with one of its captions; the captions of one picture stay in one split. `test_file` names another file for testing; without it the
    share `split` of the pictures (None = 0.1) is for testing, spread evenly over their names.

    Batches: `images` [N, channels, size, size], `tokens` [N, length]: longer captions are cut, shorter
    ones filled up with the tokenizer's padding or 0.
    """

    source: Literal["captions"]
    path: LocalPath
    file: str = "captions.csv"
    test_file: str | None = None
    images: str = "images"
    split: float | None = Field(default=None, gt=0.0, lt=1.0)
    size: int = Field(default=224, ge=1)
    channels: Literal[1, 3] = 3
    tokenizer: str = BYTES
    length: int = Field(default=64, ge=2)

    def load(self) -> Data:
        """Read the captions and list the pictures. Raises ConfigError for what is missing, GetaError for a damaged file."""
        self.scaling.check(self.channels)
        folder = existing_folder(self.path / self.images, "the folder of pictures")
        tokens = Tokens(self.tokenizer)
        pairs = _captions(existing_file(self.path / self.file, "the file of captions"))
        if self.test_file is None:
            names = sorted({name for name, _ in pairs})
            share = 0.1 if self.split is None else self.split
            count = min(len(names) - 1, max(1, round(len(names) * share)))
            held_out = {names[(2 * number + 1) * len(names) // (2 * count)] for number in range(count)}
            train, test = [pair for pair in pairs if pair[0] not in held_out], [pair for pair in pairs if pair[0] in held_out]
            if not test:
                raise ConfigError(f"data: '{self.path / self.file}' names one picture only, and each split needs one")
        elif self.split is not None:
            raise ConfigError("data.split has no effect beside data.test_file; leave one of them out")
        else:
            train, test = pairs, _captions(existing_file(self.path / self.test_file, "the file of captions to test on"))
        facts = {"channels": self.channels, "image_size": self.size, "vocabulary": tokens.vocabulary, "context": self.length}
        return Data(self._split(folder, train, tokens), self._split(folder, test, tokens), facts)

    def _split(self, folder: Path, pairs: list[tuple[str, str]], tokens: Tokens) -> CaptionSplit:
        missing = [name for name, _ in pairs if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"data: {len(missing)} of the pictures with captions aren't in '{folder}': {', '.join(missing[:3])}")
        rows = padded([tokens.encode(caption).ids.tolist() for _, caption in pairs], self.length, tokens.padding)
        return CaptionSplit(tuple(folder / name for name, _ in pairs), rows, self.size, self.channels, self.scaling)


@dataclass(frozen=True)
class CaptionSplit:
    """Picture files and the tokens of a caption for each."""

    files: tuple[Path, ...]
    tokens: Tensor
    size: int
    channels: int
    scaling: Scaling

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, rows: Sequence[int]) -> Batch:
        images = [as_tensor(fitted(open_picture(self.files[row], self.channels), self.size, self.size)) for row in rows]
        return {"images": self.scaling(torch.stack(images)), "tokens": self.tokens[list(rows)]}


class DigitsCaptionsData(Settings):
    """The handwritten digits of scikit-learn, each with a caption such as "a bold three": its name, and whether it has more ink than half
    of the digits. 20 different captions, as bytes.

    Batches: `images` [N, 1, 8, 8] in [0, 1], `tokens` [N, 16].
    """

    source: Literal["digits-captions"]

    def load(self) -> Data:
        """Load the digits. Raises GetaError when scikit-learn is missing."""
        digits = DigitsData().load()
        everything = [split.batch(range(len(split))) for split in (digits.train, digits.test)]
        middle = torch.cat([batch["images"].sum(dim=(1, 2, 3)) for batch in everything]).median()
        train, test = (
            TensorSplit({"images": batch["images"], "tokens": padded(byte_rows(_digit_captions(batch, middle)), 16)})
            for batch in everything
        )
        return Data(train, test, {"channels": 1, "image_size": 8, "vocabulary": 256, "context": 16})


def _digit_captions(batch: Batch, middle: Tensor) -> list[str]:
    bold = batch["images"].sum(dim=(1, 2, 3)) > middle
    return [f"a {'bold' if more else 'thin'} {_WORDS[label]}" for more, label in zip(bold.tolist(), batch["labels"].tolist(), strict=True)]


def _captions(path: Path) -> list[tuple[str, str]]:
    text = read_text(path)
    rows: list[tuple[str, str]] = []
    if path.suffix == ".jsonl":
        records = [(number, _json(path, number, line)) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        reader = csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",", skipinitialspace=True)
        records = [(reader.line_num, record) for record in reader]
    for number, record in records:
        image, caption = record.get("image"), record.get("caption")
        if not isinstance(image, str) or not isinstance(caption, str) or not image or not caption:
            raise GetaError(
                f"data: line {number} of '{path}' has no 'image' and 'caption'; the first line of a CSV or TSV names its columns"
            )
        rows.append((image, caption))
    if not rows:
        raise GetaError(f"data: '{path}' has no captions")
    return rows


def _json(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise GetaError(f"data: line {number} of '{path}' is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise GetaError(f"data: line {number} of '{path}' is no JSON object with 'image' and 'caption'")
    return record
