"""Integer codes: their range, their values, bit widths and steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geta.quant import bit_width, dequantize, fake_quantize, quantize_codes, step_size

WIDTHS = range(2, 9)


def limits(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("t", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("q_m", [1.0, 0.0371, 13.7])
def test_code_book_is_exactly_the_integers_in_range(bits: int, signed: bool, t: float, q_m: float) -> None:
    range_, exponent = torch.tensor(q_m), torch.tensor(t)
    d = step_size(bits, range_, exponent, signed)
    x = torch.linspace(-1.5 * q_m, 1.5 * q_m, 40001)
    x = torch.cat([x, torch.tensor([float("inf"), -float("inf"), q_m, -q_m, 0.0])])
    codes = quantize_codes(x, d, range_, exponent, signed, linear=t == 1.0)
    lowest, highest = limits(bits, signed)
    assert codes.dtype == torch.int32
    assert codes.unique().tolist() == list(range(lowest, highest + 1))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("shape", [(), (6, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantized_codes_equal_the_fake_quantized_tensor_bit_by_bit(
    bits: int, signed: bool, linear: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(6, 50, 30, generator=generator, dtype=dtype)
    q_m = 0.3 + 2.0 * torch.rand(shape, generator=generator, dtype=dtype)
    t = torch.ones_like(q_m) if linear else 0.5 + torch.rand(shape, generator=generator, dtype=dtype)
    d = step_size(bits, q_m, t, signed)
    quantized = fake_quantize(x, d, q_m, t, signed, linear, ())
    codes = quantize_codes(x, d, q_m, t, signed, linear=linear)
    storage = torch.int8 if signed else torch.uint8
    restored = dequantize(codes.to(storage), d, bits)
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.equal(quantized.view(integer), restored.view(integer))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    bits=st.integers(2, 16),
    q_m=st.floats(1e-6, 1e5),
    t=st.just(1.0) | st.floats(0.3, 3.0),
    signed=st.booleans(),
)
def test_widths_and_steps_are_inverse_and_codes_never_leave_their_range(bits: int, q_m: float, t: float, signed: bool) -> None:
    range_, exponent = torch.tensor(q_m), torch.tensor(t)
    d = step_size(bits, range_, exponent, signed)
    assert float(bit_width(d, range_, exponent, signed)) == pytest.approx(bits, abs=1e-4)
    x = torch.tensor([-q_m, q_m, 2 * q_m, -2 * q_m, 0.999 * q_m])
    for linear in (False, True) if t == 1.0 else (False,):
        codes = quantize_codes(x, d, range_, exponent, signed, linear=linear)
        lowest, highest = limits(bits, signed)
        assert int(codes.min()) == lowest
        assert int(codes.max()) == highest


def test_width_formulas() -> None:
    q_m, t = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    assert step_size(4, q_m, t, True).tolist() == pytest.approx([1.0 / 7.0, 4.0 / 7.0])
    assert step_size(4, q_m, t, False).tolist() == pytest.approx([1.0 / 15.0, 4.0 / 15.0])
    assert bit_width(torch.tensor(0.5), torch.tensor(1.5), torch.tensor(1.0), True).item() == pytest.approx(3.0)
    assert bit_width(torch.tensor(0.5), torch.tensor(1.5), torch.tensor(1.0), False).item() == pytest.approx(2.0)


def test_stacked_parameters_equal_the_single_ones() -> None:
    q_m, t = torch.tensor([0.7, 1.1, 3.0]), torch.tensor([1.0, 0.9, 1.4])
    signed, bits = torch.tensor([True, False, True]), torch.tensor([4, 8, 6])
    d = step_size(bits, q_m, t, signed)
    widths = bit_width(d, q_m, t, signed)
    for i in range(3):
        single = step_size(int(bits[i]), q_m[i], t[i], bool(signed[i]))
        torch.testing.assert_close(d[i], single)
        torch.testing.assert_close(widths[i], bit_width(single, q_m[i], t[i], bool(signed[i])))


def test_dequantize_dtypes_and_scale_gradient() -> None:
    codes = torch.tensor([[-7, 0, 7], [1, 2, 3]], dtype=torch.int8)
    scale = torch.tensor([[0.5], [0.25]], requires_grad=True)
    y = dequantize(codes, scale, 4)
    assert y.tolist() == [[-3.5, 0.0, 3.5], [0.25, 0.5, 0.75]]
    y.backward(torch.tensor([[1.0, 5.0, 2.0], [1.0, 1.0, 1.0]]))
    assert scale.grad is not None
    assert scale.grad.tolist() == [[7.0], [6.0]]
    half = dequantize(torch.tensor([127, -127], dtype=torch.int8), torch.tensor(0.01, dtype=torch.bfloat16), 8)
    assert half.dtype == torch.bfloat16
