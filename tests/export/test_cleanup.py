"""Batch norms go into the layer before them, and the weights keep their codes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import geta
from geta.export.cleanup import Network, clean_up, copied


def fresh(*modules: nn.Module) -> nn.Sequential:
    """A network in evaluation mode whose norms have statistics, gains of both signs and one gain of zero."""
    torch.manual_seed(0)
    model = copy.deepcopy(nn.Sequential(*modules))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                with torch.no_grad():
                    module.weight[1] = 0.0
    return model.eval()


def small(model: nn.Module, x: torch.Tensor, *, bits: int | None = None, granularity: str = "tensor") -> geta.CompactModel:
    graph = geta.analyze(model, (x,))
    if bits is not None:
        geta.quantize(model, weights=geta.Bits(bits, bits), activations=None, granularity=granularity, exclude=())
        for quantizer in geta.quant.quantizers(model).values():
            quantizer.round_bits_()
    return geta.compact(model, graph).eval()


def run(network: Network, x: torch.Tensor) -> torch.Tensor:
    values = {}
    for node in network.graph.nodes:
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "get_attr":
            values[node] = network.read(node)
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
    return values[network.graph.output_node().args[0][0]]


LAYERS = {
    "conv1d": ([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)], (2, 3, 8)),
    "conv2d": ([nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()], (2, 3, 8, 8)),
    "same": ([nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)], (2, 3, 8, 8)),
    "conv3d": ([nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)], (2, 3, 4, 4, 4)),
    "grouped": ([nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)], (2, 4, 8, 8)),
    "transposed": ([nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)], (2, 3, 8, 8)),
    "linear": ([nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()], (5, 6)),
    "not affine": ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)], (2, 3, 8, 8)),
}


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_norm_behind_a_layer_is_folded(kind, bits):
    modules, shape = LAYERS[kind]
    x = torch.randn(shape)
    model = small(fresh(*modules), x, bits=bits)
    network = copied(model.programs["eval"].graph, model.tensors())
    assert clean_up(network) == ["1"]
    assert not any("batch_norm" in str(node.target) for node in network.graph.nodes)
    with torch.no_grad():
        assert (run(network, x) - model(x)).abs().max() < 1e-5 * model(x).abs().max()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_codes_stay_what_they_were_up_to_their_sign(granularity):
    x = torch.randn(2, 3, 8, 8)
    model = small(fresh(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x, bits=4, granularity=granularity)
    gain = model.tensors()["1.weight"].detach()
    network = copied(model.programs["eval"].graph, model.tensors())
    clean_up(network)
    before, after = model.tensors()["0.weight_codes"], network.tensors["0.weight_codes_folded"]
    assert after.dtype == torch.int8
    assert torch.equal(after, before * gain.sign().to(torch.int8).reshape(-1, 1, 1, 1))
    assert bool((network.tensors["0.weight_scale_folded"] > 0).all())


def test_what_is_used_twice_or_normalized_by_its_own_batch_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.own = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(3, track_running_stats=False)

        def forward(self, x):
            y = self.conv(self.own(x))
            return self.norm(y) + y

    x = torch.randn(2, 3, 8, 8)
    model = small(Twice().eval(), x)
    network = copied(model.programs["eval"].graph, model.tensors())
    assert clean_up(network) == []
    with torch.no_grad():
        assert torch.equal(run(network, x), model(x))


def test_dropout_is_dropped_and_nobody_elses_tensors_change():
    x = torch.randn(4, 6)
    model = small(fresh(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2)), x)
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    nodes = len(model.programs["eval"].graph.nodes)
    network = copied(model.programs["eval"].graph, model.tensors())
    clean_up(network)
    assert not any("dropout" in str(node.target) for node in network.graph.nodes)
    assert len(model.programs["eval"].graph.nodes) == nodes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.tensors().items())
