"""Whole blocks leave the module tree: the eager product without them computes what the zeroed model computes."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geta
from depth_nets import NETS, WIDTH, Attention, Wrapped, mlp
from eager_checks import outputs, zeroed
from geta import BadModelError, CompactModel, compact_eager
from geta.graph.elements import IN_NO_LIST
from geta.subnet.comparison import max_difference
from geta.subnet.shorten import _places
from geta.subnet.shortening import Shortening
from nets import randomize

WITH_BLOCKS = {
    "basic blocks": ["2", "3"],
    "in place": ["2", "3"],
    "squeeze": ["1"],
    "convnext": ["2"],
    "pre-norm": ["1", "4"],
    "norm behind": ["1"],
    "parallel": ["1"],
    "adapter": ["2"],
}
"""Blocks that go; the first one of the two ResNets gets what no relu made."""


def without(graph: geta.DependencyGraph, *blocks: str) -> dict[str, Tensor]:
    return {family.name: torch.full((family.size,), family.is_layer and family.block in blocks) for family in graph.prunable_families}


def built(model: nn.Module, **options: Any) -> tuple[nn.Module, tuple[Tensor], geta.DependencyGraph]:
    randomize(model)
    args = (torch.randn(2, 5, WIDTH),)
    return model.eval(), args, geta.analyze(model, args, depth=True, **options)


def same(model: nn.Module, small: nn.Module, args: Any, graph: geta.DependencyGraph, selection: dict[str, Tensor]) -> None:
    reference = zeroed(model, graph, selection)
    changed = max_difference(outputs(model.eval(), args), outputs(reference.eval(), args))[1]
    assert changed > 1e-4, "nothing changed: the test would be empty"
    for training in (False, True):
        pair = [outputs(copy.deepcopy(one).train(training), args) for one in (reference, small)]
        assert max_difference(*pair)[1] <= 1e-4


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_elements_leave_their_sequential(name: str) -> None:
    model, args = NETS[name][0]()
    graph = geta.analyze(model, args, depth=True)
    blocks = WITH_BLOCKS[name]
    selection = {**graph.random_selection(0.4, seed=1), **{k: v for k, v in without(graph, *blocks).items() if k.endswith("(layer)")}}
    product = compact_eager(model, graph, selection)
    same(model, product.model, args, graph, selection)
    assert type(product.model) is type(model)
    assert [*product.model._modules] == [str(place) for place in range(len(model) - len(blocks))]
    assert product.changes[0] == f"the model itself: {len(model)} -> {len(model) - len(blocks)} (without {', '.join(blocks)})"
    assert product.max_difference <= 1e-4
    assert [*product.kept[f"{blocks[0]}{'' if name == 'adapter' else '.attn' if name == 'parallel' else '.branch'} (layer)"]] == []
    copied = copy.deepcopy(model)
    for block in reversed(blocks):
        del copied[int(block)]
    assert set(product.model.state_dict()) == set(copied.state_dict())


class Layer(nn.Module):
    """Attention and MLP; knows its place, has a number that happens to repeat, and one that isn't a place in all elements."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.attn, self.mlp = Wrapped(Attention()), Wrapped(mlp())
        self.attn.branch.layer_number = place
        self.place, self.odd, self.fixed = place, place % 2, 2

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


class Counting(nn.Module):
    """Loops over a number, and reads a table by the place that a layer says it has, as caches of keys and values are read."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers, self.depth, self.head = nn.ModuleList([Layer(place) for place in range(depth)]), depth, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = [0.0] * self.depth
        for number in range(self.depth):
            x = self.layers[number](x)
            seen[self.layers[number].place] = 1.0
        assert sum(seen) == self.depth
        return self.head(x)


def test_numbers_of_places_and_of_elements_follow() -> None:
    model, args, graph = built(Counting())
    selection = without(graph, "layers.0", "layers.2")
    product = compact_eager(model, graph, selection)
    same(model, product.model, args, graph, selection)
    small = product.model
    assert product.changes == [
        "layers: 4 -> 2 (without 0, 2)",
        "layers.0.place: 1 -> 0",
        "layers.0.attn.branch.layer_number: 1 -> 0",
        "layers.1.place: 3 -> 1",
        "layers.1.attn.branch.layer_number: 3 -> 1",
        "depth: 4 -> 2",
    ]
    assert [(layer.place, layer.odd, layer.fixed, layer.attn.branch.layer_number) for layer in small.layers] == [(0, 1, 2, 0), (1, 1, 2, 1)]
    assert (model.depth, len(model.layers), model.layers[3].place) == (4, 4, 3)
    assert torch.equal(small.layers[1].mlp.branch[1].weight, model.layers[3].mlp.branch[1].weight)
    again = geta.analyze(small, args, depth=True)
    assert [family.block for family in again.families if family.is_layer] == ["layers.0"] * 2 + ["layers.1"] * 2


def test_a_place_is_one_in_all_elements() -> None:
    """A number that equals it now and then, or in a single element, is none; another module in some elements is no hindrance."""
    layers = nn.ModuleList([nn.Module() for _ in range(3)])
    for place, layer in enumerate(layers):
        layer.part = nn.Identity() if place < 2 else nn.Tanh()
        layer.index, layer.half, layer.part.index, layer.flag = place, place // 2, place, bool(place)
    layers[2].single, layers[1].other, layers[2].other = 2, 1, 2
    model = nn.ModuleDict({"layers": layers})
    found = [str(change) for change in _places(model, Shortening.of(model, ["layers.0"]))]
    assert found == [
        "layers.0.index: 1 -> 0",
        "layers.0.other: 1 -> 0",
        "layers.0.part.index: 1 -> 0",
        "layers.1.index: 2 -> 1",
        "layers.1.other: 2 -> 1",
        "layers.1.part.index: 2 -> 1",
    ]


class Pairs(nn.Module):
    """Additions stand outside of the elements, and a layer is a list itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([Attention(), mlp()]) for _ in range(3)])
        self.stages = nn.ModuleList([nn.ModuleDict({"blocks": nn.Sequential(Wrapped(mlp()), Wrapped(mlp())), "down": nn.Linear(8, 8)})])
        self.stages.append(copy.deepcopy(self.stages[0]))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed in self.layers:
            x = x + attention(x)
            x = x + feed(x)
        for stage in self.stages:
            x = stage["down"](stage["blocks"](x))
        return self.head(x)


def test_lists_in_lists() -> None:
    model, args, graph = built(Pairs())
    blocks = [family.block for family in graph.families if family.is_layer]
    assert blocks == [f"layers.{i}" for i in (0, 0, 1, 1, 2, 2)] + [f"stages.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]
    selection = without(graph, "layers.1", "stages.0.blocks.1", "stages.1.blocks.0")
    product = compact_eager(model, graph, selection)
    same(model, product.model, args, graph, selection)
    assert [len(product.model.layers), *(len(stage["blocks"]) for stage in product.model.stages)] == [2, 1, 1]
    assert product.shortening.name("layers.2.0.out.weight") == "layers.1.0.out.weight"
    assert product.shortening.name("stages.1.blocks.1.branch.0.bias") == "stages.1.blocks.0.branch.0.bias"
    assert product.shortening.name("layers.1.0.out.weight") is None


def test_names_of_elements_stay_names_and_a_module_that_stands_there_twice_stays_twice() -> None:
    act = nn.Tanh()
    named = nn.Sequential()
    for name, module in {"first": nn.Linear(WIDTH, WIDTH), "act": act, "one": Wrapped(mlp()), "again": act, "two": Wrapped(mlp())}.items():
        named.add_module(name, module)
    model, args, graph = built(nn.Sequential(named, act, Wrapped(mlp()), act, nn.Linear(WIDTH, 3)))
    selection = without(graph, "0.one", "2")
    product = compact_eager(model, graph, selection)
    same(model, product.model, args, graph, selection)
    assert [*product.model._modules] == ["0", "1", "2", "3"]
    assert [*product.model[0]._modules] == ["first", "act", "again", "two"]
    assert product.model[0].act is product.model[0].again is product.model[1] is product.model[2]
    assert product.changes[:2] == ["0: 5 -> 4 (without one)", "the model itself: 5 -> 4 (without 2)"]


def test_what_is_left_of_a_block_is_named() -> None:
    model, _, graph = built(Counting())
    names = [family.name for family in graph.families if family.block == "layers.1"]
    assert names == ["layers.1.attn.branch (layer)", "layers.1.mlp.branch (layer)"]
    half = {**without(graph, "layers.3"), names[0]: torch.ones(1, dtype=torch.bool)}
    words = (
        "the eager product can leave out 'layers.1' of this Counting only as a whole: 'layers.1.attn.branch (layer)' is removed, but "
        "'layers.1.mlp.branch (layer)' is still there. Remove all branches of a block or none (training with uniform=True does), or use "
        "the graph product (geta.compact)"
    )
    with pytest.raises(BadModelError, match=f"^{re.escape(words)}$"):
        compact_eager(model, graph, half)
    small = geta.compact(model, graph, half, product="auto")
    assert isinstance(small, CompactModel)
    assert words in small.info.notes[-1]


class Flat(nn.Module):
    """Works on rows without their sequences, as OPT does, and gives them their shape back, or doesn't."""

    def __init__(self, *, back: bool) -> None:
        super().__init__()
        self.attn, self.mlp, self.back = Attention(), mlp(), back

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 5, WIDTH)
        x = x + self.attn(x)
        rows = x.reshape(-1, WIDTH)
        rows = rows + self.mlp(rows)
        return rows.view(x.shape) if self.back else rows


def test_another_shape_of_the_same_numbers_is_no_hindrance() -> None:
    model, args, graph = built(nn.Sequential(Flat(back=True), Flat(back=True), nn.Linear(WIDTH, 3)))
    selection = without(graph, "1")
    product = compact_eager(model, graph, selection)
    same(model, product.model, args, graph, selection)
    assert len(product.model) == 2
    _, _, graph = built(nn.Sequential(Flat(back=False), Flat(back=False), nn.Linear(WIDTH, 3)))
    assert {family.no_block for family in graph.families if family.is_layer and family.name.startswith("0")} == {
        "'0' gives another shape to what it gets"
    }


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.pair = Wrapped(mlp()), nn.ModuleList([mlp(), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x + self.pair[1](x + self.pair[0](x))


def test_a_branch_in_no_list_stays() -> None:
    """Nor do the unlike halves of a layer make a list that could do without one of them."""
    model, _, graph = built(Alone())
    layers = [family for family in graph.prunable_families if family.is_layer]
    assert [(family.block, family.no_block) for family in layers] == [("", IN_NO_LIST)] * len(layers)
    selection = {layers[0].name: torch.ones(1, dtype=torch.bool)}
    with pytest.raises(BadModelError, match=rf"'block\.branch \(layer\)' is part of none that can go: {re.escape(IN_NO_LIST)}\. Keep this"):
        compact_eager(model, graph, selection)


def test_a_norm_behind_the_sum_and_a_protected_branch_are_named() -> None:
    model, args = NETS["post-norm"][0]()
    graph = geta.analyze(model, args, depth=True)
    name = next(family.name for family in graph.prunable_families if family.is_layer)
    with pytest.raises(BadModelError, match=r"'1' still computes layer_norm at '1\.after' without its branches\. Keep this branch, or use"):
        compact_eager(model, graph, {name: torch.ones(1, dtype=torch.bool)})
    model, _, graph = built(Counting(), protect="layers.1.mlp")
    reasons = {family.name: family.no_block for family in graph.families if family.is_layer and not family.block}
    assert reasons["layers.1.attn.branch (layer)"].startswith("of 'layers.1' 'layers.1.mlp.branch (layer)' has to stay: it was protected")
    assert len(reasons) == 2


class Picked(Counting):
    """Reads a result in the middle by number, and changes what a layer does with its place."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * (1.0 + layer.place)
        return self.head(x)


def test_a_model_that_means_its_places_is_refused() -> None:
    model, _, graph = built(Picked())
    with pytest.raises(BadModelError, match=r"without layers\.1, where layers\.1\.place: 2 -> 1 and 3 more are set, it does not compute"):
        compact_eager(model, graph, without(graph, "layers.1"))


def test_quantizers_go_with_their_block() -> None:
    model, args, graph = built(Counting())
    geta.quantize(model, weights=geta.Bits(4, 8), activations=geta.Bits(8, 8), calibration=[args[0]])
    selection = without(graph, "layers.2")
    small = compact_eager(model, graph, selection).model
    same(model, small, args, graph, selection)
    before, after = geta.quant.quantizers(model), geta.quant.quantizers(small)
    assert set(after) == {name.replace("layers.3", "layers.2") for name in before if not name.startswith("layers.2")}
    assert torch.equal(after["layers.2.mlp.branch.1.weight"].d, before["layers.3.mlp.branch.1.weight"].d)
