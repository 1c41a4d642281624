"""torchao's tensors hold the integers that were trained, and compute what the quantized network computes."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geta
from export_nets import CASES, compacted, inputs
from geta.export.torchao import IntegerLinear, rows_linear, to_torchao

_BOTH = "int8 with int8 inputs"


class Mlp(nn.Module):
    """Layers of sizes that the 4-bit kernel takes, and one that it doesn't."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.odd = nn.Linear(32, 64), nn.Linear(64, 128), nn.Linear(128, 10)

    def forward(self, x):
        return self.odd(F.gelu(self.second(F.relu(self.first(x)))))


def quantized(build=Mlp, shape=(3, 5, 32), **options) -> tuple[nn.Module, torch.Tensor, geta.DependencyGraph]:
    geta.seed_everything(0)
    model, x = build().eval(), torch.randn(shape)
    graph = geta.analyze(model, (x,))
    options = {"weights": geta.Bits(4, 4), "calibration": [torch.randn(64, *shape[1:])], "exclude": ()} | options
    geta.quantize(model, **{name: value for name, value in options.items() if value is not ...})
    for quantizer in geta.quant.quantizers(model).values():
        quantizer.project_(quantizer.bits.lower, quantizer.bits.upper)
        quantizer.round_bits_()
    return model, x, graph


def close(found, expected, tolerance=1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_graph_product_computes_the_same(name, integers):
    model, x = compacted(name), inputs(CASES[name], 4)
    if name in ("12 bits", "upsampling"):
        with pytest.raises(geta.BadModelError, match=r"its codes need 12 bits|it is read by aten\.conv_transpose2d\.input in .2."):
            model.to_torchao(inputs=integers)
        return
    product = model.to_torchao(inputs=integers)
    weights = {f"{path}.weight" for path in product.converted} | set(product.floating)
    assert weights == {tensor for tensor in model.bits if ":" not in tensor}
    assert set(product.converted.values()) <= ({"int8", _BOTH} if integers else {"int8"})
    quantized_inputs = {path for path in product.converted if f"{path}:input" in model.bits}
    overflow = {path for path, note in product.notes.items() if "overflows" in note}
    assert {path for path, kind in product.converted.items() if kind == _BOTH} == (quantized_inputs - overflow if integers else set())
    with torch.no_grad():
        expected, found = (torch.utils._pytree.tree_leaves(one(x)) for one in (model, product.model))
    for mine, theirs in zip(expected, found, strict=True):
        # sums in another order: a rounding step behind them may flip
        assert close(theirs, mine, 0.03 if any(":" in tensor for tensor in model.bits) else 1e-5)


def test_tensors_hold_our_codes_and_scales():
    model = compacted("weights only, per channel")
    product = model.to_torchao()
    for path in product.converted:
        tensor = product.model.get_parameter(f"graph.net.{path}.weight")
        assert type(tensor.data).__name__ == "Int8Tensor"
        assert torch.equal(tensor.qdata, model.tensors()[f"{path}.weight_codes"])
        assert torch.equal(tensor.scale, model.tensors()[f"{path}.weight_scale"])


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_eager_product_keeps_its_classes(granularity):
    model, x, graph = quantized(activations=None, calibration=..., granularity=granularity)
    halves = {family.name: torch.arange(family.size) % 4 == 0 for family in graph.families if family.name in ("first", "second")}
    eager = geta.compact(model, graph, halves, product="eager")
    before = copy.deepcopy(eager.state_dict())
    product = geta.to_torchao(eager)
    assert product.converted == {"first": "int8", "second": "int8", "odd": "int8"}
    assert (product.floating, product.notes) == ({}, {})
    assert type(product.model) is Mlp
    assert type(product.model.first) is nn.Linear
    quantizer = eager.first.parametrizations.weight[0]
    assert torch.equal(product.model.first.weight.qdata, quantizer.codes(eager.first.parametrizations.weight.original))
    assert torch.equal(product.model.first.weight.dequantize(), eager.first.weight)
    with torch.no_grad():
        assert close(product.model(x), eager(x))
        assert close(copy.deepcopy(product.model)(x), eager(x))
    with torch.inference_mode():
        assert close(product.model(x), eager(x))
    assert all(torch.equal(value, before[name]) for name, value in eager.state_dict().items())
    assert not geta.quant.quantizers(product.model)


@pytest.mark.parametrize("options", [{}, {"weights": geta.FixedBits(8), "activations": geta.FixedBits(8)}, {"nonlinear": True}])
def test_integer_inputs_are_exact(options):
    model, x, _ = quantized(**options)
    if "nonlinear" in options:
        with torch.no_grad():
            for quantizer in geta.quant.quantizers(model).values():
                quantizer.t.fill_(0.9)
                quantizer.round_bits_()
    product = to_torchao(model, inputs=True)
    assert product.converted == dict.fromkeys(("first", "second", "odd"), _BOTH)
    assert type(product.model.second) is IntegerLinear
    with torch.no_grad():
        for path in product.converted:  # layer by layer, so that no rounding step of a later layer comes in
            mine, theirs = model.get_submodule(path), product.model.get_submodule(path)
            given = 3 * torch.randn(6, 7, mine.in_features)
            given = given.abs() if path == "second" else given
            assert close(theirs(given), mine(given))
            assert close(theirs(given[0, 0]), mine(given[0, 0]))
        assert close(product.model(x), model(x), 0.03)


def test_int4_where_the_kernel_takes_it():
    model, x, graph = quantized(activations=None, calibration=...)
    product = to_torchao(model, int4=True)
    assert product.converted == {"first": "int4", "second": "int4", "odd": "int8"}
    assert product.notes == {"odd": "no int4: 10 x 128 is no multiple of 16 x 32"}
    with torch.no_grad():
        assert close(product.model(x), model(x))
    small = geta.compact(model, graph).to_torchao(int4=True)
    assert small.converted == product.converted
    with torch.no_grad():
        assert close(small.model(x), model(x))
    wide, x, _ = quantized(weights=geta.Bits(8, 8), activations=None, calibration=...)
    product = to_torchao(wide, int4=True)
    assert set(product.converted.values()) == {"int8"}
    assert product.notes["first"] == "no int4: its weight has more than 4 bits"


def test_what_is_not_converted_is_named_and_computes_as_before():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 11, bias=False)
            self.head.weight = self.embed.weight
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, ids):
            x = self.mix(self.embed(ids))
            return self.head(x + self.attention(x, x, x, need_weights=False)[0])

    geta.seed_everything(0)
    model, ids = Tied().eval(), torch.randint(0, 11, (2, 6))
    geta.quantize(model, weights=geta.FixedBits(6), activations=None, exclude=())
    product = to_torchao(model)
    assert product.converted == {"mix": "int8"}
    assert product.floating["head"] == "it is shared by embed.weight and head.weight"
    assert "of a Embedding" in product.floating["embed"]
    assert "NonDynamicallyQuantizableLinear" in product.floating["attention.out_proj"]
    assert "attention.in_proj_weight" in product.floating
    with torch.no_grad():
        assert close(product.model(ids), model(ids))


def test_a_layer_whose_kernel_overflows_keeps_floating_point_products(monkeypatch):
    model, x, _ = quantized(weights=geta.FixedBits(8), activations=geta.FixedBits(8))
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: real(a, b).clamp(-20_000, 20_000))
    product = to_torchao(model, inputs=True)
    assert set(product.converted.values()) == {"int8"}
    assert product.notes["first"].startswith("no int8 inputs: torchao's kernel overflows on this processor")
    with torch.no_grad():
        assert close(product.model(x), model(x), 0.03)


def test_rows_linear_takes_any_number_of_dimensions():
    weight, bias = torch.randn(4, 3), torch.randn(4)
    for shape in ((3,), (2, 3), (2, 5, 3)):
        x = torch.randn(shape)
        assert torch.allclose(rows_linear(x, weight, bias), F.linear(x, weight, bias))


def test_errors(monkeypatch):
    with pytest.raises(geta.BadModelError, match="there is no quantized weight"):
        to_torchao(nn.Linear(3, 3))
    with monkeypatch.context() as patch:
        real = importlib.util.find_spec
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else real(name, *rest))
        with pytest.raises(geta.ConfigError, match=r"pip install 'geta\[torchao\]'"):
            to_torchao(Mlp())
    product = compacted("perceptron").to_torchao()
    with pytest.raises(geta.BadModelError, match="no training graph"):
        product.model.train()
