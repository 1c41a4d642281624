"""Axes of charts: ranges that include their data, few round ticks, linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps values `low` .. `high` to pixels `start` .. `end`; logarithmic where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value, kept inside of the axis."""
        low, high, at = (_log(self.low), _log(self.high), _log(value)) if self.log else (self.low, self.high, value)
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, most: int = 5, *, whole: bool = False) -> list[float]:
        """Round values on the axis, at least two where the range allows; only whole numbers where `whole`."""
        if self.log:
            found = _decades(self.low, self.high, most)
            if len(found) >= 2:
                return found
        return [value for value in _round_steps(self.low, self.high, most, least=1.0 if whole else 0.0) if not whole or value.is_integer()]


def around(values: Iterable[float], *, log: bool = False, zero: bool = False, margin: float = 0.06) -> tuple[float, float]:
    """The range of an axis for these values: a little wider than they are; from zero where `zero`."""
    known = list(values)
    if not known:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(known), max(known)
    if log:
        spread = max(_log(high) - _log(low), 0.1) * margin
        return math.exp(_log(low) - spread), math.exp(_log(high) + spread)
    spread = (high - low) * margin or abs(high) * 0.1 or 0.5
    return (min(0.0, low) if zero else low - spread), high + spread


def tick_label(value: float) -> str:
    """A tick in few characters; numbers from ten thousand on with a letter."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:g}{letter}"
    return f"{value:.6g}".replace("-", "\u2212")


def _log(value: float) -> float:
    return math.log(max(value, 1e-300))


def _round_steps(low: float, high: float, most: int, least: float) -> list[float]:
    if not high > low:
        return [low]
    rough = max(least, (high - low) / max(1, most - 1))
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in ((1, 2, 4, 8, 10, 20) if least else (1, 2, 2.5, 5, 10, 20)) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) + 0.0 for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there is room."""
    powers = range(math.floor(math.log10(max(low, 1e-300))), math.ceil(math.log10(max(high, 1e-300))) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) <= most + 1:
            return found
    stride = -(-len(found) // most)
    return found[::stride]
