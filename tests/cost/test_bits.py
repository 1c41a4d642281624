"""Bit operations and bytes: bits are found through moves and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geta.quant
from geta.cost import cost, cost_of_graph
from geta.errors import BadModelError, UnsupportedOpError
from geta.quant.ops import step_size
from nets import NETS

geta_ops = torch.ops.geta


def quantized(x, bits, signed=True):
    """Fake-quantize to `bits` over the range [-2, 2]."""
    q_m, t = torch.tensor(2.0), torch.tensor(1.0)
    return geta_ops.fake_quantize(x, step_size(bits, q_m, t, signed), q_m, t, signed, True, [])


class Net(nn.Module):
    """conv with quantized weights behind some operator."""

    def __init__(self, move):
        super().__init__()
        self.move = move
        self.layer = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        return F.conv2d(self.move(quantized(x, 8)), quantized(self.layer.weight, 4))


X = torch.randn(2, 4, 4, 4)
KEEPS = {
    "nothing": lambda x: x,
    "shuffle": lambda x: x.view(2, 2, 2, 4, 4).transpose(1, 2).reshape(2, 4, 4, 4),
    "flip and roll": lambda x: x.flip(1).roll(1, 1),
    "slice and cat": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
    "split": lambda x: torch.cat(torch.split(x, [1, 3], 1)[::-1], 1),
    "chunk": lambda x: torch.cat(x.chunk(2, 1), 1),
    "relu and pooling": lambda x: F.max_pool2d(F.relu(x), 2),
    "zero padding": lambda x: F.pad(x, (1, 1, 1, 1)),
    "index": lambda x: x[:, torch.tensor([3, 2, 1, 0])],
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
}
LOSES = {
    "scaling": lambda x: x * 0.5,
    "bias": lambda x: x + 0.1,
    "mean": lambda x: F.avg_pool2d(x, 2),
    "sigmoid": torch.sigmoid,
    "other padding": lambda x: F.pad(x, (1, 1, 1, 1), value=0.3),
    "half of it": lambda x: torch.cat([x[:, :2], x[:, 2:] * 0.5], 1),
    "residual": lambda x: x + x,
}


@pytest.fixture(scope="module")
def rows():
    """The cost of every case, from one capture of all of them."""
    moves = {**KEEPS, **LOSES}

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(Net(move) for move in moves.values())

        def forward(self, x):
            return [net(x) for net in self.nets]

    counted = cost(Several(), (X,)).per_op
    assert [row.name for row in counted] == [f"nets.{number}" for number in range(len(moves))]
    return dict(zip(moves, counted, strict=True))


@pytest.mark.parametrize("name", KEEPS)
def test_moves_keep_the_bits(name, rows):
    assert (rows[name].weight_bits, rows[name].activation_bits) == (4.0, 8.0)
    assert rows[name].bops == rows[name].macs * 4 * 8 > 0


@pytest.mark.parametrize("name", LOSES)
def test_arithmetic_loses_them(name, rows):
    assert (rows[name].weight_bits, rows[name].activation_bits) == (4.0, 32.0)


def test_products_of_activations_use_both_sides():
    class Attention(nn.Module):
        def forward(self, x):
            q, k, v = quantized(x, 8), quantized(x, 6), quantized(x, 4)
            return F.scaled_dot_product_attention(q, k, v), q @ k.mT

    x = torch.randn(2, 2, 5, 3)
    scores, values, product = cost(Attention(), (x,)).per_op
    assert (scores.activation_bits, scores.weight_bits) == (8.0, 6.0)
    assert (values.activation_bits, values.weight_bits) == (32.0, 4.0)
    assert (product.activation_bits, product.weight_bits) == (8.0, 6.0)
    assert scores.bops == scores.macs * 48


def test_the_weight_is_told_from_the_activation_on_either_side():
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            return quantized(self.weight, 4) @ quantized(x, 8)

    (row,) = cost(Left(), (torch.randn(2, 5, 6),)).per_op
    assert (row.weight_bits, row.activation_bits) == (4.0, 8.0)


def test_quantize_shows_in_bops_and_bytes():
    model, (x,), _ = NETS["resnet20_pad"]()
    dense = cost(model, (x,))
    geta.quant.quantize(model, weights=geta.quant.Bits(4, 8), activations=geta.quant.Bits(8, 8), calibration=[x])
    with torch.no_grad():
        for quantizer in geta.quant.quantizers(model).values():
            quantizer.d.copy_(step_size(4 if quantizer.kind == "weight" else 8, quantizer.q_m, quantizer.t, quantizer.signed))
    four = cost(model, (x,))
    assert {(row.weight_bits, row.activation_bits) for row in four.per_op} == {(4.0, 8.0)}
    ratios = four.relative_to(dense)
    assert ratios["macs"] == ratios["params"] == 1.0
    assert ratios["bops"] == 4 * 8 / 32**2
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    others = dense.weight_bytes - 4 * weights
    activation_quantizers = sum(1 for name in geta.quant.quantizers(model) if name.endswith(":input"))
    assert four.weight_bytes == weights // 2 + others + 20 * 4 + activation_quantizers * 3 * 4


def test_per_channel_bits_are_averaged():
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    geta.quant.quantize(model, weights=geta.quant.Bits(4, 8), activations=None, granularity="channel", exclude=(), initial_bits=8)
    quantizer = geta.quant.quantizers(model)["0.weight"]
    widths = torch.tensor([4.0, 4.0, 8.0, 6.0]).view(4, 1)
    with torch.no_grad():
        quantizer.d.copy_(step_size(widths, quantizer.q_m, quantizer.t, True))
    counted = cost(model, (torch.randn(2, 6),))
    assert counted.per_op[0].weight_bits == pytest.approx(5.5, abs=1e-4)
    assert counted.weight_bytes == 24 * 5.5 / 8 + 0.5 + 4 * 4
    assert counted.params == 24


def test_integer_weights_of_a_compact_graph():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example"] = {"shape": [2, 6], "dtype": "float32"}
    codes, scale = graph.get_attr("fc.weight_codes"), graph.get_attr("fc.weight_scale")
    weight = graph.call_function(geta_ops.dequantize.default, (codes, scale, 5))
    y = graph.call_function(torch.ops.aten.linear.default, (x, weight, graph.get_attr("fc.bias")))
    y.meta["module_path"] = "fc"
    graph.output((y,))
    tensors = {
        "fc.weight_codes": torch.ones(3, 6, dtype=torch.int8),
        "fc.weight_scale": torch.tensor(0.1),
        "fc.bias": nn.Parameter(torch.zeros(3)),
    }
    counted = cost_of_graph(graph, tensors)
    (row,) = counted.per_op
    assert (row.name, row.op, row.macs, row.weight_bits, row.activation_bits) == ("fc", "linear", 36, 5.0, 32.0)
    assert counted.params == 18 + 3
    assert counted.weight_bytes == 12 + 4 + 12  # 18 * 5 bits, one scale, three biases
    assert counted.input_shapes == ((2, 6),)
    assert cost_of_graph(graph, tensors, [torch.zeros(7, 6)]).macs == 7 * 18


def test_a_graph_without_example_or_tensor_is_refused():
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"),))
    with pytest.raises(BadModelError, match="pass example inputs"):
        cost_of_graph(graph, {})
    with pytest.raises(BadModelError, match="takes 1 inputs, 2 were given"):
        cost_of_graph(graph, {}, [X, X])
    other = torch.fx.Graph()
    other.output((other.get_attr("w"),))
    with pytest.raises(BadModelError, match="'w'"):
        cost_of_graph(other, {})


def test_shapes_that_depend_on_values_are_refused():
    graph = torch.fx.Graph()
    chosen = graph.call_function(torch.ops.aten.sum.default, (graph.placeholder("x"),))
    chosen = graph.call_function(torch.ops.aten.item.default, (chosen,))
    chosen.meta["module_path"] = "router"
    graph.output((chosen,))
    with pytest.raises(UnsupportedOpError, match="router"):
        cost_of_graph(graph, {}, [X])


def test_numbers_read_from_constants_are_computed():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.ops.aten.item.default, (graph.get_attr("size"),))
    flat = graph.call_function(torch.ops.aten.reshape.default, (x, [-1, size]))
    graph.output((graph.call_function(torch.ops.aten.linear.default, (flat, graph.get_attr("w"))),))
    tensors = {"size": torch.tensor(8), "w": nn.Parameter(torch.zeros(3, 8))}
    assert cost_of_graph(graph, tensors, [X]).macs == X.numel() * 3


@pytest.mark.parametrize("bits", [None, 8])
def test_tied_tensors_count_once(bits):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.table.weight
            self.first, self.second = nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(6, affine=False)
            self.second.running_mean = self.first.running_mean

        def forward(self, ids):
            return self.head(self.second(self.first(self.table(ids))))

    model = Tied().eval()
    if bits is not None:
        geta.quant.quantize(model, weights=(4, 8), activations=None, exclude=(), initial_bits=bits)
    counted = cost(model, (torch.tensor([1, 2, 3]),))
    statistics = 3 * 6 * 4 + 2 * 8
    assert counted.params == 60
    assert counted.weight_bytes == statistics + (60 * 4 if bits is None else 60 + 4)
    assert [row.weight_bits for row in counted.per_op] == [bits or 32.0]
