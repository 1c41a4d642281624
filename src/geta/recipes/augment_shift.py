"""Moving images by whole pixels."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from geta.recipes.batches import Batch
from geta.recipes.settings import Settings


class Shift(Settings):
    """Move every image by its own -most..most pixels down and right, and fill with zeros. Batches: `images` [N, C, H, W]."""

    name: Literal["shift"] = "shift"
    most: int = Field(default=1, ge=1)

    def apply(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with other `images`; everything else stays."""
        return {**batch, "images": shift(batch["images"], generator, self.most)}


def shift(images: Tensor, generator: torch.Generator, most: int = 1) -> Tensor:
    """Move every image of [N, C, H, W] by its own -most..most pixels down and right, filling with zeros."""
    count, _, height, width = images.shape
    padded = F.pad(images, (most, most, most, most))
    down, right = torch.randint(0, 2 * most + 1, (2, count), generator=generator)
    rows = down[:, None, None] + torch.arange(height)[None, :, None]
    columns = right[:, None, None] + torch.arange(width)[None, None, :]
    return padded.movedim(1, -1)[torch.arange(count)[:, None, None], rows, columns].movedim(-1, 1).contiguous()
