"""ResNet-56 for CIFAR, the deeper sibling of `resnet.resnet20`."""

from __future__ import annotations

from geta.recipes.nets.resnet import ResNet


def resnet56(classes: int = 10, channels: int = 3) -> ResNet:
    """Build the 56-layer network of He et al. (arXiv 1512.03385, section 4.2): nine blocks per stage."""
    return ResNet(9, classes, channels)
