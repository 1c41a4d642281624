"""Dropout draws one number per element, so two networks of different widths can only be compared without it."""

from __future__ import annotations

from typing import Any

from torch import nn


class Dropout:
    """Every dropout rate of a model (modules, float attributes such as `drop_prob`, configuration objects); can be switched off and on."""

    def __init__(self, model: nn.Module) -> None:
        self._rates: list[tuple[Any, str, float]] = []
        seen: set[int] = set()
        for module in model.modules():
            for holder in (module, getattr(module, "config", None)):
                if holder is not None and id(holder) not in seen:
                    seen.add(id(holder))
                    self._collect(holder)

    def _collect(self, holder: object) -> None:
        kind = type(holder).__name__
        values = vars(holder)
        for name, value in values.items():
            rate = name == "p" if "Drop" in kind or "StochasticDepth" in kind else "drop" in name
            if rate and isinstance(value, float) and value > 0:
                self._rates.append((holder, name, value))

    @property
    def found(self) -> bool:
        """Whether any rate is above zero."""
        return bool(self._rates)

    def off(self) -> None:
        for holder, name, _ in self._rates:
            setattr(holder, name, 0.0)

    def on(self) -> None:
        for holder, name, value in self._rates:
            setattr(holder, name, value)
