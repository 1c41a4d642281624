"""A small pair of encoders for pictures and texts, trained like CLIP (arXiv 2103.00020)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geta.recipes.nets.transformer import Block


class DualEncoder(nn.Module):
    """A convolutional encoder of pictures, a transformer over the tokens of texts; unit features, whose products times a learned factor are
    the logits. Token 0 fills texts up and is not looked at.

    width: channels of the first convolution. text_width, depth, heads: of the transformer. features: of both results.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        vocabulary: int = 256,
        context: int = 16,
        width: int = 32,
        text_width: int = 64,
        depth: int = 2,
        heads: int = 4,
        features: int = 64,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((channels, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.pictures = nn.Sequential(*layers)
        self.picture_head = nn.Linear(2 * width, features)
        self.embedding = nn.Embedding(vocabulary, text_width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, text_width))
        self.blocks = nn.ModuleList([Block(text_width, heads, 2 * text_width) for _ in range(depth)])
        self.norm = nn.LayerNorm(text_width)
        self.text_head = nn.Linear(text_width, features)
        self.factor = nn.Parameter(torch.tensor(math.log(1.0 / 0.07)))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [N, channels, H, W] and tokens [N, context] to features [N, features] of each; the factor is in the first."""
        seen = self.picture_head(self.pictures(images).mean(dim=(2, 3)))
        real = tokens != 0
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x, real)
        share = real.to(x.dtype)[..., None]
        read = self.text_head((self.norm(x) * share).sum(dim=1) / share.sum(dim=1).clamp(min=1.0))
        return F.normalize(seen, dim=1) * self.factor.exp().clamp(max=100.0), F.normalize(read, dim=1)
