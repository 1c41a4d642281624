"""Augmentations of pictures; all are vectorised over the batch, and draw from the given generator only.

Legend: N rows, C channels, H x W pixels. Pictures are the column `images`; `targets` [N, C, H', W'] (pictures in high resolution) and
`labels` [N, H, W] (a class per pixel) are turned along where an augmentation moves pixels without interpolating.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor

from geta.errors import ConfigError
from geta.recipes.batches import Batch
from geta.recipes.settings import Settings

_PLANES = {"images": 4, "targets": 4, "labels": 3}


class Flip(Settings):
    """Mirror each row with the given probability, left and right (or `upright: true`, top and bottom); targets and label maps with it."""

    name: Literal["flip"]
    probability: float = Field(default=0.5, gt=0.0, le=1.0)
    upright: bool = False

    def apply(self, batch: Batch, generator: Generator) -> Batch:
        chosen = torch.rand(_rows(batch, self.name), generator=generator) < self.probability
        return _moved(batch, lambda planes: torch.where(_like(chosen, planes), planes.flip(-2 if self.upright else -1), planes))


class Turn(Settings):
    """Turn each row by 0, 90, 180 or 270 degrees, equally likely; targets and label maps with it. Pictures must be square."""

    name: Literal["turn"]

    def apply(self, batch: Batch, generator: Generator) -> Batch:
        times = torch.randint(4, (_rows(batch, self.name),), generator=generator)

        def turned(planes: Tensor) -> Tensor:
            if planes.shape[-1] != planes.shape[-2]:
                raise ConfigError(f"train.augment: 'turn' needs square pictures, and these have {tuple(planes.shape[-2:])} pixels")
            for quarter in (1, 2, 3):
                planes = torch.where(_like(times == quarter, planes), planes.rot90(quarter, (-2, -1)), planes)
            return planes

        return _moved(batch, turned)


class Crop(Settings):
    """Pad `images` with `padding` zeros on every side and cut each row back to its size at a place of its own."""

    name: Literal["crop"]
    padding: int = Field(default=4, ge=1)

    def apply(self, batch: Batch, generator: Generator) -> Batch:
        count = _rows(batch, self.name, alone=True)
        images = batch["images"]
        height, width = images.shape[-2:]
        top, left = torch.randint(2 * self.padding + 1, (2, count, 1), generator=generator).to(images.device)
        rows = torch.arange(count, device=images.device)[:, None, None]
        down, across = top + torch.arange(height, device=images.device), left + torch.arange(width, device=images.device)
        around = F.pad(images, (self.padding,) * 4)
        return {**batch, "images": around.permute(0, 2, 3, 1)[rows, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2).contiguous()}


class RandomResizedCrop(Settings):
    """Cut a piece of each row of `images` and enlarge it to the row's size (bilinear).

    scale: range of the piece's share of the area. ratio: range of its width / height, drawn evenly on a logarithmic scale; a piece that
    doesn't fit is clipped to the picture.
    """

    name: Literal["random-resized-crop"]
    scale: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise ValueError(f"scale must be two shares in order, above 0 and up to 1: {self.scale}")
        if not 0.0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be two positive numbers in order: {self.ratio}")
        return self

    def apply(self, batch: Batch, generator: Generator) -> Batch:
        count = _rows(batch, self.name, alone=True)
        images = batch["images"]
        draw = torch.rand(4, count, generator=generator)
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * draw[0]
        low, high = (math.log(edge) for edge in self.ratio)
        ratio = torch.exp(low + (high - low) * draw[1])
        width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
        matrix = torch.zeros(count, 2, 3)
        matrix[:, 0, 0], matrix[:, 1, 1] = width, height
        matrix[:, 0, 2], matrix[:, 1, 2] = (2 * draw[2] - 1) * (1 - width), (2 * draw[3] - 1) * (1 - height)
        grid = F.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
        return {**batch, "images": F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)}


class Cutout(Settings):
    """Set a square of `size` x `size` pixels of each row of `images` to 0 (arXiv 1708.04552); it may reach over the edge.

    With `data.mean`, 0 is the mean color.
    """

    name: Literal["cutout"]
    size: int = Field(default=8, ge=1)

    def apply(self, batch: Batch, generator: Generator) -> Batch:
        count = _rows(batch, self.name)
        images = batch["images"]
        covered = []
        for pixels in images.shape[-2:]:
            first = torch.randint(pixels, (count, 1), generator=generator) - self.size // 2
            place = torch.arange(pixels)
            covered.append(((place >= first) & (place < first + self.size)).to(images.device))
        inside = covered[0][:, None, :, None] & covered[1][:, None, None, :]
        return {**batch, "images": images.masked_fill(inside, 0.0)}


class Mixup(Settings):
    """Mix each row of `images` with another row, `mix * x + (1 - mix) * y`, mix ~ Beta(alpha, alpha) (arXiv 1710.09412); classification
    only.

    Adds `other_labels` [N] and `mix` [N], by which the loss is mixed too.
    """

    name: Literal["mixup"]
    alpha: float = Field(default=0.2, gt=0.0)

    def apply(self, batch: Batch, generator: Generator) -> Batch:
        count = _rows(batch, self.name)
        images, labels = batch["images"], batch.get("labels")
        if labels is None or labels.dim() != 1 or "mix" in batch:
            raise ConfigError(
                "train.augment: 'mixup' needs one class per picture and may be there once; it goes with task.name=classification"
            )
        order = torch.randperm(count, generator=generator).to(images.device)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        mix = torch.from_numpy(np.random.default_rng(seed).beta(self.alpha, self.alpha, count)).to(images)
        share = mix.view(-1, 1, 1, 1)
        return {**batch, "images": share * images + (1.0 - share) * images[order], "other_labels": labels[order], "mix": mix}


def _rows(batch: Batch, name: str, *, alone: bool = False) -> int:
    """How many rows the batch has. alone: columns that would have to move along with the pictures are errors."""
    images = batch.get("images")
    if images is None or images.dim() != 4:
        raise ConfigError(f"train.augment: '{name}' changes pictures, and the batch has {', '.join(batch)}; leave it out for this data")
    others = [
        column for column, dimensions in _PLANES.items() if column != "images" and column in batch and batch[column].dim() == dimensions
    ]
    if alone and others:
        raise ConfigError(
            f"train.augment: '{name}' would move the pictures away from {', '.join(others)}; use 'flip' and 'turn' for this data"
        )
    return len(images)


def _like(chosen: Tensor, planes: Tensor) -> Tensor:
    return chosen.to(planes.device).view(-1, *(1,) * (planes.dim() - 1))


def _moved(batch: Batch, move: Callable[[Tensor], Tensor]) -> Batch:
    return {name: move(column) if _PLANES.get(name) == column.dim() else column for name, column in batch.items()}
