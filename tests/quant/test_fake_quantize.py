"""The operator against the published formulas, written here once more as plain loops over Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import geta.quant.ops  # noqa: F401 - registers the operators
from geta.quant import STE, Fourier, fake_quantize

NO_SURROGATE: tuple[float, ...] = ()
QUANTIZERS = [
    pytest.param(signed, linear, id=f"{'signed' if signed else 'unsigned'}-{'linear' if linear else 'nonlinear'}")
    for signed in (True, False)
    for linear in (True, False)
]


def sign(value: float) -> float:
    return 0.0 if value == 0.0 else math.copysign(1.0, value)


def expected(x: float, g: float, d: float, q: float, t: float, signed: bool, a: tuple[float, ...]) -> dict[str, float]:
    """Value and gradients of one element by the formulas."""
    if not signed and x < 0.0:
        return {"value": 0.0, "dx": 0.0, "dd": 0.0, "dq": 0.0, "dt": 0.0}
    magnitude = min(abs(x), q) ** t
    u = magnitude / d
    v = sign(x) * magnitude / d
    r = v - round(v)
    big_a = math.sqrt(2.0) * math.pi * sum(a_k * math.cos((2 * k + 1) * math.pi * r) for k, a_k in enumerate(a))
    inside = abs(x) <= q
    if x == 0.0:
        dt = 0.0
    elif inside:
        dt = g * sign(x) * abs(x) ** t * math.log(abs(x))
    else:
        dt = g * sign(x) * q**t * math.log(q)
    return {
        "value": d * round(v),
        "dx": g * (1.0 - big_a) / (1.0 + big_a) if inside else 0.0,
        "dd": g * sign(x) * (round(u) - u),
        "dq": 0.0 if inside else g * sign(x) * t * q ** (t - 1.0),
        "dt": dt,
    }


def operator(
    x: Tensor, g: Tensor, parameters: list[Tensor], signed: bool, linear: bool, a: tuple[float, ...]
) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    leaves = [parameter.clone().requires_grad_() for parameter in parameters]
    y = torch.ops.geta.fake_quantize(x, *leaves, signed, linear, a)
    return y.detach(), list(torch.autograd.grad(y, [x, *leaves], g))


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    g = torch.randn(shape, generator=generator, dtype=dtype)
    x.view(-1)[0] = 0.0
    x.view(-1)[1] = 1.1
    x.view(-1)[2] = -1.1
    return x, g


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("a", [(), (0.21,), (0.1, -0.05, 0.04)])
@pytest.mark.parametrize(("signed", "linear"), QUANTIZERS)
def test_values_and_gradients_follow_the_formulas(signed: bool, linear: bool, a: tuple[float, ...], dtype: torch.dtype) -> None:
    x, g = sample((6, 11), dtype)
    d, q, t = 0.17, 1.1, 1.0 if linear else 1.3
    parameters = [torch.tensor(value, dtype=dtype) for value in (d, q, t)]
    d, q, t = (float(parameter) for parameter in parameters)
    y, (dx, dd, dq, dt) = operator(x, g, parameters, signed, linear, a)
    wanted = [expected(float(xi), float(gi), d, q, t, signed, a) for xi, gi in zip(x.view(-1), g.view(-1), strict=True)]
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}

    def column(key: str) -> Tensor:
        return torch.tensor([row[key] for row in wanted], dtype=dtype)

    torch.testing.assert_close(y.view(-1), column("value"), **tolerance)
    torch.testing.assert_close(dx.view(-1), column("dx"), **tolerance)
    torch.testing.assert_close(dd, column("dd").sum(), **tolerance)
    torch.testing.assert_close(dq, column("dq").sum(), **tolerance)
    torch.testing.assert_close(dt, torch.zeros_like(dt) if linear else column("dt").sum(), **tolerance)


@pytest.mark.parametrize(("signed", "linear"), QUANTIZERS)
@pytest.mark.parametrize("dim", [0, 1])
def test_per_channel_equals_per_tensor_applied_to_each_slice(signed: bool, linear: bool, dim: int) -> None:
    x, g = sample((5, 5, 3, 2))
    shape = [1, 1, 1, 1]
    shape[dim] = 5
    d = torch.linspace(0.05, 0.3, 5, dtype=torch.float64)
    q = torch.linspace(0.4, 2.0, 5, dtype=torch.float64)
    t = torch.ones(5, dtype=torch.float64) if linear else torch.linspace(0.7, 1.6, 5, dtype=torch.float64)
    y, gradients = operator(x, g, [p.view(shape) for p in (d, q, t)], signed, linear, (0.21,))
    for i in range(5):
        y_i, gradients_i = operator(x.select(dim, i), g.select(dim, i), [d[i], q[i], t[i]], signed, linear, (0.21,))
        if linear:
            assert torch.equal(y.select(dim, i), y_i)
        # pow and cos may differ in the last digit between the vectorised and the scalar path
        torch.testing.assert_close(y.select(dim, i), y_i)
        torch.testing.assert_close(gradients[0].select(dim, i), gradients_i[0])
        for whole, single in zip(gradients[1:], gradients_i[1:], strict=True):
            assert whole.shape == torch.Size(shape)
            torch.testing.assert_close(whole.view(-1)[i], single)


def test_parameters_of_different_shapes_each_get_their_own_sum() -> None:
    x, g = sample((4, 6))
    d, q, t = torch.full((4, 1), 0.2), torch.tensor(1.0), torch.full((1, 6), 1.2)
    _, (_, dd, dq, dt) = operator(x, g, [p.double() for p in (d, q, t)], True, False, ())
    wanted = [[expected(float(x[i, j]), float(g[i, j]), 0.2, 1.0, 1.2, True, ()) for j in range(6)] for i in range(4)]
    # 0.2 and 1.2 are float32 constants above, hence the tolerance
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(dd.view(-1), torch.tensor([sum(e["dd"] for e in row) for row in wanted]).double(), **tolerance)
    torch.testing.assert_close(dq, torch.tensor(sum(e["dq"] for row in wanted for e in row)).double(), **tolerance)
    columns = [sum(wanted[i][j]["dt"] for i in range(4)) for j in range(6)]
    torch.testing.assert_close(dt.view(-1), torch.tensor(columns).double(), **tolerance)


def value(x: float, d: float, q: float, t: float, signed: bool = True) -> float:
    tensors = [torch.tensor(number, dtype=torch.float64) for number in (x, d, q, t)]
    return float(torch.ops.geta.fake_quantize(*tensors, signed, False, ()))


@pytest.mark.parametrize("x", [-3.0, -0.62, -0.07, 0.3, 0.55, 2.5])
def test_step_gradient_is_the_finite_difference_of_the_rounded_part(x: float) -> None:
    """Nearby, round(u) is constant, so d * round(u) has slope round(u) in d; the gradient that STE sends through u = c / d adds -u."""
    d, q, t, h = 0.13, 1.0, 1.2, 1e-6
    numeric = (value(x, d + h, q, t) - value(x, d - h, q, t)) / (2 * h)
    u = math.copysign(min(abs(x), q) ** t, x) / d
    _, (_, dd, _, _) = operator(
        torch.tensor(x).double(), torch.tensor(1.0).double(), [torch.tensor(n).double() for n in (d, q, t)], True, False, ()
    )
    assert float(dd) == pytest.approx(numeric - u, abs=1e-6)


@pytest.mark.parametrize("x", [-3.0, 1.5, 7.0])
@pytest.mark.parametrize("signed", [True, False])
def test_range_and_exponent_gradients_are_finite_differences_of_the_shaped_value(x: float, signed: bool) -> None:
    """STE's gradients to q_m and t are those of c(x), which x_Q follows when its steps are far finer than the difference."""
    d, q, t = 1e-7, 1.3, 1.2
    h = 1e-3  # thousands of steps of d wide, so that the staircase is smooth at this scale
    _, (_, _, dq, dt) = operator(
        torch.tensor(x).double(), torch.tensor(1.0).double(), [torch.tensor(n).double() for n in (d, q, t)], signed, False, ()
    )
    assert float(dq) == pytest.approx((value(x, d, q + h, t, signed) - value(x, d, q - h, t, signed)) / (2 * h), abs=1e-3)
    assert float(dt) == pytest.approx((value(x, d, q, t + h, signed) - value(x, d, q, t - h, signed)) / (2 * h), abs=1e-3)


@pytest.mark.parametrize("x", [-0.9, -0.2, 0.4, 1.1])
def test_exponent_gradient_inside_the_range_is_a_finite_difference(x: float) -> None:
    d, q, t, h = 1e-7, 1.3, 0.8, 1e-3
    _, (_, _, dq, dt) = operator(
        torch.tensor(x).double(), torch.tensor(1.0).double(), [torch.tensor(n).double() for n in (d, q, t)], True, False, ()
    )
    assert float(dq) == 0.0
    assert float(dt) == pytest.approx((value(x, d, q, t + h) - value(x, d, q, t - h)) / (2 * h), abs=1e-3)


@pytest.mark.parametrize("surrogate", [Fourier(()), Fourier((0.0,)), Fourier((0.0, 0.0))])
@pytest.mark.parametrize(("signed", "linear"), QUANTIZERS)
def test_fourier_without_amplitude_is_ste_bit_by_bit(signed: bool, linear: bool, surrogate: Fourier) -> None:
    x, g = sample((9, 13), torch.float32)
    parameters = [torch.tensor(0.1), torch.tensor(0.9), torch.tensor(1.0 if linear else 0.8)]
    y_ste, ste = operator(x, g, parameters, signed, linear, STE().coefficients)
    y_fourier, fourier = operator(x, g, parameters, signed, linear, surrogate.coefficients)
    assert torch.equal(y_ste, y_fourier)
    assert all(torch.equal(left, right) for left, right in zip(ste, fourier, strict=True))


def test_surrogate_changes_only_the_gradient_of_x() -> None:
    x, g = sample((9, 13), torch.float32)
    parameters = [torch.tensor(0.1), torch.tensor(0.9), torch.tensor(1.2)]
    y_ste, ste = operator(x, g, parameters, True, False, ())
    y_fourier, fourier = operator(x, g, parameters, True, False, (0.21,))
    assert torch.equal(y_ste, y_fourier)
    assert not torch.allclose(ste[0], fourier[0])
    assert all(torch.equal(left, right) for left, right in zip(ste[1:], fourier[1:], strict=True))


def test_linear_agrees_with_nonlinear_at_exponent_one() -> None:
    x, g = sample((8, 8))
    parameters = [torch.tensor(number, dtype=torch.float64) for number in (0.11, 1.1, 1.0)]
    for signed in (True, False):
        y_linear, linear = operator(x, g, parameters, signed, True, (0.2,))
        y_power, power = operator(x, g, parameters, signed, False, (0.2,))
        torch.testing.assert_close(y_linear, y_power)
        for left, right in zip(linear[:3], power[:3], strict=True):
            torch.testing.assert_close(left, right)


def test_rounds_half_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    y = fake_quantize(x, torch.tensor(1.0), torch.tensor(4.0), torch.tensor(1.0), True, True, NO_SURROGATE)
    assert y.tolist() == [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("signed", "linear"), QUANTIZERS)
def test_half_types_are_computed_in_float32(signed: bool, linear: bool, dtype: torch.dtype) -> None:
    x, g = (tensor.to(dtype) for tensor in sample((6, 7), torch.float32))
    parameters = [torch.tensor(0.1), torch.tensor(0.9), torch.tensor(1.0 if linear else 1.3)]
    y, gradients = operator(x, g, parameters, signed, linear, (0.21,))
    y_wide, wide = operator(x.float(), g.float(), parameters, signed, linear, (0.21,))
    assert y.dtype == gradients[0].dtype == dtype
    assert torch.equal(y, y_wide.to(dtype))
    assert torch.equal(gradients[0], wide[0].to(dtype))
    assert all(torch.equal(left, right) for left, right in zip(gradients[1:], wide[1:], strict=True))


def test_memory_format_and_emptiness_are_kept() -> None:
    parameters = (torch.tensor(0.1), torch.tensor(1.0), torch.tensor(1.0))
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert fake_quantize(x, *parameters, True, True, NO_SURROGATE).is_contiguous(memory_format=torch.channels_last)
    y, gradients = operator(torch.zeros(0, 3), torch.zeros(0, 3), list(parameters), True, False, (0.2,))
    assert y.shape == (0, 3)
    assert [float(gradient) for gradient in gradients[1:]] == [0.0, 0.0, 0.0]


def test_integer_input_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"needs a floating-point tensor, got torch\.int64"):
        fake_quantize(torch.arange(3), torch.tensor(0.1), torch.tensor(1.0), torch.tensor(1.0), True, True, NO_SURROGATE)


NUMBERS = st.sampled_from([0.0, -0.0, 1e-30, -1e-30, 1e-6, 0.5, -0.5, 1.0, 7.0, -100.0, 6e4, -3e38, 3e38, math.inf, -math.inf])
PARAMETERS = st.sampled_from([0.0, -1.0, 1e-45, 1e-30, 1e-7, 1e-3, 0.3, 1.0, 4.0, 1e3, 1e30, math.inf])


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    x=st.lists(NUMBERS | st.floats(-4.0, 4.0), min_size=1, max_size=8),
    d=PARAMETERS,
    q=PARAMETERS,
    t=PARAMETERS | st.floats(0.1, 5.0),
    signed=st.booleans(),
    linear=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_finite_for_every_input(x: list[float], d: float, q: float, t: float, signed: bool, linear: bool, dtype: torch.dtype) -> None:
    inputs = torch.tensor(x, dtype=dtype)
    g = torch.linspace(-2.0, 2.0, len(x)).to(dtype)
    y, gradients = operator(inputs, g, [torch.tensor(number) for number in (d, q, t)], signed, linear, (0.21,))
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
