"""The `train` section of a recipe: how the network is trained, dense and compressing itself alike."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import nn

from geta.hints import did_you_mean
from geta.recipes.augment import AugmentSettings
from geta.recipes.settings import Settings

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class OptimizerSettings(Settings):
    """The base optimizer: `name`, `lr`, and whatever else its class in `torch.optim` takes by name (`momentum`, `weight_decay` ...)."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: Literal["sgd", "adam", "adamw"]
    lr: float = Field(gt=0.0)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """YAML takes 5e-4 for a word: to it, numbers have a point."""
        return {key: _number(inner) for key, inner in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _known_by_torch(self) -> OptimizerSettings:
        allowed = list(inspect.signature(_OPTIMIZERS[self.name]).parameters)[1:]
        for key in self.model_extra or {}:
            if key not in allowed:
                hint = did_you_mean(key, allowed) or f"; it takes {', '.join(allowed)}"
                raise ValueError(f"torch.optim.{_OPTIMIZERS[self.name].__name__} has no argument '{key}'{hint}")
        self.build([nn.Parameter(torch.zeros(1))])  # torch refuses impossible values
        return self

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over these parameters."""
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in (self.model_extra or {}).items()}
        make: Any = _OPTIMIZERS[self.name]
        made: torch.optim.Optimizer = make(parameters, lr=self.lr, **options)
        return made


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(inner) for inner in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class ScheduleSettings(Settings):
    """The learning rate over the run: `lr * factor(step)`, in every parameter group.

        warm-up     factor = (step + 1) / warm-up steps, then with t from 0 to 1 over the rest:
        constant    1
        cosine      end + (1 - end) (1 + cos(pi t)) / 2
        linear      end + (1 - end) (1 - t)
        steps       factor ** (how many of `milestones` t has reached)

    warmup: share of all steps, in [0, 1). end: share of the learning rate that is left at the end.
    milestones: shares of the rest of the run, rising, in (0, 1); factor: what each multiplies by.
    """

    name: Literal["constant", "cosine", "linear", "steps"] = "cosine"
    warmup: float = Field(default=0.0, ge=0.0, lt=1.0)
    end: float | None = Field(default=None, ge=0.0, le=1.0)
    milestones: tuple[float, ...] | None = None
    factor: float | None = Field(default=None, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _every_setting_counts(self) -> ScheduleSettings:
        if self.name == "steps":
            if not self.milestones or list(self.milestones) != sorted({m for m in self.milestones if 0.0 < m < 1.0}):
                raise ValueError("'steps' needs milestones, rising shares of the run such as [0.5, 0.75]")
            if self.end is not None:
                raise ValueError("'end' has no effect on 'steps': leave it out")
            return self
        if self.milestones is not None or self.factor is not None:
            raise ValueError(f"milestones and factor have no effect on '{self.name}': leave them out, or write name: steps")
        if self.name == "constant" and self.end is not None:
            raise ValueError("'end' has no effect on 'constant': leave it out")
        return self

    def at(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in step `step` (from 0) of `total`."""
        warm = round(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        t = (step - warm) / max(total - warm, 1)
        if self.name == "steps":
            return float((0.1 if self.factor is None else self.factor) ** sum(t >= milestone for milestone in self.milestones or ()))
        end = self.end or 0.0
        shape = {"constant": 1.0, "cosine": (1.0 + math.cos(math.pi * t)) / 2.0, "linear": 1.0 - t}[self.name]
        return end + (1.0 - end) * shape


class DistillSettings(Settings):
    """The trained dense network as a teacher, see `geta.Distillation`: weight of its answers in the loss, and their temperature."""

    teacher_weight: float = Field(default=0.5, ge=0.0, le=1.0)
    temperature: float = Field(default=2.0, gt=0.0)
    measure: Literal["kl", "mse"] = "kl"


class TrainSettings(Settings):
    """How both networks are trained. Equal settings give equal numbers on one kind of machine, with any number of workers.

    epochs, steps:  length of the run; exactly one of the two.
    batch_size:     examples of one forward and backward pass, over all processes together.
    accumulate:     such passes per optimizer step.
    clip_norm:      largest norm of all gradients together; null = not clipped.
    norm_momentum:  share of the newest batch in the running statistics of batch normalizations; null = as the network has it.
    precision:      of forward and backward passes: autocast for bfloat16 and float16, the latter with a GradScaler.
    device:         auto = a GPU if there is one. threads: of PyTorch on the CPU; null = its own choice.
    workers:        processes that fetch batches; 0 = this one.
    evaluate_every: in epochs. evaluation_batch: examples per batch of the test split; null = batch_size.
    seed:           of initial weights, the order of examples, augmentation and dropout.
    """

    epochs: int | None = Field(default=None, ge=1, le=100_000)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)
    optimizer: OptimizerSettings
    lr_schedule: ScheduleSettings = ScheduleSettings()
    augment: tuple[AugmentSettings, ...] = ()
    clip_norm: float | None = Field(default=None, gt=0.0)
    norm_momentum: float | None = Field(default=None, gt=0.0, le=1.0)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    workers: int = Field(default=0, ge=0, le=256)
    distill: DistillSettings | None = None
    evaluate_every: float = Field(default=1.0, gt=0.0)
    evaluation_batch: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _one_length(self) -> TrainSettings:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self

    def dtype(self) -> torch.dtype:
        """The dtype of autocast; float32 = none."""
        found: torch.dtype = getattr(torch, self.precision)
        return found
