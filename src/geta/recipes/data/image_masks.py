"""Pictures with a class for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Batch, Data
from geta.recipes.data.files import LocalPath, PictureSettings, Scaling, existing_folder
from geta.recipes.data.pictures_on_disk import as_labels, as_tensor, fitted, open_picture, picture_files

IGNORED = 255
"""The label of pixels that count nowhere, as in Pascal VOC and Cityscapes."""


class ImageMasksData(PictureSettings):
    """`path/train/images/*` and `path/train/masks/*` of the same names, grey or palette pictures of class numbers; `path/test` likewise.

    The shorter side becomes `size`, the middle `size` x `size` is cut out; masks are never mixed between pixels. 255 is for pixels that
    count nowhere. Batches: `images` [N, channels, size, size], `labels` int64 [N, size, size].
    """

    source: Literal["image-masks"]
    path: LocalPath
    classes: int = Field(ge=2, le=IGNORED)
    train: str = "train"
    test: str = "test"
    size: int = Field(default=224, ge=1)
    channels: Literal[1, 3] = 3

    def load(self) -> Data:
        """List the files. Raises ConfigError for what is missing; a damaged picture is a GetaError when fetched."""
        self.scaling.check(self.channels)
        facts = {"classes": self.classes, "channels": self.channels, "image_size": self.size}
        return Data(self._split(self.path / self.train), self._split(self.path / self.test), facts)

    def _split(self, folder: Path) -> MaskedPictures:
        images = picture_files(existing_folder(folder / "images", "a folder of pictures"))
        masks = {file.stem: file for file in picture_files(existing_folder(folder / "masks", "a folder of masks of the same names"))}
        missing = [file.name for file in images if file.stem not in masks]
        if missing:
            raise ConfigError(f"data: '{folder / 'masks'}' has no mask for {', '.join(missing[:5])} (the same name, any suffix)")
        return MaskedPictures(tuple((file, masks[file.stem]) for file in images), self)


@dataclass(frozen=True)
class MaskedPictures:
    """Files of pictures and of their masks."""

    files: tuple[tuple[Path, Path], ...]
    settings: ImageMasksData

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, rows: Sequence[int]) -> Batch:
        scaling: Scaling = self.settings.scaling
        images, labels = zip(*(self._row(*self.files[row]) for row in rows), strict=True)
        return {"images": scaling(torch.stack(images)), "labels": torch.stack(labels)}

    def _row(self, image_file: Path, mask_file: Path) -> tuple[Tensor, Tensor]:
        size = self.settings.size
        image, mask = open_picture(image_file, self.settings.channels), open_picture(mask_file, None)
        if image.size != mask.size:
            raise GetaError(f"data: '{mask_file}' has {mask.size} pixels, and '{image_file}' {image.size}")
        labels = as_labels(fitted(mask, size, size, labels=True), f"'{mask_file}'")
        if bool(((labels >= self.settings.classes) & (labels != IGNORED)).any()):
            found = sorted(set(labels.unique().tolist()) - {IGNORED})[-1]
            raise GetaError(f"data: '{mask_file}' has the label {found}, and data.classes={self.settings.classes} are numbered from 0")
        return as_tensor(fitted(image, size, size)), labels
