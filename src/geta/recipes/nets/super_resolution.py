"""Networks that enlarge pictures: CARN, and a small residual one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def enlarging(width: int, scale: int) -> nn.Sequential:
    """Convolutions with pixel shuffles from [N, width, h, w] to [N, width, scale h, scale w]; scale is 3 or a power of 2."""
    steps = [3] if scale == 3 else [2] * round(math.log2(scale))
    if math.prod(steps) != scale:
        raise ValueError(f"scale must be 2, 3, 4 or 8, not {scale}")
    return nn.Sequential(
        *(layer for step in steps for layer in (nn.Conv2d(width, width * step * step, 3, padding=1), nn.ReLU(), nn.PixelShuffle(step)))
    )


class ResidualUnit(nn.Module):
    """relu(x + conv(relu(conv(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape [N, width, h, w]."""
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class Cascade(nn.Module):
    """Three parts in a row; after each, a 1x1 convolution joins its result with everything before it."""

    def __init__(self, width: int, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.joins = nn.ModuleList([nn.Conv2d(width * (number + 2), width, 1) for number in range(len(parts))])

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape [N, width, h, w]."""
        seen = [x]
        for part, join in zip(self.parts, self.joins, strict=True):
            seen.append(part(x))
            x = F.relu(join(torch.cat(seen, dim=1)))
        return x


class CARN(nn.Module):
    """The cascading residual network of Ahn et al. (arXiv 1803.08664): three cascades of three residual units, 64 channels.

    Deviation: the mean color of the training pictures is not subtracted; pictures enter as they come, in [0, 1].
    """

    def __init__(self, channels: int = 3, scale: int = 2, width: int = 64) -> None:
        super().__init__()
        self.entry = nn.Conv2d(channels, width, 3, padding=1)
        self.body = Cascade(width, [Cascade(width, [ResidualUnit(width) for _ in range(3)]) for _ in range(3)])
        self.enlarge = enlarging(width, scale)
        self.exit = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map pictures [N, channels, h, w] to [N, channels, scale h, scale w]."""
        enlarged: Tensor = self.exit(self.enlarge(self.body(self.entry(images))))
        return enlarged


class SmallSuperResolution(nn.Module):
    """Residual units, one pixel shuffle, and what they add to the picture enlarged by bicubic interpolation."""

    def __init__(self, channels: int = 3, scale: int = 2, width: int = 32, units: int = 4) -> None:
        super().__init__()
        self.scale = scale
        self.entry = nn.Conv2d(channels, width, 3, padding=1)
        self.body = nn.Sequential(*(ResidualUnit(width) for _ in range(units)))
        self.exit = nn.Conv2d(width, channels * scale * scale, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, images: Tensor) -> Tensor:
        """Map pictures [N, channels, h, w] to [N, channels, scale h, scale w]."""
        base = F.interpolate(images, scale_factor=float(self.scale), mode="bicubic", align_corners=False)
        enlarged: Tensor = base + self.shuffle(self.exit(self.body(F.relu(self.entry(images)))))
        return enlarged
