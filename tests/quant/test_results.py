"""Quantizers on the results of convolutions that no other quantizer meets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import geta


class Block(nn.Module):
    """conv - bn - relu - conv - bn, added to its input, then a ReLU."""

    def __init__(self, channels: int, relu: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = relu

    def forward(self, x):
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.block = Block(8, nn.ReLU())
        self.last = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.last(self.block(self.stem(x))).mean((2, 3)))


def quantized(**options) -> tuple[nn.Module, geta.DependencyGraph, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 1, 8, 8)
    graph = geta.analyze(model, (x,))
    geta.quantize(model, calibration=[x], exclude=(), results_of=graph, **options)
    return model, graph, x


def names(model: nn.Module) -> list[str]:
    return [name for name in geta.quant.quantizers(model) if name.endswith(":output")]


def test_results_that_meet_no_quantizer_get_one():
    model, _, _ = quantized()
    # conv1 is followed by conv2's own input quantizer; a ReLU that runs twice can't hold one, so the batch norm does
    assert names(model) == ["stem.2:output", "block.bn2:output", "last:output"]
    signs = {name: quantizer.signed for name, quantizer in geta.quant.quantizers(model).items()}
    assert (signs["stem.2:output"], signs["block.bn2:output"]) == (False, True)


def test_without_a_graph_there_are_none():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 1, 8, 8)
    geta.quantize(model, calibration=[x], exclude=())
    assert names(model) == []


def test_excluded_layers_and_float_activations_get_none():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 1, 8, 8)
    graph = geta.analyze(model, (x,))
    geta.quantize(model, calibration=[x], exclude=("block*",), results_of=graph)
    assert names(model) == ["stem.2:output", "last:output"]
    model = Net()
    geta.quantize(model, activations=None, exclude=(), results_of=geta.analyze(model, (x,)))
    assert names(model) == []


def test_they_quantize_what_comes_out():
    model, _, x = quantized(weights=geta.Bits(3, 8), activations=geta.Bits(3, 3), initial_bits=3)
    quantizer = model.block.bn2.output_quantizer
    seen = []
    model.block.bn2.register_forward_hook(lambda _module, _args, result: seen.append(result))
    model.eval()(x)
    codes = seen[0] / quantizer.d
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert codes.abs().max() <= 3.01


def test_they_are_trained_projected_compacted_and_saved(tmp_path):
    model, graph, x = quantized()
    optimizer = geta.QASSO(
        torch.optim.SGD(model.parameters(), lr=0.05),
        graph,
        sparsity=0.5,
        weight_bits=(4, 8),
        activation_bits=(8, 8),
        schedule=geta.Schedule(24),
    )
    for _ in range(24):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    optimizer.check()
    small = geta.compact(model.eval(), graph)
    assert small.bits["block.bn2:output"] == 8
    small.save(tmp_path / "small")
    again = geta.load(tmp_path / "small")
    assert torch.equal(again.eval()(x), small.eval()(x))
    same = geta.analyze(model, (x,))
    assert [(family.name, family.size) for family in same.prunable_families] == [(f.name, f.size) for f in graph.prunable_families]


def test_a_name_that_is_taken_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 1, 8, 8)
    graph = geta.analyze(model, (x,))
    model.last.output_quantizer = nn.Identity()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(geta.ConfigError, match="'last' already has an attribute 'output_quantizer'"):
        geta.quantize(model, calibration=[x], exclude=(), results_of=graph)
    assert [name for name, _ in model.named_modules()] == before
    assert not geta.quant.quantizers(model)


def test_values_that_are_not_finite_name_the_result():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 1, 8, 8)
    graph = geta.analyze(model, (x,))
    with torch.no_grad():
        model.last.bias.fill_(float("inf"))
    with pytest.raises(geta.ConfigError, match="the output of 'last' had infinite"):
        geta.quantize(model, calibration=[x], exclude=("head",), results_of=graph)
