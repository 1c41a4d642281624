"""Pairs of pictures in low and high resolution, cut into patches of one size."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Batch, Data
from geta.recipes.data.files import LocalPath, Scaling, existing_folder
from geta.recipes.data.pictures_on_disk import as_tensor, open_picture, picture_files, pillow, smaller
from geta.recipes.settings import Settings

Pair = tuple[Path, Path | None]
"""A picture in high resolution, and its file in low resolution; None: made from it."""
Place = tuple[int, int, int]
"""Number of the picture, top and left of the patch in pixels of low resolution."""

_TRAIN = (
    *("astronaut.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg"),
    *("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "moon.png"),
)
_TEST = ("chelsea.png", "coffee.png", "rocket.jpg")


class _Patches(Settings):
    """scale: how many times larger the wanted picture is. crop: pixels of a square patch in high resolution, a multiple of scale.

    per_picture:  patches of each picture to train on, at places drawn once and for all.
    whole:        test on whole pictures, one per row, instead of tiles of `crop` pixels that don't overlap.
    keep_decoded: how many pictures stay decoded in memory.
    """

    scale: int = Field(default=2, ge=2, le=8)
    crop: int = Field(default=96, ge=8)
    per_picture: int = Field(default=64, ge=1)
    whole: bool = False
    keep_decoded: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _crop_is_a_multiple(self) -> Self:
        if self.crop % self.scale:
            raise ValueError(f"crop ({self.crop}) must be a multiple of scale ({self.scale})")
        return self

    def _data(self, train: list[Pair], test: list[Pair]) -> Data:
        low = self.crop // self.scale
        train_places = _random_places([self._size(pair) for pair in train], low, self.per_picture)
        sizes = [self._size(pair) for pair in test]
        test_places = [(number, 0, 0) for number in range(len(test))] if self.whole else _tiles(sizes, low)
        facts = {"channels": 3, "scale": self.scale, "image_size": low}
        return Data(
            PatchSplit(tuple(train), tuple(train_places), self.scale, low, self.keep_decoded),
            PatchSplit(tuple(test), tuple(test_places), self.scale, None if self.whole else low, self.keep_decoded),
            facts,
        )

    def _size(self, pair: Pair) -> tuple[int, int]:
        """Height and width in low resolution, from the header of the file."""
        images = pillow()
        try:
            with images.open(pair[0]) as picture:
                width, height = picture.size
        except (OSError, SyntaxError, ValueError) as error:
            raise GetaError(f"data: '{pair[0]}' can't be decoded as a picture: {error}; replace or remove the file") from error
        if min(width, height) < self.crop:
            raise ConfigError(f"data: '{pair[0]}' has {width} x {height} pixels, smaller than data.crop={self.crop}; lower it")
        return height // self.scale, width // self.scale


class PicturesData(_Patches):
    """The pictures that lie inside scikit-image (nothing is downloaded): 12 to train on, 3 to test on (a cat, a cup, a rocket)."""

    source: Literal["pictures"]

    def load(self) -> Data:
        """Find the pictures. Raises GetaError when scikit-image is missing, or brings other files."""
        found = importlib.util.find_spec("skimage")
        if found is None or found.origin is None:
            raise GetaError("the pictures ship with scikit-image, which is not installed: pip install 'geta[pictures]'")
        folder = Path(found.origin).parent / "data"
        missing = [name for name in (*_TRAIN, *_TEST) if not (folder / name).is_file()]
        if missing:
            raise GetaError(f"scikit-image in '{folder.parent}' lacks {', '.join(missing)}; install version 0.25 or newer")
        return self._data([(folder / name, None) for name in _TRAIN], [(folder / name, None) for name in _TEST])


class ImagePairsData(_Patches):
    """Folders of pictures in high resolution, as in DIV2K: `path/train` and `path/test`.

    Low resolution is made by bicubic interpolation, or read from `train_low` and `test_low`, where a picture has the same name, with or
    without `x2` (the scale) at its end.
    """

    source: Literal["image-pairs"]
    path: LocalPath
    train: str = "DIV2K_train_HR"
    test: str = "DIV2K_valid_HR"
    train_low: str | None = None
    test_low: str | None = None

    def load(self) -> Data:
        """List the files. Raises ConfigError for what is missing; a damaged picture is a GetaError when fetched."""
        return self._data(self._pairs(self.train, self.train_low), self._pairs(self.test, self.test_low))

    def _pairs(self, high: str, low: str | None) -> list[Pair]:
        files = picture_files(existing_folder(self.path / high, "a folder of pictures in high resolution"))
        if low is None:
            return [(file, None) for file in files]
        folder = existing_folder(self.path / low, "a folder of the same pictures in low resolution")
        by_stem = {file.stem: file for file in picture_files(folder)}
        found = [(file, by_stem.get(f"{file.stem}x{self.scale}", by_stem.get(file.stem))) for file in files]
        missing = [file.name for file, other in found if other is None]
        if missing:
            raise ConfigError(
                f"data: '{folder}' lacks {', '.join(missing[:5])} (as the same name, or ending in x{self.scale}) in low resolution"
            )
        return list(found)


@dataclass(frozen=True)
class PatchSplit:
    """Patches of pictures: `images` [N, 3, h, w] and `targets` [N, 3, scale * h, scale * w], both in [0, 1]. size None: whole pictures."""

    pairs: tuple[Pair, ...]
    places: tuple[Place, ...]
    scale: int
    size: int | None
    keep_decoded: int
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, rows: Sequence[int]) -> Batch:
        low, high = zip(*(self._patch(*self.places[row]) for row in rows), strict=True)
        if len({patch.shape for patch in low}) > 1:
            raise ConfigError("whole pictures of different sizes can't be joined to one batch: set train.evaluation_batch=1")
        return {"images": Scaling()(torch.stack(low)), "targets": Scaling()(torch.stack(high))}

    def _patch(self, number: int, top: int, left: int) -> tuple[Tensor, Tensor]:
        low, high = self._decoded(number)
        if self.size is None:
            return low, high
        bottom, right, scale = top + self.size, left + self.size, self.scale
        return low[:, top:bottom, left:right], high[:, scale * top : scale * bottom, scale * left : scale * right]

    def _decoded(self, number: int) -> tuple[Tensor, Tensor]:
        if number not in self._kept:
            if len(self._kept) >= self.keep_decoded:
                self._kept.pop(next(iter(self._kept)))
            self._kept[number] = self._read(*self.pairs[number])
        return self._kept[number]

    def _read(self, high_file: Path, low_file: Path | None) -> tuple[Tensor, Tensor]:
        high = open_picture(high_file)
        width, height = (size // self.scale * self.scale for size in high.size)
        high = high.crop((0, 0, width, height))
        low = smaller(high, self.scale) if low_file is None else open_picture(low_file)
        if (low.size[0] * self.scale, low.size[1] * self.scale) != high.size:
            raise GetaError(
                f"data: '{low_file}' has {low.size} pixels; at data.scale={self.scale} '{high_file}' ({high.size}) needs another"
            )
        return as_tensor(low), as_tensor(high)


def _random_places(sizes: Sequence[tuple[int, int]], size: int, count: int) -> list[Place]:
    draw: Any = np.random.default_rng(0)
    return [
        (number, int(draw.integers(height - size + 1)), int(draw.integers(width - size + 1)))
        for number, (height, width) in enumerate(sizes)
        for _ in range(count)
    ]


def _tiles(sizes: Sequence[tuple[int, int]], size: int) -> list[Place]:
    return [
        (number, top, left)
        for number, (height, width) in enumerate(sizes)
        for top in range(0, height - size + 1, size)
        for left in range(0, width - size + 1, size)
    ]
