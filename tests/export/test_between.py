"""Clamps and paddings between layers and quantizers: where they may move, and where they may not."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geta
from geta.export.between import ACTIVATIONS, zero_padding
from geta.export.cleanup import clean_up, copied
from geta.export.parity import parity
from geta.quant import fixed_quantizers, quantizers


class Net(nn.Module):
    """A convolution before something, and one behind it."""

    def __init__(self, between, kind: type[nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.first, self.second, self.between = kind(3, 8, 3, padding=1), kind(8, 4, 3), between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def small(model: nn.Module, x: torch.Tensor, *, quantized: bool = True, **options) -> geta.CompactModel:
    graph = geta.analyze(model.eval(), (x,))
    if quantized:
        geta.quantize(model, **{"weights": 8, "activations": 8, "calibration": [x], "exclude": (), "results_of": graph} | options)
        for quantizer in quantizers(model).values():
            if hasattr(quantizer, "round_bits_"):
                quantizer.round_bits_()
    return geta.compact(model, graph).eval()


def paddings(model: geta.CompactModel) -> list[list[int]]:
    """Those that stay after the clean-up."""
    network = copied(model.programs["eval"].graph, model.tensors())
    clean_up(network)
    return [found for node in network.graph.nodes if (found := zero_padding(node)) is not None]


def operators(model: geta.CompactModel, folder) -> Counter[str]:
    model.export_onnx(folder / "model.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "model.onnx").graph.node)


FOLDED = {
    "both ends": lambda x: F.pad(x, (1, 1, 2, 2)),
    "one dimension": lambda x: F.pad(x, (1, 1)),
    "nothing": lambda x: F.pad(x, (0, 0, 0, 0)),
    "a module": nn.ZeroPad2d(1),
    "all dimensions named": lambda x: F.pad(x, (1, 1, 1, 1, 0, 0)),
    "twice": lambda x: F.pad(F.pad(x, (1, 1)), (0, 0, 1, 1)),
}
KEPT = {
    "one end": lambda x: F.pad(x, (0, 1, 0, 1)),
    "channels": lambda x: F.pad(x, (0, 0, 0, 0, 0, 1))[:, :8],
    "negative": lambda x: F.pad(x, (-1, -1, -1, -1)),
}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", [*FOLDED, *KEPT])
def test_equal_padding_at_both_ends_is_the_convolutions_own(kind, quantized, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7)
    model = small(Net((FOLDED | KEPT)[kind]), x, quantized=quantized)
    assert bool(paddings(model)) == (kind in KEPT)
    found = parity(model, [torch.randn(2, 3, 7, 7)])
    assert found.largest_step < 1.01
    assert found.output < 1e-5


@pytest.mark.parametrize("mode", ["ones", "reflect"])
def test_other_paddings_stay_where_they_are(mode, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7)
    model = small(Net(lambda x: F.pad(x, (1, 1, 1, 1), value=1.0) if mode == "ones" else F.pad(x, (1, 1, 1, 1), mode="reflect")), x)
    assert operators(model, tmp_path)["Pad"] == 1
    assert parity(model, [torch.randn(2, 3, 7, 7)]).output < 1e-5


def test_a_padding_that_something_else_reads_stays():
    class Shared(Net):
        def forward(self, x):
            padded = F.pad(self.first(x), (1, 1, 1, 1))
            return self.second(padded), padded.sum((2, 3))

    torch.manual_seed(0)
    assert paddings(small(Shared(None), torch.randn(2, 3, 7, 7), quantized=False)) == [[1, 1, 1, 1]]


def test_fixed_quantizers_with_a_zero_let_padding_pass(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7)
    model = small(Net(FOLDED["both ends"]), x, weights=geta.FixedBits(8), activations=geta.FixedBits(8))
    assert paddings(model) == []
    assert parity(model, [torch.randn(2, 3, 7, 7)]).largest_step < 1.01


def test_one_dimension():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9)
    model = small(Net(lambda x: F.pad(x, (2, 2)), nn.Conv1d), x)
    assert paddings(model) == []
    assert parity(model, [torch.randn(2, 3, 9)]).output < 1e-5


CLAMPS = {
    "relu6": F.relu6,
    "relu6 in place": lambda x: F.relu6(x, inplace=True),
    "hardtanh": nn.Hardtanh(-0.25, 0.5),
    "clamp": lambda x: x.clamp(-0.5, 0.25),
    "from below": lambda x: x.clamp(min=-0.25),
    "twice": lambda x: x.clamp(-1, 0.5).clamp(-0.25, 1),
    "and padding": lambda x: F.pad(x.clamp(-0.5, 0.25), (0, 1, 0, 1)),
}


@pytest.mark.parametrize("range_of_quantizer", [0.1, 0.4, 3.0])
@pytest.mark.parametrize("kind", CLAMPS)
def test_clamps_act_on_codes(kind, range_of_quantizer, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7)
    model = Net(CLAMPS[kind])
    graph = geta.analyze(model.eval(), (x,))
    geta.quantize(model, weights=8, activations=8, calibration=[x], exclude=(), results_of=graph)
    assert not [name for name in quantizers(model) if name == "first:output"]  # the next input's quantizer is enough
    with torch.no_grad():
        quantizer = quantizers(model)["second:input"]
        factor = range_of_quantizer / float(quantizer.q_m)
        quantizer.q_m.mul_(factor)
        quantizer.d.mul_(factor)
    for quantizer in quantizers(model).values():
        quantizer.round_bits_()
    compact = geta.compact(model, graph).eval()
    found = parity(compact, [3 * torch.randn(2, 3, 7, 7)])
    assert found.largest_step < 1.01
    assert found.output < 1e-5
    report = compact.export_onnx(tmp_path / "model.onnx")
    assert report.floating == {}
    assert [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type in ("Max", "Min", "Relu")] == []


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_quantizing_twice_with_the_same_numbers_is_quantizing_once(equal, fixed):
    class Twice(Net):
        def forward(self, x):
            x = self.first(x)
            return self.second(x), x

    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7)
    model = Twice(None).eval()
    graph = geta.analyze(model, (x,))
    bits = geta.FixedBits(8) if fixed else 8
    geta.quantize(model, weights=bits, activations=bits, calibration=[x], exclude=(), results_of=graph)
    found = quantizers(model) if not fixed else fixed_quantizers(model)
    for quantizer in found.values() if not fixed else ():
        quantizer.round_bits_()
    first, second = found["first:output"], found["second:input"]
    with torch.no_grad():
        for own, other in zip(second.parameters(), first.parameters(), strict=True):
            own.copy_(other if equal else other * 1.25)
    compact = geta.compact(model, graph, {}).eval()
    network = copied(compact.programs["eval"].graph, compact.tensors())
    clean_up(network)
    assert sum(node.target in ACTIVATIONS for node in network.graph.nodes) == (3 if equal else 4)
    assert parity(compact, [torch.randn(2, 3, 7, 7)]).output < 1e-5


def test_a_clamp_without_zero_among_its_values_stays_in_floats(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7)
    model = small(Net(lambda x: x.clamp(0.25, 1.0)), x)
    report = model.export_onnx(tmp_path / "model.onnx")
    assert report.floating == {"first": "its result isn't quantized, which integer convolutions need"}
    assert parity(model, [torch.randn(2, 3, 7, 7)]).output < 1e-5
