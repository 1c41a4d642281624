"""The digits, their augmentation and network, and what counts as a difference."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import geta
from geta.errors import GetaError
from geta.quant import FixedBits
from geta.recipes.augment_shift import Shift, shift
from geta.recipes.data.digits import DigitsData
from geta.recipes.measure import relative_difference
from geta.recipes.nets.resnet import ResNet, resnet20


def test_the_split_is_fixed_stratified_and_complete():
    first, second = DigitsData().load(), DigitsData().load()
    train, test = (split.batch(range(len(split))) for split in (first.train, first.test))
    assert torch.equal(test["images"], second.test.batch(range(360))["images"])
    assert (len(first.train), len(first.test)) == (1437, 360)
    shares = torch.bincount(test["labels"]) / (torch.bincount(test["labels"]) + torch.bincount(train["labels"]))
    assert (shares - 0.2).abs().max() < 0.01
    every = torch.cat([train["images"], test["images"]])
    assert every.shape == (1797, 1, 8, 8)
    assert (every.min(), every.max()) == (0.0, 1.0)


def test_shift_moves_whole_images_and_fills_with_zeros():
    image = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    moved = shift(image.expand(200, 1, 3, 3), torch.Generator().manual_seed(0))
    expected = {}
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            placed = torch.zeros(5, 5)
            placed[1 + down : 4 + down, 1 + right : 4 + right] = image[0, 0]
            expected[tuple(placed[1:4, 1:4].flatten().tolist())] = (down, right)
    found = {tuple(one.flatten().tolist()) for one in moved}
    assert found == set(expected)
    assert moved.is_contiguous()
    batch = {"images": image, "labels": torch.tensor([7])}
    assert Shift(most=1).apply(batch, torch.Generator().manual_seed(0))["labels"] is batch["labels"]


@pytest.mark.parametrize(("blocks", "layers"), [(3, 20), (9, 56)])
def test_the_network_has_as_many_layers_as_its_name_says(blocks, layers):
    model = ResNet(blocks)
    weighted = [name for name, p in model.named_parameters() if p.dim() >= 2 and "shortcut" not in name]
    assert len(weighted) == layers
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_network_is_the_published_one():
    # He et al. report 0.27 million parameters for ResNet-20 on 3-channel images with parameter-free shortcuts
    model = resnet20(channels=3)
    plain = sum(p.numel() for name, p in model.named_parameters() if "shortcut" not in name)
    assert plain == 269_722


def test_missing_scikit_learn_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(GetaError, match=r"pip install 'geta\[demo\]'"):
        DigitsData().load()


def test_a_weight_on_a_rounding_boundary_does_not_count_as_a_difference(tmp_path):
    # -2.5 steps in float32, a little less in float64: quantized anew with more digits it would get the code -3
    step, weight = 0.043650828301906586, -0.10912707448005676
    model, x = nn.Sequential(nn.Linear(4, 1, bias=False)), torch.eye(4)
    geta.quantize(model, weights=geta.Bits(4, 4), activations=None)
    quantizer = model[0].parametrizations.weight[0]
    with torch.no_grad():
        quantizer.d.fill_(step)
        quantizer.q_m.fill_(7 * step)
        model[0].parametrizations.weight.original.copy_(torch.tensor([[weight, step, -step, 3 * step]]))
    geta.compact(model, geta.analyze(model, (x[:2],))).save(tmp_path / "compact")

    anew = copy.deepcopy(model).double()(x.double())
    assert (anew - model(x)).abs().max() > step / 2
    before = model(x)
    assert relative_difference(model, geta.load(tmp_path / "compact"), ((x,), {}), torch.float64) < 1e-12
    assert torch.equal(model(x), before)  # the network itself is left alone


@pytest.mark.parametrize("weights", [FixedBits(2), geta.Bits(4, 4)])
def test_scales_per_block_are_compared_too(tmp_path, weights):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(5, 32)
    geta.quantize(model, weights=weights, activations=None, granularity="group", group_size=8)
    geta.compact(model, geta.analyze(model, (x[:2],))).save(tmp_path / "compact")
    assert relative_difference(model, geta.load(tmp_path / "compact"), ((x,), {}), torch.float64) < 1e-6
