"""Gradient surrogates for the rounding operator: how much of the gradient to x passes through it (backward only).

All are even functions S(r) of the distance r = v - round(v) in [-1/2, 1/2] of a value from its integer. Their means over r differ,
and with them the mean size of the gradient: compare two of them at equal `learning rate * mean_slope`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np

from geta.errors import ConfigError

LARGEST_SUM = 1.0 / (math.sqrt(2.0) * math.pi)
"""sum |a_k| must stay below it: only then is S positive and bounded."""

SlopeKind = Literal["fourier", "dsq", "dge"]
KINDS: tuple[str, ...] = get_args(SlopeKind)
"""The formulas that `geta::fake_quantize` and `geta::lsq_quantize` know by name."""

_QUADRATURE_POINTS = 512


@runtime_checkable
class Surrogate(Protocol):
    """What `geta.quantize(surrogate=...)` needs."""

    @property
    def kind(self) -> SlopeKind:
        """Which formula the coefficients belong to."""
        ...

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The numbers of the formula; "fourier" without any, or with zeros alone, is S = 1."""
        ...

    @property
    def mean_slope(self) -> float:
        """The mean of S(r) over r uniform in [-1/2, 1/2]: the factor that S puts on the learning rate of x on average."""
        ...


@dataclass(frozen=True)
class STE:
    """The straight-through estimator: S = 1."""

    @property
    def kind(self) -> SlopeKind:
        return "fourier"

    @property
    def coefficients(self) -> tuple[float, ...]:
        return ()

    @property
    def mean_slope(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Fourier:
    """S = (1 - A) / (1 + A),  A = sqrt(2) * pi * sum_k a_k cos((2k+1) * pi * r),  r = v - round(v),  v = c(x) / d.

    The staircase `round`, turned by 45 degrees, is a triangle wave; A is its truncated odd-harmonic series. S is small where
    v is close to an integer and large halfway between two. `Fourier(())` and `Fourier((0.0,))` are exactly `STE()`.

    a: amplitudes of the harmonics; the published default is one harmonic of 0.21, whose mean slope is 0.302 only.
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
    def kind(self) -> SlopeKind:
        return "fourier"

    @property
    def coefficients(self) -> tuple[float, ...]:
        return self.a

    @property
    def mean_slope(self) -> float:
        """2 * mean of 1 / (1 + A) - 1, by Gauss-Legendre quadrature."""
        return _mean_fourier_slope(self.a)


@dataclass(frozen=True)
class DSQ:
    """S = k / (2 tanh(k/2)) * sech(k (1/2 - |r|))^2,  k = ln(2/alpha - 1): differentiable soft quantization.

    The slope of the soft staircase n + (1 + tanh(k w) / tanh(k/2)) / 2 between the integers n and n + 1, w = v - n - 1/2. It
    meets the integers, so that `mean_slope` is exactly 1. alpha -> 1 gives the straight line (STE), alpha -> 0 the hard step.

    alpha: 1 - tanh(k/2), how far from a hard step; S lies between k alpha (2 - alpha) / (2 (1 - alpha)) and k / (2 (1 - alpha)).
    Raises ConfigError unless 0 < alpha < 1.
    Source: DSQ, arXiv 1908.05033, equations 4 to 9 (with d for their Delta).
    Deviation: alpha is a constant here, not learned; only the slope is used, the forward pass stays the hard quantizer.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        alpha = _number("DSQ", "alpha", self.alpha)
        if not 1e-6 <= alpha <= 1.0 - 1e-6:
            raise ConfigError(f"surrogate: DSQ(alpha={alpha:g}) is outside [1e-6, 1 - 1e-6]; 0.2 is a good start, STE() is the limit of 1")
        object.__setattr__(self, "alpha", alpha)

    @property
    def kind(self) -> SlopeKind:
        return "dsq"

    @property
    def coefficients(self) -> tuple[float, ...]:
        return (self.alpha,)

    @property
    def mean_slope(self) -> float:
        return 1.0


@dataclass(frozen=True)
class DGE:
    """S = min((1/k) (1 - 2|r|)^(1/k - 1), clip): the differentiable gradient estimator.

    The slope of n + (1 + sgn(w) |2w|^(1/k)) / 2 between the integers n and n + 1, w = v - n - 1/2, whose pole at w = 0 is cut off.
    S is 1/k on integers and `clip` halfway between two; without the cut its mean would be 1. `DGE(1)` is exactly `STE()`.

    k:    degree of the power function, at least 1; larger is closer to the hard step.
    clip: upper bound of the slope, at least 1.
    Raises ConfigError for anything else.
    Source: FP4 training, arXiv 2501.17116, section 3.1 (k = 5, clip = 3).
    """

    k: float = 5.0
    clip: float = 3.0

    def __post_init__(self) -> None:
        for key, largest in (("k", 100.0), ("clip", 1e6)):
            value = _number("DGE", key, getattr(self, key))
            if not 1.0 <= value <= largest:
                raise ConfigError(f"surrogate: DGE({key}={value:g}) is outside [1, {largest:g}]; published are k=5, clip=3")
            object.__setattr__(self, key, value)

    @property
    def kind(self) -> SlopeKind:
        return "dge"

    @property
    def coefficients(self) -> tuple[float, ...]:
        return (self.k, self.clip)

    @property
    def mean_slope(self) -> float:
        """1 - y^(1/k) + clip * y,  y = (clip * k)^(-k / (k - 1)): where y = 1 - 2|r| is smaller, the slope is cut."""
        if self.k == 1.0:
            return 1.0
        cut = (self.clip * self.k) ** (-self.k / (self.k - 1.0))
        return 1.0 - float(cut ** (1.0 / self.k)) + self.clip * float(cut)


def is_identity(surrogate: Surrogate) -> bool:
    """Whether S = 1 everywhere, so that a strength has nothing to change."""
    return surrogate.kind == "fourier" and not any(surrogate.coefficients)


def _number(name: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"surrogate: {name}({key}={value!r}) needs a number")
    return float(value)


@lru_cache(maxsize=64)
def _mean_fourier_slope(amplitudes: tuple[float, ...]) -> float:
    """S is even, so half of the interval is enough; the node count is far above what the admissible amplitudes need."""
    if not any(amplitudes):
        return 1.0
    nodes, weights = _quadrature()
    residual = (nodes + 1.0) / 4.0
    series = sum(a_k * np.cos((2 * k + 1) * np.pi * residual) for k, a_k in enumerate(amplitudes)) / LARGEST_SUM
    return float(np.sum(weights / (1.0 + series)) - 1.0)


@lru_cache(maxsize=1)
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(_QUADRATURE_POINTS)
