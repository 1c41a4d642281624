"""A folder per class with pictures in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from geta.errors import ConfigError
from geta.recipes.batches import Batch, Data
from geta.recipes.data.files import LocalPath, PictureSettings, Scaling, existing_folder
from geta.recipes.data.pictures_on_disk import SUFFIXES, as_tensor, fitted, open_picture

_TEST_NAMES = ("test", "val", "validation")


class ImageFolderData(PictureSettings):
    """`path/train/CLASS/*.png` and `path/test/CLASS/*.png` (or `val`, `validation`), decoded when a batch needs them.

    Without a folder to test on, `path/train/CLASS/*` or `path/CLASS/*` is split: of every class the share `split` goes to the test split,
    spread evenly over its files in order of their names. Classes are numbered in order of their names.

    size:     pixels of the square that the network sees.
    resize:   the shorter side of test pictures before the middle `size` x `size` is cut out; None: size * 256 / 224. Pictures to train on
              keep as much as possible: their shorter side becomes `size`; augmentations do the rest.
    channels: 3 = color, 1 = grey.
    """

    source: Literal["image-folder"]
    path: LocalPath
    size: int = Field(default=224, ge=1)
    resize: int | None = Field(default=None, ge=1)
    channels: Literal[1, 3] = 3
    split: float | None = Field(default=None, gt=0.0, lt=1.0)

    @model_validator(mode="after")
    def _resize_covers_size(self) -> Self:
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize ({self.resize}) must be at least size ({self.size})")
        return self

    def load(self) -> Data:
        """List the files. Raises ConfigError for folders that aren't there or are empty; a damaged picture is a GetaError when fetched."""
        self.scaling.check(self.channels)
        folder = existing_folder(self.path, "a folder with train/ and test/ (or val/), or with one folder per class")
        test_folder = next((folder / name for name in _TEST_NAMES if (folder / name).is_dir()), None)
        if (folder / "train").is_dir() and test_folder is not None:
            if self.split is not None:
                raise ConfigError(f"data.split has no effect: '{folder}' has train/ and {test_folder.name}/; leave it out")
            train, test = _classes(folder / "train"), _classes(test_folder)
        elif self.split is None:
            raise ConfigError(
                f"data: '{folder}' has no train/ with test/ or val/ beside it; if its folders are the classes, say how much is for "
                "testing: data.split=0.2"
            )
        else:
            train, test = _divided(_classes(folder / "train" if (folder / "train").is_dir() else folder), self.split)
        unknown = sorted(set(test) - set(train))
        if unknown:
            raise ConfigError(f"data: the test pictures have classes that nothing is trained on: {', '.join(unknown[:5])}")
        names = sorted(train)
        resize = self.resize or round(self.size * 256 / 224)
        return Data(
            self._split(train, names, self.size),
            self._split(test, names, resize),
            {"classes": len(names), "channels": self.channels, "image_size": self.size, "class_names": names},
        )

    def _split(self, classes: dict[str, list[Path]], names: list[str], resize: int) -> PictureFiles:
        files = [(path, label) for label, name in enumerate(names) for path in classes.get(name, ())]
        return PictureFiles(tuple(files), self.size, resize, self.channels, self.scaling)


@dataclass(frozen=True)
class PictureFiles:
    """Picture files with a label each."""

    files: tuple[tuple[Path, int], ...]
    size: int
    resize: int
    channels: int
    scaling: Scaling

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, rows: Sequence[int]) -> Batch:
        chosen = [self.files[row] for row in rows]
        images = torch.stack([as_tensor(fitted(open_picture(path, self.channels), self.size, self.resize)) for path, _ in chosen])
        return {"images": self.scaling(images), "labels": torch.tensor([label for _, label in chosen])}


def _classes(folder: Path) -> dict[str, list[Path]]:
    found = {
        inner.name: sorted(path for path in inner.rglob("*") if path.suffix.lower() in SUFFIXES)
        for inner in sorted(folder.iterdir())
        if inner.is_dir()
    }
    empty = [name for name, files in found.items() if not files]
    if not found or empty:
        what = f"no picture in {', '.join(empty[:5])}" if found else "no folder per class"
        raise ConfigError(f"data: '{folder}' has {what}; pictures lie in one folder per class ({', '.join(sorted(SUFFIXES))})")
    return found


def _divided(classes: dict[str, list[Path]], share: float) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    train: dict[str, list[Path]] = {}
    test: dict[str, list[Path]] = {}
    for name, files in classes.items():
        count = min(len(files) - 1, max(1, round(len(files) * share)))
        if count < 1:
            raise ConfigError(f"data: the class '{name}' has one picture only, and data.split needs one for each split")
        chosen = {(2 * number + 1) * len(files) // (2 * count) for number in range(count)}
        test[name] = [path for row, path in enumerate(files) if row in chosen]
        train[name] = [path for row, path in enumerate(files) if row not in chosen]
    return train, test
