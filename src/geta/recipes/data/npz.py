"""Arrays in an .npz file of NumPy."""

from __future__ import annotations

import zipfile
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Batch, Data, TensorSplit
from geta.recipes.data.files import ImageSplit, LocalPath, PictureSettings, existing_file

Columns = dict[str, str]


class NpzData(PictureSettings):
    """Arrays of one file, `train` and `test` as `column of a batch: name in the file`; object arrays (pickle) are refused.

    Pictures are the column `images`: [N, H, W], [N, C, H, W] or, with `layout: NHWC`, [N, H, W, C] (None = NCHW); uint8 ones are scaled to
    [0, 1]. Integers become int64, floats float32.
    """

    source: Literal["npz"]
    path: LocalPath
    train: Columns = Field(default={"images": "x_train", "labels": "y_train"}, min_length=1)
    test: Columns = Field(default={"images": "x_test", "labels": "y_test"}, min_length=1)
    layout: Literal["NCHW", "NHWC"] | None = None

    def load(self) -> Data:
        """Read the file. Raises ConfigError for a name that isn't in it, GetaError for a damaged file."""
        file = existing_file(self.path, "an .npz file")
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                train, test = self._read(arrays, self.train, "train"), self._read(arrays, self.test, "test")
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            if isinstance(error, ConfigError):
                raise
            raise GetaError(f"data: '{file}' can't be read without pickle: {error}; write it with numpy.savez") from error
        facts: dict[str, Any] = {}
        if self.layout is not None and "images" not in train:
            raise ConfigError("data.layout has no effect without a column 'images'; leave it out")
        if "images" in train:
            self.scaling.check(train["images"].shape[1])
            facts |= {"channels": train["images"].shape[1], "image_size": train["images"].shape[-1]}
        if "labels" in train and not train["labels"].is_floating_point():
            facts["classes"] = (
                int(max(train["labels"].max(), test["labels"].max())) + 1 if "labels" in test else int(train["labels"].max()) + 1
            )
        return Data(self._split(train), self._split(test), facts)

    def _read(self, arrays: Any, columns: Columns, part: str) -> Batch:
        missing = [name for name in columns.values() if name not in arrays.files]
        if missing:
            raise ConfigError(
                f"data.{part}: '{self.path}' has no array {', '.join(missing)}; it has {', '.join(arrays.files) or 'none'}. "
                f"Write data.{part} as `column of a batch: name in the file`"
            )
        found = {column: self._tensor(column, arrays[name]) for column, name in columns.items()}
        lengths = {column: len(tensor) for column, tensor in found.items()}
        if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
            raise GetaError(f"data.{part}: the arrays of '{self.path}' differ in length or are empty: {lengths}")
        return found

    def _tensor(self, column: str, array: npt.NDArray[Any]) -> Tensor:
        if column == "images" and array.ndim == 4 and self.layout == "NHWC":
            array = array.transpose(0, 3, 1, 2)
        if column == "images" and array.ndim == 3:
            array = array[:, None]
        if not array.ndim or array.dtype.kind not in "buif":
            raise GetaError(f"data: the array for '{column}' in '{self.path}' is {array.dtype} {array.shape}; rows of numbers are needed")
        if column == "images" and array.dtype == np.uint8:
            return torch.from_numpy(np.ascontiguousarray(array))
        return torch.from_numpy(np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else np.int64))

    def _split(self, tensors: Batch) -> TensorSplit | ImageSplit:
        images = tensors.get("images")
        if images is not None and images.dtype == torch.uint8 and set(tensors) == {"images", "labels"}:
            return ImageSplit(images, tensors["labels"], self.scaling)
        if images is None or images.dtype != torch.uint8:
            if self.mean is not None:
                raise ConfigError("data.mean has no effect: the file has no uint8 pictures in the column 'images'; leave it out")
            return TensorSplit(tensors)
        return TensorSplit({**tensors, "images": self.scaling(images)})
