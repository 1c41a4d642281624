"""What the sources on disk share: paths that are checked before anything is read, and arrays that become batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import AfterValidator, model_validator
from torch import Tensor

from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Batch
from geta.recipes.settings import Settings

LocalPath = Annotated[Path, AfterValidator(Path.expanduser)]
"""A path on this machine; `~` is the home folder."""


def existing_file(path: Path, expected: str) -> Path:
    """Return `path`. Raises ConfigError that says what was expected there when no file is."""
    if path.is_file():
        return path
    found = "a folder" if path.is_dir() else "nothing"
    raise ConfigError(f"data: there is {found} at '{path}', where {expected} was expected; set data.path to where the data lies")


def existing_folder(path: Path, expected: str) -> Path:
    """Return `path`. Raises ConfigError that says what was expected there when no folder is."""
    if path.is_dir():
        return path
    found = "a file" if path.is_file() else "nothing"
    raise ConfigError(f"data: there is {found} at '{path}', where {expected} was expected; set data.path to where the data lies")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises GetaError that names the file when it can't be read as such."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise GetaError(f"data: '{path}' is no UTF-8 text (byte {error.start}: {error.reason}); convert it") from error
    except OSError as error:
        raise GetaError(f"data: '{path}' can't be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class Scaling:
    """uint8 [N, C, ...] to float32: `x / 255`, then `(x - mean) / std` per channel when they are given."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        scaled = images.float() / 255.0
        if self.mean is None or self.std is None:
            return scaled
        shape = (1, -1) + (1,) * (scaled.dim() - 2)
        return (scaled - scaled.new_tensor(self.mean).view(shape)) / scaled.new_tensor(self.std).view(shape)

    def check(self, channels: int) -> None:
        """Raise ConfigError when there is not one mean per channel."""
        if self.mean is not None and len(self.mean) != channels:
            raise ConfigError(f"data.mean has {len(self.mean)} numbers, and the pictures have {channels} channels; give one per channel")


class PictureSettings(Settings):
    """Sources of pictures: `mean` and `std` per channel, of pictures in [0, 1]; without them pictures stay in [0, 1]."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError("mean and std go together, with one number per channel each")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("every std must be above 0")
        return self

    @property
    def scaling(self) -> Scaling:
        return Scaling(self.mean, self.std)


@dataclass(frozen=True)
class ImageSplit:
    """Pictures in memory, uint8 [N, C, H, W], with one label each; a batch is scaled when it is fetched."""

    images: Tensor
    labels: Tensor
    scaling: Scaling = Scaling()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int]) -> Batch:
        index = list(rows)
        return {"images": self.scaling(self.images[index]), "labels": self.labels[index]}


def image_facts(images: Tensor, classes: int) -> dict[str, Any]:
    """Facts for a model's factory from pictures [N, C, H, W]."""
    return {"classes": classes, "channels": images.shape[1], "image_size": images.shape[-1]}


def padded(rows: Sequence[Sequence[int]], length: int | None = None, fill: int = 0) -> Tensor:
    """Integer rows of different lengths as one int64 tensor [N, length], filled up on the right; length: None = the longest row's."""
    width = max([len(row) for row in rows] + [1]) if length is None else length
    return torch.tensor([[*row[:width], *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)
