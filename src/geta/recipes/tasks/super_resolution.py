"""Pictures in a higher resolution."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from geta.errors import BadModelError
from geta.recipes.batches import Batch
from geta.recipes.tasks.regression import ErrorName, error_of
from geta.recipes.tasks.task import Call, Metric, RowByRow, call_with, column, logits_of

_LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)
_MOST = 100.0


class SuperResolution(RowByRow):
    """L1 by default; the metric is the mean over the test pictures of the peak signal-to-noise ratio. Batches: `images`, `targets` in [0,
    1].

    `PSNR = -10 log10(mean((x - y)^2))` dB, where x is clamped to [0, 1] and rounded to 8 bits, `border` pixels on every side are left out,
    and with `channel: y` colors are turned into luma, `(65.481 R + 128.553 G + 24.966 B + 16) / 255` (ITU-R BT.601), as the literature
    does. Grey pictures are compared as they are. An exact picture counts as 100 dB.

    border: None = the scale. Test pictures that differ in size need `train.evaluation_batch: 1`.
    """

    name: Literal["super-resolution"]
    error: ErrorName = "l1"
    channel: Literal["y", "rgb"] = "y"
    border: int | None = Field(default=None, ge=0)

    @property
    def metric(self) -> Metric:
        return Metric("PSNR", "dB")

    def call(self, batch: Batch) -> Call:
        return call_with(batch, ("images",), self.name)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return error_of(self.error, *self._pair(output, batch))

    def tally(self, output: Any, batch: Batch) -> Tensor:
        found, wanted = self._pair(output, batch)
        found, wanted = (found.double().clamp(0.0, 1.0) * 255.0).round() / 255.0, wanted.double()
        border = wanted.shape[-1] // batch["images"].shape[-1] if self.border is None else self.border
        if 2 * border >= min(wanted.shape[-2:]):
            raise BadModelError(f"task.border={border} leaves nothing of pictures of {tuple(wanted.shape[-2:])} pixels")
        height, width = wanted.shape[-2:]
        difference = (found - wanted)[..., border : height - border, border : width - border]
        if self.channel == "y" and difference.shape[1] == 3:
            difference = torch.einsum("nchw,c->nhw", difference, difference.new_tensor(_LUMA))
        each = -10.0 * difference.square().flatten(1).mean(dim=1).clamp(min=10.0 ** (-_MOST / 10.0)).log10()
        return torch.stack((each.sum(), each.new_tensor(len(each))))

    def score(self, total: Tensor) -> float:
        return float(total[0] / total[1])

    def _pair(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        found, wanted = logits_of(output), column(batch, "targets", self.name)
        if found.shape != wanted.shape:
            raise BadModelError(
                f"task.name=super-resolution: the model returns {tuple(found.shape)}, and the wanted pictures are {tuple(wanted.shape)}; "
                "do data.scale and the model's scale agree?"
            )
        dtype = torch.promote_types(found.dtype, torch.float32)  # half precision is too coarse for the squares of small errors
        return found.to(dtype), wanted.to(dtype)
