"""Knowledge distillation: the dense network's answers as a second target while the compressed one trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geta.errors import BadModelError, ConfigError
from geta.graph.names import unwrap
from geta.integrations.forward import logits_of

Measure = Literal["kl", "mse"]


class Distillation:
    """Mixes the loss of a task with how far the student's scores are from those of a frozen teacher.

        kl    (1 - weight) * loss + weight * T^2 * mean over rows of KL(softmax(teacher / T) || softmax(student / T))
        mse   (1 - weight) * loss + weight * mean (teacher - student)^2

        distill = geta.Distillation(dense_model, weight=0.5, temperature=2.0)
        output = model(x)
        loss = distill(F.cross_entropy(output, y), output, x)       # whatever follows the output is what the model was called with

    teacher:     the dense network; a copy of it is kept in evaluation mode, without gradients, so it may be pruned or trained on.
    weight:      share of the teacher, in [0, 1]. temperature: T > 0; larger ones look more at the classes that aren't the answer.
    measure:     "kl" compares class scores along the last dimension, "mse" any outputs.
    scores:      picks the tensor to compare from what a model returns; None = the output itself, or its `logits`.

    Raises ConfigError for settings out of range. Source: Hinton et al. (arXiv 1503.02531), section 2.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        weight: float = 0.5,
        temperature: float = 2.0,
        measure: Measure = "kl",
        scores: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not isinstance(teacher, nn.Module):
            raise BadModelError(f"teacher is {type(teacher).__name__}: it must be a torch.nn.Module that answers the same inputs")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight <= 1.0:
            raise ConfigError(f"weight is {weight!r}: it is the teacher's share of the loss, from 0 to 1")
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0.0 < temperature < math.inf:
            raise ConfigError(f"temperature is {temperature!r}: it must be a finite number above 0; 2 is a good start")
        if measure not in ("kl", "mse"):
            raise ConfigError(f"measure is {measure!r}: it must be 'kl' or 'mse'")
        self.teacher = copy.deepcopy(unwrap(teacher)).eval().requires_grad_(False)
        self.weight, self.temperature, self.measure = float(weight), float(temperature), measure
        self._scores = _scores_of if scores is None else scores

    def __call__(self, loss: Tensor, output: Any, /, *args: Any, **kwargs: Any) -> Tensor:
        """The mixed loss, a scalar.

        loss: the task's own loss, a scalar. output: what the student returned for `*args, **kwargs`, which the teacher is given too.
        Raises BadModelError when teacher and student scores have different shapes.
        """
        if self.weight == 0.0:
            return loss
        with torch.no_grad():
            wanted = self._scores(self.teacher(*args, **kwargs))
        given = self._scores(output)
        if wanted.shape != given.shape:
            raise BadModelError(
                f"the teacher's scores have shape {tuple(wanted.shape)} and the student's {tuple(given.shape)}: give a teacher for the "
                f"same outputs, or scores= to pick tensors that can be compared"
            )
        return torch.lerp(loss, self._distance(given, wanted).to(loss.dtype), self.weight)

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.measure == "mse":
            return F.mse_loss(student, teacher)
        given, wanted = (torch.log_softmax(scores.float().flatten(0, -2) / self.temperature, dim=-1) for scores in (student, teacher))
        return F.kl_div(given, wanted, reduction="batchmean", log_target=True) * self.temperature**2


def _scores_of(output: Any) -> Tensor:
    return logits_of(output, "say which tensor to compare with Distillation(..., scores=lambda output: ...)")
