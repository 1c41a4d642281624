"""The quantizer module: start values, projection, integer bits, state."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from geta.errors import CheckpointError
from geta.quant import Bits, Fourier, Quantizer, dequantize, step_size

SHAPES = [(), (5, 1, 1)]


def quantizer(shape: tuple[int, ...] = (), **settings: object) -> Quantizer:
    q_m = torch.linspace(0.5, 2.0, 5).view(shape) if shape else torch.tensor(0.7)
    return Quantizer("conv.weight", "weight", Bits(4, 8), q_m, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("initial_bits", [8, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_starts_at_the_initial_bits(shape: tuple[int, ...], initial_bits: int, signed: bool) -> None:
    module = quantizer(shape, initial_bits=initial_bits, signed=signed)
    assert module.d.shape == module.q_m.shape == module.t.shape == torch.Size(shape)
    torch.testing.assert_close(module.bit_width(), torch.full(shape, float(initial_bits)), atol=1e-3, rtol=0)
    assert torch.equal(module.t, torch.ones(shape))


def test_only_a_nonlinear_quantizer_trains_its_exponent() -> None:
    linear, nonlinear = quantizer(), quantizer(linear=False)
    x = torch.randn(4, 4)
    for module in (linear, nonlinear):
        module(x).square().sum().backward()
        assert module.d.grad is not None
        assert module.q_m.grad is not None
    assert linear.t.grad is None
    assert nonlinear.t.grad is not None
    assert float(nonlinear.t.grad) != 0.0


def test_forward_is_the_operator_with_its_settings() -> None:
    module = quantizer(signed=False, linear=False, surrogate=Fourier((0.2,)))
    x = torch.randn(4, 4, requires_grad=True)
    y = module(x)
    direct = torch.ops.geta.fake_quantize(x, module.d, module.q_m, module.t, False, False, [0.2])
    assert torch.equal(y, direct)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(direct.sum(), x)[0])
    assert torch.equal(dequantize(module.codes(x), module.d, 16), y)
    module.enabled = False
    assert module(x) is x


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_clamps_only_the_step(shape: tuple[int, ...]) -> None:
    module = quantizer(shape, linear=False)
    with torch.no_grad():
        module.t.mul_(1.2)
    q_m, t = module.q_m.clone(), module.t.clone()
    module.project_(4, 8)  # from 16 bits
    torch.testing.assert_close(module.bit_width(), torch.full(shape, 8.0))
    with torch.no_grad():
        module.d.mul_(1e4)
    module.project_(4, 8)
    torch.testing.assert_close(module.bit_width(), torch.full(shape, 4.0))
    with torch.no_grad():
        module.d.copy_(step_size(5.3, module.q_m, module.t, True))
    inside = module.d.clone()
    module.project_(4, 8)
    assert torch.equal(module.d, inside)
    assert torch.equal(module.q_m, q_m)
    assert torch.equal(module.t, t)


def test_projection_works_on_each_channel_by_itself() -> None:
    module = quantizer((5, 1, 1))
    with torch.no_grad():
        module.d.copy_(step_size(torch.tensor([3.0, 4.5, 6.0, 7.9, 12.0]).view(5, 1, 1), module.q_m, module.t, True))
    module.project_(4, 8)
    torch.testing.assert_close(module.bit_width().flatten(), torch.tensor([4.0, 4.5, 6.0, 7.9, 8.0]))
    widths = module.round_bits_()
    assert widths.dtype == torch.int64
    assert widths.flatten().tolist() == [4, 5, 6, 8, 8]  # the wider one of two that are equally near
    torch.testing.assert_close(module.bit_width(), widths.float())


@pytest.mark.parametrize(("start", "wanted"), [(2.0, 4), (4.4, 4), (4.6, 5), (7.51, 8), (16.0, 8)])
@pytest.mark.parametrize("signed", [True, False])
def test_rounding_gives_integer_bits_in_range(start: float, wanted: int, signed: bool) -> None:
    module = quantizer(signed=signed)
    with torch.no_grad():
        module.d.copy_(step_size(start, module.q_m, module.t, signed))
    assert int(module.round_bits_()) == wanted
    codes = module.codes(torch.linspace(-5.0, 5.0, 1001))
    assert int(codes.max()) == (2 ** (wanted - 1) - 1 if signed else 2**wanted - 1)


def test_state_dict_round_trip_carries_parameters_and_sign() -> None:
    source, target = quantizer(signed=False, initial_bits=8), quantizer(signed=True)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert target.signed is False
    x = torch.randn(50)
    assert torch.equal(source(x), target(x))
    assert all(isinstance(value, torch.Tensor) for value in source.state_dict().values())


def test_state_of_the_other_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'conv\.weight' was saved as nonlinear and is linear here; call quantize\(nonlinear=True\)"):
        quantizer().load_state_dict(quantizer(linear=False).state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_keep_their_quantizers_in_float32(dtype: torch.dtype) -> None:
    module = quantizer(initial_bits=8)
    d = module.d.clone()
    module.to(dtype)
    assert module.d.dtype == module.q_m.dtype == module.t.dtype == torch.float32
    assert torch.equal(module.d, d)
    assert module(torch.randn(3, 3, dtype=dtype)).dtype == dtype
    module.double()
    assert module.d.dtype == torch.float64
    assert module(torch.randn(3, 3, dtype=torch.float64)).dtype == torch.float64
    assert Quantizer("x", "weight", Bits(4, 8), torch.tensor(1.0, dtype=dtype)).d.dtype == torch.float32


def test_parameters_outside_their_domain_stay_usable() -> None:
    module = Quantizer("x", "weight", Bits(4, 8), torch.tensor(0.0))
    assert module.q_m.item() > 0.0
    with torch.no_grad():
        module.q_m.fill_(-1.0)
    module.project_(4, 8)
    assert torch.isfinite(module.d)
    assert 4 - 1e-4 <= module.bit_width().item() <= 8 + 1e-4
    assert torch.isfinite(module(torch.randn(10))).all()


def test_deep_copy_is_independent() -> None:
    module = quantizer(surrogate=Fourier((0.2,)))
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.d.mul_(2.0)
    assert not torch.equal(module.d, twin.d)
    assert (twin.name, twin.kind, twin.bits, twin.surrogate) == (module.name, module.kind, module.bits, module.surrogate)
    assert repr(module) == "Quantizer(conv.weight, weight, bits 4-8, signed, linear)"
