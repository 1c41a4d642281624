"""Numbers as people read them in reports."""

from __future__ import annotations

import math

MINUS = "\u2212"
UNKNOWN = "\u2013"
NARROW = "\u00a0"
"""Between a number and its unit: a space at which no line is broken."""


def count(value: float, like: float | None = None) -> str:
    """1234567 -> "1,234,567"; in three digits with a letter where it, or `like` beside it, is ten million or more."""
    if max(abs(value), abs(like or 0)) >= 1e7:
        return magnitude(value)
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:,.2f}"


def magnitude(value: float) -> str:
    """1234567 -> "1.23 M"."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{_digits(value / size)}{NARROW}{letter}"
    return _digits(value)


def size(value: float) -> str:
    """Bytes: 45713 -> "45.7 kB"."""
    return f"{magnitude(value)}B" if abs(value) >= 1e3 else f"{value:,.0f}{NARROW}bytes"


def percent(share: float) -> str:
    """0.015 -> "1.50 %", with three digits that count."""
    if not math.isfinite(share):
        return UNKNOWN
    return f"{_digits(100 * share)}{NARROW}%"


def score(value: float | None, unit: str) -> str:
    """A metric with its unit; a dash where it is unknown."""
    if value is None:
        return UNKNOWN
    digits = f"{value:.2f}" if unit in ("%", "dB") or abs(value) >= 10 else f"{value:.4g}"
    return f"{digits}{NARROW}{unit}".strip().replace("-", MINUS)


def difference(value: float | None, unit: str) -> str:
    """A change of a metric, with its sign; percentages differ by points."""
    if value is None:
        return UNKNOWN
    digits = f"{value:+.2f}" if unit in ("%", "dB") or abs(value) >= 10 else f"{value:+.4g}"
    return f"{digits}{NARROW}{'points' if unit == '%' else unit}".strip().replace("-", MINUS)


def milliseconds(value: float) -> str:
    """0.5 -> "0.500 ms"."""
    return f"{_digits(value)}{NARROW}ms"


def duration(seconds: float) -> str:
    """3700 -> "1 h 2 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"


def plural(number: int, word: str, several: str = "") -> str:
    """1 -> "1 family", 2 -> "2 families"."""
    return f"{number:,} {word if number == 1 else several or word + 's'}"


def _digits(value: float) -> str:
    magnitude_ = abs(value)
    if magnitude_ == 0:
        return "0"
    return (
        f"{value:,.0f}"
        if magnitude_ >= 100
        else f"{value:.1f}"
        if magnitude_ >= 10
        else f"{value:.2f}"
        if magnitude_ >= 0.1
        else f"{value:.3g}"
    )
