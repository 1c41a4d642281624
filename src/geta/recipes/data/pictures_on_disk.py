"""Picture files: found, decoded with Pillow, resized and cut."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from geta.errors import ConfigError, GetaError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


def pillow() -> Any:
    """The module PIL.Image. Raises GetaError that says how to install it."""
    try:
        from PIL import Image
    except ImportError:
        raise GetaError("pictures are decoded with Pillow, which is not installed: pip install 'geta[pictures]'") from None
    return Image


def picture_files(folder: Path) -> list[Path]:
    """Picture files directly in `folder`, by name. Raises ConfigError when there is none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ConfigError(f"data: there is no picture in '{folder}' (looked for {', '.join(sorted(SUFFIXES))})")
    return found


def open_picture(path: Path, channels: int | None = 3) -> Image:
    """Decode a picture file in color (3 channels), grey (1), or as it is (None).

    Raises GetaError that names a file that is damaged or no picture.
    """
    images = pillow()
    try:
        with images.open(path) as picture:
            picture.load()
            converted: Image = picture.copy() if channels is None else picture.convert("RGB" if channels == 3 else "L")
            return converted
    except (OSError, SyntaxError, ValueError) as error:
        raise GetaError(f"data: '{path}' can't be decoded as a picture: {error}; replace or remove the file") from error


def fitted(picture: Image, size: int, resize: int, *, labels: bool = False) -> Image:
    """Scale so that the shorter side has `resize` pixels, then cut the middle `size` x `size`. labels: a map of classes, never mixed."""
    width, height = picture.size
    factor = resize / min(width, height)
    kernel = pillow().Resampling.NEAREST if labels else pillow().Resampling.BICUBIC
    scaled = picture.resize((max(size, round(width * factor)), max(size, round(height * factor))), kernel)
    left, top = (scaled.size[0] - size) // 2, (scaled.size[1] - size) // 2
    return scaled.crop((left, top, left + size, top + size))


def as_array(picture: Image) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, C]."""
    array = np.asarray(picture, dtype=np.uint8)
    return array[..., None] if array.ndim == 2 else array


def as_tensor(picture: Image) -> Tensor:
    """uint8 [C, H, W]."""
    return torch.from_numpy(as_array(picture).transpose(2, 0, 1).copy())


def as_labels(picture: Image, what: str) -> Tensor:
    """int64 [H, W] from a picture whose pixels are class numbers. Raises GetaError for a picture in color; what: names it."""
    if picture.mode not in {"L", "P", "1", "I", "I;16"}:
        raise GetaError(f"data: {what} is a picture of mode {picture.mode}; a map of classes has one number per pixel (grey or palette)")
    return torch.from_numpy(np.asarray(picture).astype(np.int64))


def smaller(picture: Image, scale: int) -> Image:
    """The picture at 1 / `scale` of its size, by bicubic interpolation with the kernel widened by `scale` (as MATLAB's `imresize`)."""
    width, height = picture.size
    return picture.resize((width // scale, height // scale), pillow().Resampling.BICUBIC)
