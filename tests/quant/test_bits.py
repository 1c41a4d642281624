"""Which bit widths may be asked for, which is the nearest allowed one, and which layers are the first and the last."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geta
from geta.errors import ConfigError
from geta.quant import Bits, FixedBits, end_layers, fixed_quantizers, quantizers
from geta.quant.bits import allowed_widths, nearest

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_ways_of_writing_bits() -> None:
    assert Bits.of((4, 8)) == Bits.of([4, 8]) == Bits(4, 8)
    assert Bits.of(8) == Bits(8, 8)
    assert Bits.of({8, 4}) == Bits.of(frozenset({4, 8})) == Bits(4, 8, (4, 8))
    assert Bits.of({4, 8}) != Bits(4, 8)
    assert Bits(4, 8).widths == (4, 5, 6, 7, 8)
    assert Bits.of({2, 4, 8}).widths == (2, 4, 8)
    assert str(Bits(4, 8)) == "4-8"
    assert str(Bits.of({4, 8})) == "4 or 8"


def test_a_set_without_gaps_is_a_range() -> None:
    assert Bits.of({4, 5, 6}) == Bits(4, 6)
    assert Bits.of({8}) == Bits(8, 8)
    assert hash(Bits.of({8})) == hash(Bits(8, 8))


@pytest.mark.parametrize("wrong", [set(), {4, 8.0}, {True, 4}, {1, 4}, {4, 17}, {"4"}, (4,), "48", None])
def test_impossible_bits_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="bits"):
        Bits.of(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("only", [(8, 4), (4, 4, 8), (4, 6), (5, 8), ()])
def test_a_list_that_contradicts_its_bounds_is_refused(only: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="must rise from lower = 4 to upper = 8"):
        Bits(4, 8, only)


def test_nearest_allowed_width() -> None:
    bits = torch.tensor([3.0, 5.9, 6.0, 6.1, 12.0])
    assert nearest(bits, allowed_widths([Bits.of({4, 8})], bits.device)).tolist() == [4, 4, 8, 8, 8]
    assert nearest(bits, allowed_widths([Bits(4, 8)], bits.device)).tolist() == [4, 6, 6, 6, 8]
    each = allowed_widths([Bits(2, 2), Bits.of({4, 8}), Bits(5, 5), Bits(4, 8), Bits.of({2, 16})], bits.device)
    assert nearest(bits, each).tolist() == [2, 4, 5, 6, 16]


def test_a_quantizer_rounds_to_its_set() -> None:
    model = geta.quantize(nn.Linear(3, 3), weights={3, 7}, activations=None, exclude=(), initial_bits=6)
    (quantizer,) = quantizers(model).values()
    assert "bits 3 or 7" in repr(quantizer)
    assert quantizer.round_bits_().tolist() == 7
    assert quantizer.bit_width().item() == pytest.approx(7, abs=1e-5)


class Net(nn.Module):
    """Layers in another order than they run in, two stems, two heads and a shared layer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.side = nn.Linear(4, 2), nn.Linear(4, 3)
        self.shared = nn.Conv2d(4, 4, 1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.shared(self.left(x) + self.right(x))
        x = self.shared(self.body(F.relu(x))).mean((2, 3))
        return self.head(x), self.side(x)


def test_end_layers_follow_the_data() -> None:
    graph = geta.analyze(Net(), (X,))
    assert end_layers(graph, exclude=()) == ["head", "side", "left", "right"]
    assert end_layers(graph, exclude="side") == ["head", "left", "right"]


def test_a_layer_that_is_excluded_is_still_the_last_one() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleDict({"stem": nn.Linear(3, 4), "middle": nn.Linear(4, 4), "head": nn.Linear(4, 2)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net["head"](F.relu(self.net["middle"](F.relu(self.net["stem"](x)))))

    graph = geta.analyze(Classifier(), (torch.randn(2, 3),))
    assert end_layers(graph) == ["net.stem"]
    assert end_layers(graph, exclude=()) == ["net.stem", "net.head"]


def test_other_bits_for_some_layers() -> None:
    model = Net()
    graph = geta.analyze(model, (X,))
    chosen = {**dict.fromkeys(end_layers(graph), 8), "body.*": {2, 4}, "si*": FixedBits(2)}
    geta.quantize(model, weights=(4, 8), activations=8, bits_of=chosen, calibration=[X])
    bits = {name: quantizer.bits for name, quantizer in quantizers(model).items()}
    assert {name: str(one) for name, one in bits.items() if "weight" in name} == {
        "head.weight": "8-8",
        "shared.weight": "4-8",
        "body.0.weight": "2 or 4",
        "left.weight": "8-8",
        "right.weight": "8-8",
    }
    assert str(bits["body.0:input"]) == "2 or 4"
    assert str(bits["shared:input"]) == "8-8"
    assert sorted(fixed_quantizers(model)) == ["side.weight", "side:input"]


def test_a_pattern_that_matches_nothing_is_refused_and_the_model_left_alone() -> None:
    model = Net()
    with pytest.raises(ConfigError, match=r"bits_of: 'haed' matches none of the 6 layers .* 'head'"):
        geta.quantize(model, activations=None, bits_of={"head": 8, "haed": 8})
    assert not quantizers(model)
    with pytest.raises(ConfigError, match=r"initial_bits: 6 is outside \[8, 16\], from the lower bound of bits_of\['head'\]"):
        geta.quantize(model, activations=None, bits_of={"head": 8}, initial_bits=6)
