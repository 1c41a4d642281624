"""Which parameters a batch normalization gates, and that zeroing the gate alone makes their channels zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import geta
from geta.recipes.nets.resnet import resnet20

IMAGES = (torch.randn(2, 3, 8, 8),)


class Branches(nn.Module):
    """One convolution whose result is also read past the normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.conv(x)
        return self.head(torch.relu(self.norm(made)) + made)


class Shared(nn.Module):
    """One convolution used twice, with two normalizations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.one(self.conv(x)) + self.two(self.conv(x.flip(0))))


def gated(model: nn.Module, inputs=IMAGES) -> set[str]:
    return {name for family in geta.analyze(model, inputs).families for name in family.gated}


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), IMAGES, {"0.weight", "0.bias"}),
        (chain(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), IMAGES, {"0.weight"}),
        (chain(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8)), IMAGES, {"0.weight", "0.bias"}),
        (chain(nn.Linear(4, 8), nn.BatchNorm1d(8)), (torch.randn(2, 4),), {"0.weight", "0.bias"}),
        (chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)), IMAGES, set()),
        (chain(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), IMAGES, set()),
        (chain(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)), IMAGES, set()),
        (Branches(), IMAGES, set()),
        (Shared(), IMAGES, set()),
    ],
    ids=["conv", "no bias", "transposed", "linear", "not affine", "group norm", "relu between", "read twice", "used twice"],
)
def test_what_is_gated(model, inputs, expected):
    model(*inputs)
    assert gated(model, inputs) == expected


def test_quantizers_in_between_change_nothing():
    model = resnet20()
    inputs = (torch.randn(2, 1, 8, 8),)
    plain = gated(model, inputs)
    geta.quantize(model, weights=geta.Bits(4, 8), activations=None)
    assert plain
    assert gated(model, inputs) == plain


def test_a_closed_gate_is_enough():
    """With gamma and beta at zero, whatever the gated rows are makes no difference, in both modes."""
    torch.manual_seed(0)
    model, inputs = resnet20(), (torch.randn(4, 1, 8, 8),)
    graph = geta.analyze(model, inputs)
    selection = graph.random_selection(0.5)
    rows = {name for family in graph.families for name in family.gated}
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    graph.zero_(model, selection)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for train in (True, False):
        model.load_state_dict(state)
        zeroed = model.train(train)(*inputs)
        model.load_state_dict(state)
        with torch.no_grad():
            for name in rows:
                model.get_parameter(name).copy_(kept[name])
        torch.testing.assert_close(model.train(train)(*inputs), zeroed)
