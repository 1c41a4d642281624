"""Gradient surrogates for the rounding operator: how much of the gradient to x passes through it (backward only)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from geta.errors import ConfigError

LARGEST_SUM = 1.0 / (math.sqrt(2.0) * math.pi)
"""sum |a_k| must stay below it: only then is S positive and bounded."""


@runtime_checkable
class Surrogate(Protocol):
    """What `geta.quantize(surrogate=...)` needs."""

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Amplitudes a_0, a_1, ... of the odd harmonics in A (see `Fourier`); empty for S = 1."""
        ...


@dataclass(frozen=True)
class STE:
    """The straight-through estimator: S = 1."""

    @property
    def coefficients(self) -> tuple[float, ...]:
        return ()


@dataclass(frozen=True)
class Fourier:
    """S = (1 - A) / (1 + A),  A = sqrt(2) * pi * sum_k a_k cos((2k+1) * pi * r),  r = v - round(v),  v = c(x) / d.

    The staircase `round`, turned by 45 degrees, is a triangle wave; A is its truncated odd-harmonic series. S is small where
    v is close to an integer and large halfway between two. `Fourier(())` and `Fourier((0.0,))` are exactly `STE()`.

    a: amplitudes of the harmonics; the published default is one harmonic of 0.21.
    Raises ConfigError unless sum |a_k| < 1 / (sqrt(2) pi) = 0.2251 and all are finite.
    Source: StableQAT, arXiv 2601.19320.
    """

    a: tuple[float, ...] = (0.21,)

    def __post_init__(self) -> None:
        try:
            amplitudes = tuple(float(value) for value in self.a)
        except (TypeError, ValueError):
            raise ConfigError(f"surrogate: Fourier needs a sequence of numbers, got {self.a!r}; write Fourier((0.21,))") from None
        total = math.fsum(abs(value) for value in amplitudes)
        if not total < LARGEST_SUM:
            raise ConfigError(
                f"surrogate: Fourier{amplitudes} has sum |a_k| = {total:g}, which must be below 1/(sqrt(2) pi) = "
                f"{LARGEST_SUM:.4f} to keep the slope positive and bounded; use smaller amplitudes, e.g. (0.21,)"
            )
        object.__setattr__(self, "a", amplitudes)

    @property
    def coefficients(self) -> tuple[float, ...]:
        return self.a
