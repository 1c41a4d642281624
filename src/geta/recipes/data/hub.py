"""Data sets in the formats of Hugging Face `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Batch, Data
from geta.recipes.data.files import PictureSettings, Scaling, padded
from geta.recipes.data.pictures_on_disk import as_labels, as_tensor, fitted
from geta.recipes.data.tokens import BYTES, Tokens

_FILES = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
_SIZE, _LENGTH = 224, 128


class HubData(PictureSettings):
    """A data set that `datasets` reads: a folder of `save_to_disk`, a folder with files, or a name on the hub.

    columns:   `column of a batch: column of the data set`; columns of pictures are decoded, resized and cut to `size` when fetched,
               a column `labels` of pictures becomes maps of classes [N, size, size], texts become ids [N, length], cut or filled up (and
               `COLUMN_mask`, 1 where there is a token), numbers stay.
    subset:    the configuration's name, for data sets that have several.
    train, test: names of the splits; for a folder with files, files in it (parquet, csv, json, jsonl, arrow).
    size, channels:    of pictures; None = 224 and 3.
    tokenizer, length: of texts; None = "bytes" and 128.
    """

    source: Literal["hf"]
    path: str
    subset: str | None = None
    train: str = "train"
    test: str = "test"
    columns: dict[str, str] = Field(default={"images": "image", "labels": "label"}, min_length=1)
    size: int | None = Field(default=None, ge=1)
    channels: Literal[1, 3] | None = None
    tokenizer: str | None = None
    length: int | None = Field(default=None, ge=1)

    def load(self) -> Data:
        """Open the data set. Raises GetaError without `datasets`, ConfigError for what it can't find."""
        self.scaling.check(self.channels or 3)
        train, test = self._opened(self.train), self._opened(self.test)
        facts: dict[str, Any] = {}
        splits = [self._split(rows, name, facts) for rows, name in ((train, self.train), (test, self.test))]
        return Data(splits[0], splits[1], facts)

    def _opened(self, split: str) -> Any:
        try:
            import datasets
        except ImportError:
            raise GetaError("`source: hf` reads with datasets, which is not installed: pip install datasets") from None
        folder = Path(self.path).expanduser()
        try:
            if (folder / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(folder))[split]
            if (folder / split).is_file():
                kind = _FILES.get(Path(split).suffix)
                if kind is None:
                    raise ConfigError(f"data: '{split}' ends in none of {', '.join(_FILES)}")
                return datasets.load_dataset(kind, data_files=str(folder / split), split="train")
            return datasets.load_dataset(str(folder) if folder.exists() else self.path, self.subset, split=split)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"data: the split '{split}' of '{self.path}' can't be opened: {type(error).__name__}: {error}; data.path is a folder of "
                "save_to_disk, a folder with data files (then data.train and data.test name files in it), or a name on the hub"
            ) from error

    def _split(self, rows: Any, name: str, facts: dict[str, Any]) -> HubSplit:
        missing = [column for column in self.columns.values() if column not in rows.column_names]
        if missing:
            raise ConfigError(
                f"data.columns: the split '{name}' of '{self.path}' has no column {', '.join(missing)}; it has "
                f"{', '.join(rows.column_names)}"
            )
        if not len(rows):
            raise GetaError(f"data: the split '{name}' of '{self.path}' is empty")
        first = rows[0]
        texts = {column for column, source in self.columns.items() if isinstance(first[source], str)}
        pictures = any(hasattr(first[source], "resize") for source in self.columns.values())
        for kind, there, keys in (("pictures", pictures, ("size", "channels", "mean")), ("texts", bool(texts), ("tokenizer", "length"))):
            idle = [key for key in keys if getattr(self, key) is not None and not there]
            if idle:
                raise ConfigError(f"data.{idle[0]} has no effect: none of data.columns holds {kind}; leave it out")
        tokens = Tokens(self.tokenizer or BYTES) if texts else None
        if tokens is not None:
            facts |= {"vocabulary": tokens.vocabulary, "context": self.length or _LENGTH}
        if pictures:
            facts |= {"channels": self.channels or 3, "image_size": self.size or _SIZE}
        labels = self.columns.get("labels")
        if labels is not None and isinstance(first[labels], int):
            facts["classes"] = max(facts.get("classes", 0), max(rows[labels]) + 1)
        return HubSplit(rows, self.columns, self, tokens)


@dataclass(frozen=True)
class HubSplit:
    """Rows of a data set, converted when fetched."""

    rows: Any
    columns: dict[str, str]
    settings: HubData
    tokens: Tokens | None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        found = self.rows[[int(row) for row in rows]]
        batch: Batch = {}
        for column, source in self.columns.items():
            values = found[source]
            if isinstance(values[0], str) and self.tokens is not None:
                ids = [self.tokens.encode(text).ids.tolist() for text in values]
                length = self.settings.length or _LENGTH
                batch[column] = padded(ids, length, self.tokens.padding)
                batch[f"{column}_mask"] = padded([[1] * len(row) for row in ids], length)
            elif hasattr(values[0], "resize"):
                batch[column] = self._label_maps(values) if column == "labels" else self._pictures(values)
            else:
                batch[column] = self._numbers(column, values)
        return batch

    def _pictures(self, pictures: Sequence[Any]) -> Tensor:
        size, mode = self.settings.size or _SIZE, "L" if self.settings.channels == 1 else "RGB"
        stacked = torch.stack([as_tensor(fitted(picture.convert(mode), size, size)) for picture in pictures])
        scaling: Scaling = self.settings.scaling
        return scaling(stacked)

    def _label_maps(self, pictures: Sequence[Any]) -> Tensor:
        size, what = self.settings.size or _SIZE, f"the column '{self.columns['labels']}'"
        return torch.stack([as_labels(fitted(picture, size, size, labels=True), what) for picture in pictures])

    def _numbers(self, column: str, values: Sequence[Any]) -> Tensor:
        try:
            tensor = torch.tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise GetaError(f"data.columns: '{self.columns[column]}' holds neither pictures nor texts nor numbers: {error}") from error
        return tensor.float() if tensor.is_floating_point() else tensor.long()
