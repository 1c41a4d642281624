"""Surrogates and bit ranges: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from geta.errors import ConfigError
from geta.quant import STE, Bits, Fourier, Surrogate

SURROGATES = [STE(), Fourier(), Fourier(()), Fourier((0.1, 0.1)), Fourier((-0.2,))]


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_every_surrogate_keeps_the_contract(surrogate: Surrogate) -> None:
    assert isinstance(surrogate, Surrogate)
    assert hash(surrogate) == hash(type(surrogate)(*([surrogate.a] if isinstance(surrogate, Fourier) else [])))
    x = torch.linspace(-3.0, 3.0, 4001, dtype=torch.float64, requires_grad=True)
    parameters = [torch.tensor(number, dtype=torch.float64) for number in (0.25, 4.0, 1.0)]
    y = torch.ops.geta.fake_quantize(x, *parameters, True, True, surrogate.coefficients)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(slope).all()
    assert (slope > 0).all()


def test_fourier_is_small_on_integers_and_large_between() -> None:
    x = torch.tensor([1.0, 1.25, 1.5, 1.75, 2.0], requires_grad=True)
    parameters = [torch.tensor(number) for number in (1.0, 4.0, 1.0)]
    y = torch.ops.geta.fake_quantize(x, *parameters, True, True, Fourier((0.21,)).coefficients)
    (slope,) = torch.autograd.grad(y.sum(), x)
    peak = math.sqrt(2.0) * math.pi * 0.21
    wanted = [(1 - a) / (1 + a) for a in (peak, peak / math.sqrt(2.0), 0.0, peak / math.sqrt(2.0), peak)]
    assert slope.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("a", [(0.23,), (0.12, -0.12), (math.nan,), (math.inf,)])
def test_too_large_amplitudes_are_refused(a: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"surrogate: Fourier.*must be below 1/\(sqrt\(2\) pi\) = 0\.2251.*use smaller"):
        Fourier(a)


@pytest.mark.parametrize("a", [0.21, ("x",), None])
def test_amplitudes_must_be_numbers(a: object) -> None:
    with pytest.raises(ConfigError, match=r"surrogate: Fourier needs a sequence of numbers.*write Fourier\(\(0\.21,\)\)"):
        Fourier(a)  # type: ignore[arg-type]


def test_fourier_takes_any_sequence_and_is_frozen() -> None:
    surrogate = Fourier([0.1, 0])  # type: ignore[arg-type]
    assert surrogate == Fourier((0.1, 0.0))
    assert surrogate.coefficients == (0.1, 0.0)
    with pytest.raises(FrozenInstanceError):
        surrogate.a = ()  # type: ignore[misc]


def test_bits_from_what_users_write() -> None:
    assert Bits.of((4, 8)) == Bits.of([4, 8]) == Bits.of(Bits(4, 8)) == Bits(4, 8)
    assert Bits.of(8) == Bits(8, 8)
    assert (Bits(2, 16).lower, Bits(2, 16).upper) == (2, 16)


@pytest.mark.parametrize("pair", [(1, 8), (8, 4), (4, 17), (0, 0)])
def test_impossible_bits_are_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"bits: \(\d+, \d+\) is impossible; needed is 2 <= lower <= upper <= 16, e\.g\. Bits\(4, 8\)"):
        Bits(*pair)


@pytest.mark.parametrize("value", [(4.0, 8), (True, 8), (4, "8")])
def test_bits_are_whole_numbers(value: tuple[object, object]) -> None:
    with pytest.raises(ConfigError, match=r"bits: .* is not a whole number of bits; write e\.g\. Bits\(4, 8\)"):
        Bits(*value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [(4,), (4, 6, 8), "48", 8.0, None])
def test_bits_of_something_else_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"bits: .* is not a range of bit widths; write e\.g\. Bits\(4, 8\), \(4, 8\), \{4, 8\} or 8"):
        Bits.of(value)  # type: ignore[arg-type]
