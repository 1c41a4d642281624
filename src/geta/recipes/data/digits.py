"""The 1,797 real handwritten digits that ship with scikit-learn."""

from __future__ import annotations

from typing import Literal

import torch

from geta.errors import GetaError
from geta.recipes.batches import Data, TensorSplit
from geta.recipes.settings import Settings

_SPLIT_SEED = 0
_LEVELS = 16.0


class DigitsData(Settings):
    """Images float32 [N, 1, 8, 8] in [0, 1] and labels int64 [N], split once and for all, stratified by class: 80 % train, 20 % test."""

    source: Literal["digits"] = "digits"

    def load(self) -> Data:
        """Load the digits. Raises GetaError when scikit-learn is missing."""
        try:
            from sklearn import datasets, model_selection
        except ImportError:
            raise GetaError("the digits ship with scikit-learn, which is not installed: pip install 'geta[demo]'") from None
        found = datasets.load_digits()
        images = torch.tensor(found.images, dtype=torch.float32)[:, None] / _LEVELS
        labels = torch.tensor(found.target, dtype=torch.int64)
        split = model_selection.train_test_split(range(len(labels)), test_size=0.2, random_state=_SPLIT_SEED, stratify=found.target)
        train, test = (TensorSplit({"images": images[sorted(part)], "labels": labels[sorted(part)]}) for part in split)
        return Data(train, test, {"classes": 10, "channels": 1})
