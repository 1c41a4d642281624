"""VGG7 for CIFAR: six convolutions and two linear layers, as used in the literature on low-bit networks (Li et al., arXiv 1605.04711)."""

from __future__ import annotations

from torch import Tensor, nn


class VGG7(nn.Module):
    """2 x (128 C3) - pool - 2 x (256 C3) - pool - 2 x (512 C3) - pool - 1024 - classes, with batch norm and ReLU.

    width:  channels of the first pair; the others have twice and four times as many, the hidden linear layer eight times.
    pooled: the mean over all positions goes into the hidden layer, instead of every position.
    """

    def __init__(self, classes: int = 10, channels: int = 3, image_size: int = 32, width: int = 128, pooled: bool = False) -> None:
        super().__init__()
        if image_size < 8 or image_size % 8:
            raise ValueError(f"VGG7 halves pictures three times: image_size must be a multiple of 8, not {image_size}")
        layers: list[nn.Module] = []
        inputs = channels
        for outputs in (width, 2 * width, 4 * width):
            for _ in range(2):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        if pooled:
            layers.append(nn.AdaptiveAvgPool2d(1))
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.Linear(inputs if pooled else inputs * (image_size // 8) ** 2, 8 * width), nn.ReLU())
        self.classifier = nn.Linear(8 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, channels, image_size, image_size] to class scores [N, classes]."""
        scores: Tensor = self.classifier(self.hidden(self.features(images).flatten(1)))
        return scores
