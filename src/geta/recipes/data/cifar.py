"""CIFAR-10 and CIFAR-100 in their binary version."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Data
from geta.recipes.data.files import ImageSplit, LocalPath, PictureSettings, existing_folder, image_facts

_FOLDERS = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}
_PYTHON_FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
_PYTHON_FILES = ("data_batch_1", "batches.meta", "train", "meta")
_PIXELS = 3 * 32 * 32


class CifarData(PictureSettings):
    """Color pictures [N, 3, 32, 32] with 10 classes, 100, or the 20 coarse ones of CIFAR-100.

    path: the folder with the `.bin` files (`cifar-10-batches-bin`, `cifar-100-binary`), or the folder around it. A record has one label
    byte (CIFAR-100: coarse, then fine) and 3,072 bytes: red, green and blue planes of 32 x 32.
    """

    source: Literal["cifar"]
    path: LocalPath
    classes: Literal[10, 20, 100] = 10

    def load(self) -> Data:
        """Read the files. Raises ConfigError for missing files and for the Python version, GetaError for damaged ones."""
        self.scaling.check(3)
        train_names = [f"data_batch_{number}.bin" for number in range(1, 6)] if self.classes == 10 else ["train.bin"]
        folder = self._folder()
        train, test = self._split(folder, train_names), self._split(folder, ["test_batch.bin" if self.classes == 10 else "test.bin"])
        return Data(train, test, image_facts(train.images, self.classes))

    def _folder(self) -> Path:
        inner = _FOLDERS[10 if self.classes == 10 else 100]
        folder = existing_folder(self.path, f"the folder '{inner}' of the binary version")
        if (folder / inner).is_dir():
            return folder / inner
        python = next((name for name in _PYTHON_FOLDERS if (folder / name).is_dir() or folder.name == name), None)
        if python is None:
            python = next((name for name in _PYTHON_FILES if (folder / name).is_file()), None)
        if python is not None and not any(folder.glob("*.bin")):
            raise ConfigError(
                f"data: '{folder}' holds the Python version of CIFAR ('{python}'), which is pickle: reading it runs whatever code is in "
                f"the file, so it is refused; get the binary version ('{inner}')"
            )
        return folder

    def _split(self, folder: Path, names: list[str]) -> ImageSplit:
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"data: {', '.join(missing)} of the binary version of CIFAR is missing in '{folder}'")
        label_bytes = 1 if self.classes == 10 else 2
        records = np.concatenate([_records(folder / name, label_bytes + _PIXELS) for name in names])
        labels = records[:, 0 if self.classes in {10, 20} else 1].astype(np.int64)
        if labels.max() >= self.classes:
            raise GetaError(f"data: label {labels.max()} in '{folder}', and data.classes is {self.classes}; is this the other CIFAR?")
        images = records[:, label_bytes:].reshape(-1, 3, 32, 32)
        return ImageSplit(torch.from_numpy(images.copy()), torch.from_numpy(labels), self.scaling)


def _records(path: Path, size: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    raw = np.fromfile(path, np.uint8)
    if not len(raw) or len(raw) % size:
        raise GetaError(f"data: '{path}' has {len(raw)} bytes, which is no multiple of {size}, the size of a record; download it again")
    return raw.reshape(-1, size)
