"""SimpleViT: a vision transformer without a class token (Beyer et al., arXiv 2205.01580)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geta.recipes.nets.transformer import Block


class SimpleViT(nn.Module):
    """Patches with fixed sine-cosine positions, pre-norm blocks, the mean over all tokens, a linear classifier."""

    def __init__(
        self,
        *,
        classes: int = 10,
        channels: int = 3,
        image_size: int = 32,
        patch: int = 4,
        width: int = 512,
        depth: int = 6,
        heads: int = 8,
        hidden: int = 1024,
    ) -> None:
        super().__init__()
        if image_size % patch or width % 4:
            raise ValueError(f"image_size ({image_size}) must be a multiple of patch ({patch}), and width ({width}) of 4")
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.register_buffer("positions", sine_cosine(image_size // patch, width), persistent=False)
        self.blocks = nn.ModuleList([Block(width, heads, hidden) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, channels, image_size, image_size] to class scores [N, classes]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x).mean(dim=1))
        return scores


def sine_cosine(side: int, width: int, longest: float = 10_000.0) -> Tensor:
    """Positions [side * side, width] of a square grid: sine and cosine of both coordinates at width / 4 frequencies."""
    frequencies = longest ** -(torch.arange(width // 4) / max(width // 4 - 1, 1))
    place = torch.arange(side)[:, None] * frequencies
    down, across = place[:, None].expand(side, side, -1), place[None].expand(side, side, -1)
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=-1).flatten(0, 1)
