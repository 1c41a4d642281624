"""Values that a compact model keeps between calls without gradients: never those of earlier weights or parameters."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import geta
from geta.quant import native_status, quantizers
from geta.subnet import inference
from geta.subnet.model import CompactModel

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def compact_model(**options: bool) -> CompactModel:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(first=nn.Linear(6, 12), act=nn.ReLU(), second=nn.Linear(12, 8), tanh=nn.Tanh(), top=nn.Linear(8, 4)))
    graph = geta.analyze(model, (X,))
    geta.quantize(model, weights=geta.Bits(4, 8), activations=geta.Bits(8, 8), calibration=[(X,)])
    for quantizer in quantizers(model).values():
        quantizer.round_bits_()
    return geta.compact(model, graph, {}, **options)


def lean_and_plain(small: nn.Module) -> tuple[Tensor, Tensor]:
    """What the model computes without gradients, and by the program that keeps nothing."""
    with torch.no_grad():
        lean = small(X)
    return lean, small(X).detach()


def through_data(tensor: Tensor) -> None:
    tensor.data.mul_(2)


def through_shared_memory(tensor: Tensor) -> None:
    array = tensor.detach().numpy()
    array *= 2


@pytest.mark.parametrize("change", [through_data, through_shared_memory])
@pytest.mark.parametrize(
    "name", ["top.weight_codes", "top.weight_scale", "first.bias", "second.input_quantizer.d", "top.input_quantizer.q_m"]
)
def test_changes_that_no_version_counts_are_seen(name: str, change: object) -> None:
    small = compact_model()
    tensor = small.tensors()[name]
    with torch.no_grad():
        if name.endswith("codes"):
            tensor.clamp_(-60, 60)  # twice as much still fits into int8
        if name.endswith("q_m"):
            tensor.mul_(0.1)
    before = lean_and_plain(small)[0]
    version = tensor._version
    change(tensor)  # type: ignore[operator]
    assert tensor._version == version
    lean, plain = lean_and_plain(small)
    assert not torch.equal(plain, before)
    assert torch.equal(lean, plain)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("integers", [True, False])
def test_a_fused_optimizer_between_two_evaluations(make: type, integers: bool) -> None:
    small = compact_model(integers=integers)
    optimizer = make(small.parameters(), lr=0.05, fused=True)
    for _ in range(3):
        before = lean_and_plain(small)[0]
        optimizer.zero_grad()
        small(X).square().sum().backward()
        lean_and_plain(small)
        optimizer.step()
        lean, plain = lean_and_plain(small)
        assert not torch.equal(plain, before)
        assert torch.equal(lean, plain)


def test_unchanged_weights_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_status().used, native_status()
    computed = []
    compute = inference.dequantize_values
    monkeypatch.setattr(inference, "dequantize_values", lambda codes, *rest: computed.append(codes) or compute(codes, *rest))
    small = compact_model()
    with torch.no_grad():
        first = small(X)
        made = len(computed)
        assert made >= 2
        assert torch.equal(small(X), first)
    with torch.inference_mode():
        assert torch.equal(small(X), first)
    assert len(computed) == made


def test_a_kept_weight_that_somebody_wrote_to_is_computed_again() -> None:
    once = inference._remembering_weights()
    codes, scale = torch.arange(-4, 4, dtype=torch.int8), torch.tensor(0.5)
    first = once(codes, scale, 4)
    assert once(codes, scale, 4) is first
    first.data.zero_()
    assert once(codes, scale, 4).tolist() == [value / 2 for value in range(-4, 4)]


def test_without_kernels_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference.native, "fingerprint", lambda *tensors: None)
    once = inference._remembering_weights()
    codes, scale = torch.arange(-4, 4, dtype=torch.int8), torch.tensor(0.5)
    assert once(codes, scale, 4) is not once(codes, scale, 4)
