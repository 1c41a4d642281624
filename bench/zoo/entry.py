"""One line of the catalogue, and the example inputs that builders share.

Legend of shapes: `B` batch, `C` channels, `H`, `W` height and width, `T` frames or samples, `S` sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shim import declare_torchvision_operators

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
BATCH = 2


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    name:    "<source>/<model>", unique.
    builder: () -> (model, args, kwargs); random weights.
    heavy:   so large that only one of its kind may be checked at a time.
    """

    name: str
    builder: Callable[[], Built]
    heavy: bool = False

    def build(self) -> Built:
        """The model in evaluation mode and its example inputs; the same weights at every call."""
        declare_torchvision_operators()
        torch.manual_seed(0)
        model, args, kwargs = self.builder()
        return model.eval(), args, kwargs


def image(channels: int = 3, height: int = 32, width: int | None = None, batch: int = BATCH) -> Tensor:
    """[B, C, H, W]: smooth blobs plus noise, brighter and darker from sample to sample, so that pooled features differ."""
    size = (height, width or height)
    blobs = F.interpolate(torch.randn(batch, channels, 4, 4), size, mode="bilinear")
    return blobs + 0.5 * torch.randn(batch, channels, *size) + torch.linspace(-1, 1, batch).view(-1, 1, 1, 1)


def video(frames: int = 8, size: int = 64, channels: int = 3, batch: int = BATCH) -> Tensor:
    """[B, C, T, H, W]."""
    still = image(channels, size, batch=batch).unsqueeze(2)
    return still + 0.5 * torch.randn(batch, channels, frames, size, size)


def tokens(vocabulary: int = 100, length: int = 12, low: int = 3, batch: int = BATCH) -> Tensor:
    """[B, S] int64 in [low, vocabulary)."""
    return torch.randint(low, vocabulary, (batch, length))


def padding_mask(ids: Tensor, missing: int = 3) -> Tensor:
    """[B, S] of ones; the last sample ends with `missing` zeros."""
    mask = torch.ones_like(ids)
    mask[-1, -missing:] = 0
    return mask
