"""A strength for the surrogates that changes while the model trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from geta.errors import BadModelError, CheckpointError, ConfigError
from geta.quant.fixed import FixedQuantizer
from geta.quant.quantizer import Quantizer
from geta.quant.surrogate import is_identity

Shape = Literal["linear", "cosine"]
_SETTINGS = ("steps", "start", "end", "begin", "shape")


class Annealing:
    """Sets the strength of every surrogate in a model as a function of the number n of steps taken.

        strength(n) = start + (end - start) * w(p),   p = min(max((n - begin) / steps, 0), 1)
        w(p) = p  "linear";   (1 - cos(pi p)) / 2  "cosine"

    The strength multiplies the amplitudes of `Fourier`; for `DSQ` and `DGE` the slope is 1 + strength * (S - 1). At 0 every surrogate is
    the straight-through estimator, at 1 it is what it was given as. It is a buffer `[]` beside each quantizer's parameters,
    filled without waiting for the device, so that a compiled model isn't traced again.

    Made by `geta.quant.anneal`. Call `step()` after `optimizer.step()`. The strength depends on n and the settings alone, so it
    isn't part of the model's state dict: save `state_dict()` of this object, or call `set_step(n)` after resuming.
    """

    def __init__(self, model: nn.Module, *, steps: int, start: float, end: float, begin: int, shape: Shape) -> None:
        for key, value, smallest in (("steps", steps, 1), ("begin", begin, 0)):
            if type(value) is not int or value < smallest:
                raise ConfigError(f"anneal: {key} = {value!r} must be a whole number of steps, at least {smallest}")
        for key, strength in (("start", start), ("end", end)):
            if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0.0 <= strength <= 1.0:
                raise ConfigError(
                    f"anneal: {key} = {strength!r} must lie in [0, 1]: 0 is the straight-through estimator, 1 the full surrogate"
                )
        if shape not in ("linear", "cosine"):
            raise ConfigError(f"anneal: shape {shape!r} is unknown; use 'linear' or 'cosine'")
        self.steps, self.start, self.end, self.begin = steps, float(start), float(end), begin
        self.shape: Shape = shape
        self._quantizers = _with_surrogate(model)
        self._step = 0
        for quantizer in self._quantizers:
            own = next(quantizer.parameters())
            quantizer.strength = torch.full((), self.strength, dtype=torch.float32, device=own.device)

    @property
    def strength(self) -> float:
        """The strength now."""
        return self.strength_at(self._step)

    def strength_at(self, step: int) -> float:
        """The strength after `step` steps."""
        progress = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        weight = progress if self.shape == "linear" else (1.0 - math.cos(math.pi * progress)) / 2.0
        return self.start + (self.end - self.start) * weight

    def step(self) -> None:
        """One step was taken."""
        self.set_step(self._step + 1)

    def set_step(self, step: int) -> None:
        """`step` steps were taken so far."""
        if type(step) is not int or step < 0:
            raise ConfigError(f"anneal: step {step!r} must be a whole number, at least 0")
        self._step = step
        value = self.strength
        for quantizer in self._quantizers:
            if quantizer.strength is None:
                raise BadModelError(f"quantizer '{quantizer.name}' has lost its strength: make a new Annealing with geta.quant.anneal")
            quantizer.strength.fill_(value)

    def state_dict(self) -> dict[str, Any]:
        """The settings and how many steps were taken, as plain data."""
        return {"step": self._step, **{key: getattr(self, key) for key in _SETTINGS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved step; raises CheckpointError when it was saved with other settings."""
        mine = self.state_dict()
        if sorted(state) != sorted(mine):
            raise CheckpointError(f"the saved annealing has the entries {sorted(state)}, needed are {sorted(mine)}: it is damaged")
        for key in _SETTINGS:
            if state[key] != mine[key]:
                raise CheckpointError(
                    f"the annealing was saved with {key} = {state[key]!r}, this one has {mine[key]!r}: use the same settings"
                )
        self.set_step(state["step"])


def anneal(model: nn.Module, *, steps: int, start: float = 0.0, end: float = 1.0, begin: int = 0, shape: Shape = "cosine") -> Annealing:
    """Let the surrogates of `model` go from strength `start` to `end` within `steps` steps, from step `begin` on.

    Raises ConfigError for impossible settings and for a model in which no quantizer has a surrogate other than `STE`.
    """
    return Annealing(model, steps=steps, start=start, end=end, begin=begin, shape=shape)


def _with_surrogate(model: nn.Module) -> list[Quantizer | FixedQuantizer]:
    found = [module for module in model.modules() if isinstance(module, Quantizer | FixedQuantizer)]
    chosen = [quantizer for quantizer in found if not is_identity(quantizer.surrogate)]
    if not chosen:
        raise ConfigError(
            f"anneal: none of the {len(found)} quantizers has a surrogate to anneal; call "
            "geta.quantize(model, surrogate=geta.Fourier((0.21,))) first"
        )
    return chosen
