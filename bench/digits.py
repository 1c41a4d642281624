"""The handwritten digits as benches want them: tensors, batches without end, accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from geta.recipes.augment_shift import shift
from geta.recipes.data.digits import DigitsData


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


def load_digits() -> Digits:
    """Load the digits of scikit-learn with the split of the recipes."""
    data = DigitsData().load()
    train, test = (split.batch(range(len(split))) for split in (data.train, data.test))
    return Digits(train["images"], train["labels"], test["images"], test["labels"])


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Percentage of the test images that the model, in evaluation mode meanwhile, gives the right class."""
    was_training = model.training
    model.eval()
    right = int((model(digits.test_images).argmax(dim=1) == digits.test_labels).sum())
    model.train(was_training)
    return 100.0 * right / len(digits.test_labels)
