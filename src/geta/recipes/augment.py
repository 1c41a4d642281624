"""What happens to a training batch before the network sees it: one class of settings per `train.augment[].name`.

An augmentation has one method, `apply(batch, generator) -> batch`. All its randomness comes from the generator, which the run seeds from
(seed, epoch, step), so that a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from geta.recipes.augment_shift import Shift
from geta.recipes.augmentations import Crop, Cutout, Flip, Mixup, RandomResizedCrop, Turn

AugmentSettings = Annotated[Crop | Cutout | Flip | Mixup | RandomResizedCrop | Shift | Turn, Field(discriminator="name")]
"""One entry of `train.augment`: which class it is follows from its `name`."""
