"""The quantizer of fixed width: levels, values and gradients by the formulas, attachment, checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from geta.errors import BadModelError, CheckpointError, ConfigError
from geta.quant import (
    DGE,
    DSQ,
    STE,
    Bits,
    FixedBits,
    FixedQuantizer,
    Fourier,
    Surrogate,
    fixed_quantizers,
    lsq_codes,
    quantize,
    quantizers,
)

BITS = [1, 1.58, 2, 3, 4, 8]
EVERY = [
    pytest.param(FixedBits(bits), signed, id=f"{bits}-{'signed' if signed else 'unsigned'}") for bits in BITS for signed in (True, False)
]
SURROGATES: list[Surrogate] = [STE(), Fourier(), DSQ(), DGE()]


def levels(bits: FixedBits, signed: bool) -> tuple[int, int, int]:
    return (bits.width, *bits.bounds(signed=signed))


def slope(r: float, surrogate: Surrogate) -> float:
    """S(r) through the other operator, whose slopes `test_surrogates_compared.py` holds against the formulas."""
    x = torch.tensor(4.0 + r, dtype=torch.float64, requires_grad=True)
    one = torch.tensor(1.0, dtype=torch.float64)
    y = torch.ops.geta.fake_quantize(x, one, 8 * one, one, True, True, surrogate.coefficients, surrogate.kind)
    return float(torch.autograd.grad(y, x)[0])


def expected(x: float, g: float, scale: float, bits: FixedBits, signed: bool, surrogate: Surrogate, shared: int) -> dict[str, float]:
    """Value and gradients of one element by the formulas."""
    low, high = bits.bounds(signed=signed)
    v = x / scale
    binary = bits.bits == 1 and signed
    inside = low <= v <= high
    code = (1 if v >= 0 else -1) if binary else round(min(max(v, low), high))
    r = (v - code) / 2 if binary else v - code
    return {
        "code": code,
        "value": code * scale,
        "dx": g * slope(r, surrogate) if inside else 0.0,
        "ds": g * (code - v if inside else code) / math.sqrt(shared * high),
    }


def operator(x: Tensor, g: Tensor, scale: Tensor, bits: FixedBits, signed: bool, surrogate: Surrogate) -> tuple[Tensor, Tensor, Tensor]:
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = torch.ops.geta.lsq_quantize(x, scale, *levels(bits, signed), surrogate.coefficients, surrogate.kind)
    return (y.detach(), *torch.autograd.grad(y, [x, scale], g))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
@pytest.mark.parametrize(("bits", "signed"), EVERY)
def test_values_and_gradients_follow_the_formulas(bits: FixedBits, signed: bool, surrogate: Surrogate) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=generator, dtype=torch.float64) * max(1.0, bits.bounds(signed=signed)[1] / 3)
    g = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    x[0, 0] = 0.0
    scale = 0.37
    y, dx, ds = operator(x, g, torch.tensor(scale, dtype=torch.float64), bits, signed, surrogate)
    wanted = [expected(a, b, scale, bits, signed, surrogate, 40) for a, b in zip(x.flatten().tolist(), g.flatten().tolist(), strict=True)]

    def column(key: str) -> Tensor:
        return torch.tensor([row[key] for row in wanted], dtype=torch.float64)

    torch.testing.assert_close(y.flatten(), column("value"))
    torch.testing.assert_close(dx.flatten(), column("dx"), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ds, column("ds").sum(), rtol=1e-9, atol=1e-12)
    codes = lsq_codes(x, torch.tensor(scale, dtype=torch.float64), *levels(bits, signed))
    assert codes.flatten().tolist() == column("code").tolist()


@pytest.mark.parametrize(("bits", "signed"), EVERY)
def test_per_channel_equals_per_tensor_applied_to_each_slice(bits: FixedBits, signed: bool) -> None:
    x, g = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    scale = torch.linspace(0.1, 0.6, 5, dtype=torch.float64).view(5, 1, 1)
    y, dx, ds = operator(x, g, scale, bits, signed, Fourier())
    assert ds.shape == (5, 1, 1)
    for i in range(5):
        one = operator(x[i], g[i], scale[i, 0, 0], bits, signed, Fourier())
        for whole, single in zip((y[i], dx[i], ds[i, 0, 0]), one, strict=True):
            torch.testing.assert_close(whole, single)


@pytest.mark.parametrize(("bits", "signed"), EVERY)
def test_the_code_book_is_exactly_the_levels(bits: FixedBits, signed: bool) -> None:
    low, high = bits.bounds(signed=signed)
    x = torch.arange(-600, 601) * 0.5
    codes = lsq_codes(x, torch.tensor(1.0), *levels(bits, signed))
    wanted = {-1, 1} if bits.bits == 1 and signed else set(range(low, high + 1))
    assert set(codes.tolist()) == wanted
    assert len(wanted) <= 2**bits.width


def test_levels_by_name() -> None:
    table = {bits: (FixedBits(bits).bounds(signed=True), FixedBits(bits).bounds(signed=False), FixedBits(bits).width) for bits in BITS}
    assert table[1] == ((-1, 1), (0, 1), 1)
    assert table[1.58] == ((-1, 1), (0, 2), 2)
    assert table[2] == ((-2, 1), (0, 3), 2)
    assert table[4] == ((-8, 7), (0, 15), 4)
    assert table[8] == ((-128, 127), (0, 255), 8)


@pytest.mark.parametrize("bits", [0, 9, 1.5, 2.0, "2", True, math.nan])
def test_other_widths_are_refused(bits: object) -> None:
    with pytest.raises(ConfigError, match=r"use a whole number from 2 to 8, 1 \(binary\) or 1\.58 \(ternary\)"):
        FixedBits(bits)  # type: ignore[arg-type]


def test_binary_has_no_zero_and_keeps_nan() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, math.inf, -math.inf, math.nan])
    y = torch.ops.geta.lsq_quantize(x, torch.tensor(0.5), 1, -1, 1, [])
    assert y[:-1].tolist() == [0.5, 0.5, 0.5, -0.5, 0.5, -0.5]
    assert bool(y[-1].isnan())


@pytest.mark.parametrize("levels", [(2, -2, 2), (1, -2, 1), (2, 1, 3), (2, -3, 0)])
def test_levels_that_make_no_sense_are_refused(levels: tuple[int, int, int]) -> None:
    with pytest.raises(RuntimeError, match="lack zero or don't fit"):
        torch.ops.geta.lsq_quantize(torch.randn(3), torch.tensor(1.0), *levels, [])
    with pytest.raises(RuntimeError, match="floating-point"):
        torch.ops.geta.lsq_quantize(torch.arange(3), torch.tensor(1.0), 2, -2, 1, [])


@pytest.mark.parametrize(("bits", "signed"), EVERY)
@pytest.mark.parametrize("shape", [(), (4, 1, 1)])
def test_registrations(bits: FixedBits, signed: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6)
    scale = torch.full(shape, 0.3)
    extra = ([5.0, 3.0], "dge", torch.tensor(0.5))
    call = (x.clone().requires_grad_(), scale.clone().requires_grad_(), *levels(bits, signed), *extra)
    assert set(torch.library.opcheck(torch.ops.geta.lsq_quantize.default, call).values()) == {"SUCCESS"}
    back = (torch.randn_like(x), x, scale, *levels(bits, signed), *extra)
    assert set(torch.library.opcheck(torch.ops.geta.lsq_quantize_backward.default, back).values()) == {"SUCCESS"}


NUMBERS = st.sampled_from([0.0, -0.0, 1e-30, 1e-6, -0.5, 1.0, 7.0, -100.0, 6e4, -3e38, 3e38, math.inf, -math.inf])


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    x=st.lists(NUMBERS | st.floats(-4.0, 4.0), max_size=8),
    scale=st.sampled_from([0.0, -1.0, 1e-45, 1e-30, 0.3, 4.0, 1e30, math.inf]),
    bits=st.sampled_from(BITS),
    signed=st.booleans(),
    surrogate=st.sampled_from(SURROGATES),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_finite_for_every_input(x, scale, bits, signed, surrogate, dtype) -> None:
    inputs = torch.tensor(x, dtype=dtype)
    y, dx, ds = operator(inputs, torch.linspace(-2, 2, len(x)).to(dtype), torch.tensor(scale), FixedBits(bits), signed, surrogate)
    assert y.dtype == dx.dtype == dtype
    assert all(bool(torch.isfinite(result).all()) for result in (y, dx, ds))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, g = torch.randn(2, 6, 7).to(dtype)
    y, dx, ds = operator(x, g, torch.tensor(0.2), FixedBits(3), True, Fourier())
    wide = operator(x.float(), g.float(), torch.tensor(0.2), FixedBits(3), True, Fourier())
    assert torch.equal(y, wide[0].to(dtype))
    assert torch.equal(dx, wide[1].to(dtype))
    assert torch.equal(ds, wide[2])


# ---- attachment ----------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


DATA = [torch.randn(32, 6, generator=torch.Generator().manual_seed(n)) for n in range(3)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_initial_scales(bits: float, granularity: str) -> None:
    model = net()
    weight = model[0].weight.detach().clone()
    hidden = torch.cat([model[:2](x) for x in DATA])
    quantize(model, weights=FixedBits(bits), activations=FixedBits(bits), calibration=DATA, exclude=(), granularity=granularity)
    found = fixed_quantizers(model)
    assert list(found) == ["0.weight", "0:input", "2.weight", "2:input"]
    assert [q.signed for q in found.values()] == [True, True, True, False]
    fixed = FixedBits(bits)
    factor = 1.0 if bits == 1 else 2 / math.sqrt(fixed.bounds(signed=True)[1])
    mean = weight.abs().mean() if granularity == "tensor" else weight.abs().mean(1, keepdim=True)
    torch.testing.assert_close(found["0.weight"].scale.detach(), factor * mean)
    unsigned = 2 / math.sqrt(fixed.bounds(signed=False)[1])
    torch.testing.assert_close(found["2:input"].scale.detach(), unsigned * hidden.abs().mean().detach())
    assert quantizers(model) == {}


def test_learned_and_fixed_widths_in_one_model() -> None:
    model = quantize(net(), weights=Bits(4, 8), activations=FixedBits(4), calibration=DATA, exclude=())
    assert list(quantizers(model)) == ["0.weight", "2.weight"]
    assert list(fixed_quantizers(model)) == ["0:input", "2:input"]
    with pytest.raises(ConfigError, match="already has 4 quantizers"):
        quantize(model, weights=FixedBits(2), activations=None)


def test_weights_that_are_zero_get_a_scale_above_zero() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[2].weight.zero_()
    quantize(model, weights=FixedBits(2), activations=None, exclude=(), granularity="channel")
    found = fixed_quantizers(model)
    assert bool((found["0.weight"].scale > 0).all())
    torch.testing.assert_close(found["2.weight"].scale.detach(), torch.full((3, 1), 2 * 8**-0.5))


def test_settings_without_effect_are_said() -> None:
    for settings_, word in (({"nonlinear": True}, "nonlinear"), ({"initial_bits": 8}, "initial_bits")):
        with pytest.warns(UserWarning, match=f"{word} has no effect"):
            quantize(net(), weights=FixedBits(2), activations=None, exclude=(), **settings_)
    with pytest.warns(UserWarning, match="percentile has no effect"):
        quantize(net(), weights=Bits(4, 8), activations=FixedBits(4), calibration=DATA, exclude=(), percentile=100.0)


def test_a_surrogate_of_another_kind_is_refused() -> None:
    class Cubic:
        kind, coefficients, mean_slope = "cubic", (1.0,), 1.0

    with pytest.raises(ConfigError, match="has the kind 'cubic'; known are fourier, dsq, dge"):
        quantize(net(), weights=FixedBits(2), activations=None, surrogate=Cubic())  # type: ignore[arg-type]


def test_checkpoints_know_the_levels() -> None:
    def build(bits: float) -> nn.Module:
        return quantize(net(), weights=FixedBits(bits), activations=FixedBits(bits), calibration=DATA, exclude=())

    saved = build(3)
    x = torch.randn(4, 6)
    other = quantize(net(), weights=FixedBits(3), activations=FixedBits(3), calibration=[-DATA[0].abs()], exclude=())
    fixed_quantizers(other)["2:input"].signed = True
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(x), saved(x))
    with pytest.raises(CheckpointError, match="saved with the integers -4 to 3 and has -2 to 1 here"):
        build(2).load_state_dict(saved.state_dict())
    with pytest.raises(CheckpointError, match="call quantize with the same FixedBits"):
        build(1.58).load_state_dict(build(1).state_dict())


def test_module_details() -> None:
    quantizer = FixedQuantizer("w", "weight", FixedBits(1.58), torch.tensor(0.5))
    x = torch.randn(5, 4)
    assert torch.equal(quantizer.codes(x) * quantizer.scale, quantizer(x) + 0.0)
    assert repr(quantizer) == "FixedQuantizer(w, weight, 1.58 bits, -1 to 1)"
    assert quantizer.right_inverse(x) is x
    quantizer.enabled = False
    assert quantizer(x) is x
    assert quantizer.to(torch.bfloat16).scale.dtype == torch.float32
    assert quantizer.double().scale.dtype == torch.float64


def test_a_copied_layer_is_noticed() -> None:
    model = quantize(net(), weights=FixedBits(2), activations=None, exclude=())
    model.append(FixedQuantizer("0.weight", "weight", FixedBits(2), torch.tensor(1.0)))
    with pytest.raises(BadModelError, match=r"two quantizers are called '0\.weight'"):
        fixed_quantizers(model)
