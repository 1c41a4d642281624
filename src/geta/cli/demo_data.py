"""The data of the demo: the 1,797 real handwritten digits (8x8 pixels, 16 grey levels) that ship with scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from geta.errors import GetaError

_SPLIT_SEED = 0
_LEVELS = 16.0


@dataclass(frozen=True)
class Digits:
    """Images float32 [N, 1, 8, 8] in [0, 1] and labels int64 [N], split once and for all: 80 % train, 20 % test."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield augmented training batches without end; the same seed gives the same batches in the same order.

        Each pass shuffles the images, drops the last incomplete batch and shifts every image by -1, 0 or 1 pixels each way.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train_labels), generator=generator)
            for start in range(0, len(order) - batch_size + 1, batch_size):
                index = order[start : start + batch_size]
                yield shift(self.train_images[index], generator), self.train_labels[index]

    def steps_per_epoch(self, batch_size: int) -> int:
        """Count the batches of one pass over the training images."""
        return len(self.train_labels) // batch_size


def shift(images: torch.Tensor, generator: torch.Generator, most: int = 1) -> torch.Tensor:
    """Move every image of [N, C, H, W] by its own -most..most pixels down and right, filling with zeros."""
    count, _, height, width = images.shape
    padded = F.pad(images, (most, most, most, most))
    down, right = torch.randint(0, 2 * most + 1, (2, count), generator=generator)
    rows = down[:, None, None] + torch.arange(height)[None, :, None]
    columns = right[:, None, None] + torch.arange(width)[None, None, :]
    return padded.movedim(1, -1)[torch.arange(count)[:, None, None], rows, columns].movedim(-1, 1).contiguous()


def load_digits() -> Digits:
    """Load the digits; the split is stratified by class and never depends on the run's seed.

    Raises GetaError when scikit-learn is missing.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError:
        raise GetaError("the demo's digits ship with scikit-learn, which is not installed: pip install 'geta[demo]'") from None
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / _LEVELS
    labels = torch.tensor(found.target, dtype=torch.int64)
    split = model_selection.train_test_split(range(len(labels)), test_size=0.2, random_state=_SPLIT_SEED, stratify=found.target)
    train, test = (torch.tensor(sorted(part)) for part in split)
    return Digits(images[train], labels[train], images[test], labels[test])
