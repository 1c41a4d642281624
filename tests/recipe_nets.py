"""A network for recipes in tests, small enough to be trained in a second, with everything that makes resuming hard."""

from __future__ import annotations

import torch
from torch import nn


class Tiny(nn.Module):
    """Convolution, batch norm, dropout, a hidden layer: running statistics, randomness and two families of groups."""

    def __init__(self, classes: int = 10, channels: int = 1, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.hidden = nn.Linear(8, 12)
        self.fc = nn.Linear(12, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        return self.fc(torch.relu(self.hidden(self.drop(x))))


def not_a_model() -> str:
    return "model"


def broken() -> nn.Module:
    raise RuntimeError("no such file")


RECIPE = """
version: 1
name: tiny
model: {source: "recipe_nets:Tiny", options: {dropout: 0.3}}
data: {source: digits}
task: {name: classification}
train:
  steps: 40
  batch_size: 128
  optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
  augment: [{name: shift}]
  device: cpu
  threads: 1
  seed: 1
compress: {sparsity: 0.5, weight_bits: [4, 8], activation_bits: 8}
output: {folder: FOLDER, latency: false, checkpoint_every: 0.5}
"""
