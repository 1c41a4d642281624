"""Files in the IDX format of MNIST and its relatives, compressed with gzip or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Data
from geta.recipes.data.files import ImageSplit, LocalPath, PictureSettings, existing_folder, image_facts

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class IdxData(PictureSettings):
    """Grey pictures [N, 1, H, W] and labels from four IDX files in the folder `path`; each may end in `.gz`.

    Format: two zero bytes, a byte for the type, a byte for the number of dimensions, each dimension as a big-endian uint32, the values.
    """

    source: Literal["idx"]
    path: LocalPath
    train_images: str = "train-images-idx3-ubyte"
    train_labels: str = "train-labels-idx1-ubyte"
    test_images: str = "t10k-images-idx3-ubyte"
    test_labels: str = "t10k-labels-idx1-ubyte"

    def load(self) -> Data:
        """Read the four files. Raises ConfigError for a missing file, GetaError for a damaged one."""
        train = self._split(self.train_images, self.train_labels)
        test = self._split(self.test_images, self.test_labels)
        if train.images.shape[1:] != test.images.shape[1:]:
            raise GetaError(
                f"data: pictures are {tuple(train.images.shape[2:])} in '{self.train_images}' and {tuple(test.images.shape[2:])} in "
                f"'{self.test_images}'"
            )
        classes = int(max(train.labels.max(), test.labels.max())) + 1
        return Data(train, test, image_facts(train.images, classes))

    def _split(self, images_name: str, labels_name: str) -> ImageSplit:
        images, labels = read_idx(self._file(images_name)), read_idx(self._file(labels_name))
        if images.ndim != 3 or images.dtype != np.uint8:
            raise GetaError(f"data: '{self.path / images_name}' holds {images.dtype} {images.shape}; pictures are uint8 [N, H, W]")
        if labels.ndim != 1 or len(labels) != len(images) or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
            raise GetaError(
                f"data: '{self.path / labels_name}' holds {labels.dtype} {labels.shape}, and there are {len(images)} pictures; "
                "every picture has one integer label"
            )
        self.scaling.check(1)
        return ImageSplit(torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64)), self.scaling)

    def _file(self, name: str) -> Path:
        folder = existing_folder(self.path, "the folder with the IDX files")
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
        raise ConfigError(f"data: there is no '{name}' and no '{name}.gz' in '{folder}'; other names go into data.train_images etc.")


def read_idx(path: Path) -> npt.NDArray[Any]:
    """The array in an IDX file. Raises GetaError that says what is wrong with a file that is none, or is truncated."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise GetaError(f"data: '{path}' can't be read: {error}; download it again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _TYPES:
        raise GetaError(f"data: '{path}' is no IDX file: it begins with {raw[:4]!r}, not with two zero bytes and a known type")
    kind, dimensions = np.dtype(_TYPES[raw[2]]), raw[3]
    start = 4 + 4 * dimensions
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], ">u4")) if len(raw) >= start else ()
    expected = start + math.prod(shape) * kind.itemsize
    if len(raw) != expected or len(shape) != dimensions:
        raise GetaError(
            f"data: '{path}' has {len(raw)} bytes, and its header {shape} of {kind.name} asks for {expected}; download it again"
        )
    return np.frombuffer(raw, kind, offset=start).reshape(shape).astype(kind.newbyteorder("="))
