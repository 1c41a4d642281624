"""The demo's data, network and settings."""

from __future__ import annotations

import copy
import sys
from itertools import islice

import pytest
import torch
from geta.cli.demo_data import load_digits, shift
from geta.cli.demo_result import relative_difference
from geta.cli.demo_settings import DemoSettings, parse_bits
from torch import nn

import geta
from geta.errors import ConfigError, GetaError
from geta.recipes.nets.resnet import ResNet, resnet20


def test_the_split_is_fixed_stratified_and_complete():
    first, second = load_digits(), load_digits()
    assert torch.equal(first.test_images, second.test_images)
    assert (len(first.train_labels), len(first.test_labels)) == (1437, 360)
    shares = torch.bincount(first.test_labels) / (torch.bincount(first.test_labels) + torch.bincount(first.train_labels))
    assert (shares - 0.2).abs().max() < 0.01
    every = torch.cat([first.train_images, first.test_images])
    assert every.shape == (1797, 1, 8, 8)
    assert (every.min(), every.max()) == (0.0, 1.0)


def test_batches_depend_on_the_seed_alone():
    digits = load_digits()
    torch.manual_seed(1)
    first = list(islice(digits.batches(64, seed=5), 30))
    torch.manual_seed(2)
    second = list(islice(digits.batches(64, seed=5), 30))
    other = next(digits.batches(64, seed=6))
    assert digits.steps_per_epoch(64) == 22
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], other[0])


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


def test_settings_name_every_problem_by_its_option():
    with pytest.raises(ConfigError, match=r"--epochs 0: .*; --sparsity 1\.5: "):
        DemoSettings.checked({"epochs": 0, "sparsity": 1.5})
    with pytest.raises(ConfigError, match="--colour"):
        DemoSettings.checked({"colour": "red"})
    assert DemoSettings.checked({"bits": (2, 4)}).bits == (2, 4)


@pytest.mark.parametrize("bits", [(8, 4), (1, 8), (4, 17)])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(ConfigError, match="bits"):
        DemoSettings.checked({"bits": bits})


def test_bits_are_a_range_or_one_number():
    assert parse_bits("4,8") == (4, 8)
    assert parse_bits("6") == (6, 6)
    for bad in ("", "4,", "a,b", "2,4,8"):
        with pytest.raises(ConfigError, match="--bits"):
            parse_bits(bad)


def test_missing_scikit_learn_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(GetaError, match=r"pip install 'geta\[demo\]'"):
        load_digits()


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
    assert relative_difference(model, tmp_path / "compact", x, torch.float64) < 1e-12
    assert torch.equal(model(x), before)  # the network itself is left alone
