"""Multiply-accumulates against PyTorch's own counter, and against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from geta.cost import cost, cost_of_graph
from geta.errors import BadModelError
from nets import NETS


def flops(model, args, kwargs=None):
    """FLOPs of a real run, with gradients and attention written out: the counter misses the fused kernels of the CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args, **(kwargs or {}))
    return counter.get_total_flops()


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs):
        return self.function(*inputs, *self.layers)


@pytest.mark.parametrize("name", NETS)
def test_every_network_agrees_with_the_flop_counter(name):
    model, args, kwargs = NETS[name]()
    counted = cost(model, args, kwargs)
    assert 2 * counted.macs == flops(model, args, kwargs) > 0
    assert counted.macs == sum(row.macs for row in counted.per_op)
    assert counted.params == sum(parameter.numel() for parameter in model.parameters())
    assert counted.bops == counted.macs * 32 * 32


X4, X3, X2 = torch.randn(2, 6, 8, 8), torch.randn(2, 5, 6), torch.randn(4, 6)
SINGLE = {
    "linear 2-D": (nn.Linear(6, 7), (X2,), 4 * 6 * 7),
    "linear 3-D": (nn.Linear(6, 7), (X3,), 2 * 5 * 6 * 7),
    "linear 4-D": (nn.Linear(8, 3, bias=False), (X4,), 2 * 6 * 8 * 8 * 3),
    "conv": (nn.Conv2d(6, 4, 3), (X4,), 2 * 4 * 6 * 6 * 6 * 9),
    "conv stride": (nn.Conv2d(6, 4, 3, stride=2, padding=1), (X4,), 2 * 4 * 4 * 4 * 6 * 9),
    "conv same padding": (nn.Conv2d(6, 4, 3, padding="same"), (X4,), 2 * 4 * 8 * 8 * 6 * 9),
    "conv dilated": (nn.Conv2d(6, 4, 3, dilation=2), (X4,), 2 * 4 * 4 * 4 * 6 * 9),
    "conv grouped": (nn.Conv2d(6, 4, 3, groups=2), (X4,), 2 * 4 * 6 * 6 * 3 * 9),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6), (X4,), 2 * 12 * 6 * 6 * 9),
    "conv1d": (nn.Conv1d(5, 4, 3), (X3,), 2 * 4 * 4 * 5 * 3),
    "conv3d": (nn.Conv3d(2, 3, 2), (torch.randn(1, 2, 4, 4, 4),), 3 * 3 * 3 * 3 * 2 * 8),
    "transposed": (nn.ConvTranspose2d(6, 4, 2, stride=2), (X4,), 2 * 6 * 64 * 4 * 4),
    "transposed grouped": (nn.ConvTranspose2d(6, 4, 3, groups=2), (X4,), 2 * 6 * 64 * 2 * 9),
    "matmul batched": (Lambda(lambda x: x @ x.transpose(1, 2)), (X3,), 2 * 5 * 6 * 5),
    "matmul broadcast": (Lambda(lambda x, y: x[:, None] @ y), (X3, torch.randn(3, 6, 2)), 2 * 3 * 5 * 6 * 2),
    "bmm": (Lambda(lambda x: torch.bmm(x, x.mT)), (X3,), 2 * 5 * 6 * 5),
    "addmm": (Lambda(lambda x: torch.addmm(x.sum(), x, x.t())), (X2,), 4 * 6 * 4),
    "baddbmm": (Lambda(lambda x: torch.baddbmm(x.sum(), x, x.mT)), (X3,), 2 * 5 * 6 * 5),
    "einsum": (Lambda(lambda x, y: torch.einsum("bsi,oi->bso", x, y)), (X3, torch.randn(7, 6)), 2 * 5 * 6 * 7),
    "einsum ellipsis": (Lambda(lambda x, y: torch.einsum("...i,io->...o", x, y)), (X3, torch.randn(6, 7)), 2 * 5 * 6 * 7),
    "einsum ellipsis both": (Lambda(lambda x, y: torch.einsum("...si,...ti->...st", x, y)), (X3, X3), 2 * 5 * 5 * 6),
    "einsum without arrow": (Lambda(lambda x, y: torch.einsum("bsi,bti", x, y)), (X3, X3), 2 * 5 * 5 * 6),
    "einsum of one": (Lambda(lambda x: torch.einsum("bsi->bis", x)), (X3,), 0),
    "einsum of three": (Lambda(lambda x, y: torch.einsum("bi,io,oj->bj", x, y, y.t())), (X2, torch.randn(6, 7)), None),
    "tensordot": (Lambda(lambda x, y: torch.tensordot(x, y, dims=1)), (X3, torch.randn(6, 7)), 2 * 5 * 6 * 7),
    "bilinear": (nn.Bilinear(6, 6, 3), (X2, X2), None),
    "attention": (Lambda(lambda x: F.scaled_dot_product_attention(x, x, x)), (torch.randn(2, 4, 5, 6),), 2 * 2 * 4 * 5 * 5 * 6),
    "cross attention": (
        Lambda(F.scaled_dot_product_attention),
        (torch.randn(2, 4, 5, 6), torch.randn(2, 4, 9, 6), torch.randn(2, 4, 9, 3)),
        2 * 4 * 5 * 9 * (6 + 3),
    ),
    "multi-head attention": (Lambda(lambda x, layer: layer(x, x, x)[0], nn.MultiheadAttention(6, 2, batch_first=True)), (X3,), None),
    "embedding": (nn.Embedding(10, 4), (torch.tensor([[1, 2, 3]]),), 0),
    "elementwise": (nn.ReLU(), (X2,), 0),
}


class Several(nn.Module):
    """All cases at once, each on its own inputs: one capture instead of thirty."""

    def __init__(self, models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, inputs):
        return [model(*args) for model, args in zip(self.models, inputs, strict=True)]


@pytest.fixture(scope="module")
def counted_macs():
    models, inputs = zip(*((model.eval(), list(args)) for model, args, _ in SINGLE.values()), strict=True)
    macs = dict.fromkeys(SINGLE, 0)
    for row in cost(Several(models), (list(inputs),)).per_op:
        macs[list(SINGLE)[int(row.name.split(".")[1])]] += row.macs
    return macs


@pytest.mark.parametrize("name", SINGLE)
def test_single_operators(name, counted_macs):
    model, args, macs = SINGLE[name]
    assert 2 * counted_macs[name] == flops(model, args)
    assert macs is None or counted_macs[name] == macs


def test_what_the_flop_counter_misses():
    """Matrix times vector, and recurrent layers: every weight once per step."""
    weight, vector = torch.randn(5, 6), torch.randn(6)
    assert cost(Lambda(torch.mv), (weight, vector)).macs == cost(Lambda(torch.matmul), (weight, vector)).macs == 30
    tensors = dict(nn.LSTM(6, 4, num_layers=2, batch_first=True).named_parameters())
    graph = torch.fx.Graph()
    x, state = graph.placeholder("x"), graph.placeholder("state")
    weights = [graph.get_attr(name) for name in tensors]
    graph.output(graph.call_function(torch.ops.aten.lstm.input, (x, [state, state], weights, True, 2, 0.0, False, False, True)))
    lstm = cost_of_graph(graph, tensors, [X3, torch.zeros(2, 2, 4)])
    assert lstm.macs == 2 * 5 * (16 * 6 + 16 * 4 + 16 * 4 + 16 * 4)
    assert {row.op for row in lstm.per_op} == {"lstm"}


def test_counts_are_for_the_batch_as_given():
    model, (x,), _ = NETS["resnet20_pad"]()
    one, two = cost(model, (x[:1],)), cost(model, (x,))
    assert two.macs == 2 * one.macs
    assert two.params == one.params
    assert one.input_shapes == ((1, 3, 32, 32),)


def test_rows_carry_the_users_module_paths():
    model, args, _ = NETS["resnet20_conv"]()
    names = [row.name for row in cost(model, args).per_op]
    assert names[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert names[-1] == "fc"
    assert "layer2.0.down.0" in names


def test_keyword_inputs_in_any_order():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)

        def forward(self, x, y, flag=True):
            return self.a(x) + self.b(y)

    x, y = torch.randn(2, 3), torch.randn(2, 5)
    expected = 2 * (12 + 20)
    assert cost(TwoInputs(), (), {"y": y, "x": x}).macs == expected
    assert cost(TwoInputs(), (x,), {"flag": False, "y": y}).macs == expected


def test_the_model_stays_as_it_was():
    model, args, _ = NETS["vgg7_bn"]()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost(model, args)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("args", [(), (X2, X2), (torch.randn(2, 9),), ("text",), X2])
def test_inputs_that_do_not_fit_are_refused(args):
    with pytest.raises(BadModelError):
        cost(nn.Linear(6, 7), args)


def test_any_arguments_are_passed_on():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 7)

        def forward(self, *tensors, **named):
            return self.layer(sum(tensors) + named["last"]["x"])

    assert cost(Sum(), (X2, X2), {"last": {"x": X2}}).macs == 4 * 6 * 7
