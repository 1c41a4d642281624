"""`uniform=True`: families that repeat across layers lose equal numbers of groups, in every optimizer and with budgets."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geta
from geta.errors import CheckpointError, ConfigError
from geta.graph.families import Family, Member, repeated
from geta.optim import HESSO, HESSOCRIC, QASSO, Budget, Schedule

STEPS = 16
SCHEDULE = Schedule(STEPS, warmup=2, projection=2, joint=8, projection_periods=1, joint_periods=3)
ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 3


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.relu(self.up(x)))


class Net(nn.Module):
    """Three equal blocks, one wider, and a layer that doesn't repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for width in (10, 10, 12, 10))
        self.other, self.head = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(F.relu(self.other(x)))


def build(optimizer: type, **settings):
    torch.manual_seed(0)
    model = Net()
    # unequal importance: without ties the layers would lose different numbers
    with torch.no_grad():
        for scale, layer in zip((0.02, 1.0, 0.5, 2.0), model.layers, strict=True):
            layer.up.weight.mul_(scale)
            layer.down.weight.mul_(scale)
    graph = geta.analyze(model, (ROWS,), protect=settings.pop("protect", ()))
    if optimizer is QASSO:
        geta.quantize(model, weights=(3, 8), activations=None, exclude=())
    return (
        model,
        graph,
        optimizer(torch.optim.AdamW(model.parameters(), lr=0.003), graph, schedule=SCHEDULE, saliency="magnitude", **settings),
    )


def train(model: nn.Module, optimizer, steps: int = STEPS) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(ROWS), LABELS).backward()
        optimizer.step()


def removed(optimizer) -> list[int]:
    """Groups that the blocks lose, and at the end those of the layer that doesn't repeat."""
    return [int(optimizer.selection[name].sum()) for name in (*(f"layers.{i}.up" for i in range(4)), "other")]


@pytest.mark.parametrize("optimizer", [QASSO, HESSO, HESSOCRIC])
def test_repeated_families_lose_equal_numbers(optimizer):
    model, _, free = build(optimizer, sparsity=0.4)
    train(model, free)
    assert len({removed(free)[i] for i in (0, 1, 3)}) > 1, "nothing to tie: the test would be empty"
    model, graph, tied = build(optimizer, sparsity=0.4, uniform=True)
    train(model, tied)
    tied.check()
    first, second, _, fourth, _ = counts = removed(tied)
    assert first == second == fourth > 0
    assert sum(counts) == tied.target_groups == int(0.4 * 49)
    assert [list(tied.selection["layers.0.up"])] != [list(tied.selection["layers.1.up"])], "which ones go is each layer's own"
    small = geta.compact(model, graph)
    assert len({small.kept[f"layers.{i}.up"].numel() for i in (0, 1, 3)}) == 1


@pytest.mark.parametrize("multiple_of", [4, "cpu"])
def test_alignment_and_ties_hold_together(multiple_of):
    model, _, optimizer = build(HESSO, sparsity=0.4, uniform=True, multiple_of=multiple_of)
    train(model, optimizer)
    optimizer.check()
    kept = [size - gone for size, gone in zip((10, 10, 12, 10, 7), removed(optimizer), strict=True)]
    step = 4 if multiple_of == 4 else 8
    assert kept[0] == kept[1] == kept[3]
    assert all(count % step == 0 or count == size for count, size in zip(kept, (10, 10, 12, 10, 7), strict=True))
    assert ("families that repeat lose equal numbers" in " ".join(optimizer.notes)) == (optimizer.target_groups != int(0.4 * 49))


@pytest.mark.parametrize("optimizer", [QASSO, HESSO, HESSOCRIC])
def test_budgets_plan_equal_numbers(optimizer):
    target = Budget(params=0.6) if optimizer is not QASSO else Budget(bytes=0.12)
    model, _, free = build(optimizer, target=target)
    train(model, free)
    assert len({removed(free)[i] for i in (0, 1, 3)}) > 1, "nothing to tie: the test would be empty"
    model, graph, tied = build(optimizer, target=target, uniform=True)
    train(model, tied)
    tied.check()
    counts = removed(tied)
    assert counts[0] == counts[1] == counts[3] > 0
    tied.check_cost(geta.compact(model, graph).cost)


def test_a_plan_with_ties_leaves_no_room_in_the_budget():
    """The costs of the merged model are those of the whole one, and nothing more could be kept."""
    model, graph, optimizer = build(HESSO, target=Budget(params=0.5), uniform=True)
    train(model, optimizer, 5)
    target = optimizer._target
    counts = dict(zip(("layers.0.up", "layers.1.up", "layers.2.up", "layers.3.up", "other"), target.plan.removed, strict=True))
    limit = target.limits["params"]
    assert target.costs(target.plan.removed, ())["params"] == sum(
        p.numel() for p in geta.compact(model, graph, cut(graph, counts)).parameters()
    )
    for tie in (("layers.0.up", "layers.1.up", "layers.3.up"), ("layers.2.up",), ("other",)):
        if counts[tie[0]]:
            fewer = {**counts, **{name: counts[name] - 1 for name in tie}}
            assert target.costs([fewer[name] for name in counts], ())["params"] > limit


def cut(graph: geta.DependencyGraph, counts: dict[str, int]) -> dict[str, torch.Tensor]:
    return {f.name: torch.arange(f.size) < counts[f.name] for f in graph.prunable_families}


def test_a_run_is_resumed_with_the_same_setting_only():
    model, _, optimizer = build(HESSO, sparsity=0.4, uniform=True)
    train(model, optimizer, 7)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, STEPS - 7)
    again, _, other = build(HESSO, sparsity=0.4, uniform=True)
    other.load_state_dict(saved)
    again.load_state_dict(weights)
    train(again, other, STEPS - 7)
    assert removed(other) == removed(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    _, _, free = build(HESSO, sparsity=0.4)
    with pytest.raises(CheckpointError, match="made with uniform = True, this run has False"):
        free.load_state_dict(saved)


def test_a_layer_that_stays_whole_is_named():
    _, _, optimizer = build(HESSO, sparsity=0.4, uniform=True, protect=["layers.1.*"])
    assert any(note.startswith("uniform: 1 of 3 families that repeat can't be pruned (first: 'layers.1.up')") for note in optimizer.notes)
    assert not any("uniform" in note for note in build(HESSO, sparsity=0.4, protect=["layers.1.*"])[2].notes)


def test_the_compressor_hands_it_on():
    torch.manual_seed(0)
    model = Net()
    compressor = geta.Compressor(model, (ROWS,), sparsity=0.4, weight_bits=None, uniform=True)
    optimizer = compressor.optimizer(torch.optim.SGD, lr=0.01, schedule=SCHEDULE)
    train(model, optimizer)
    counts = removed(optimizer)
    assert counts[0] == counts[1] == counts[3]
    compressor.finish()


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_other_values_are_refused(value):
    with pytest.raises(ConfigError, match="uniform is"):
        build(HESSO, sparsity=0.4, uniform=value)
    with pytest.raises(ConfigError, match="uniform is"):
        geta.Compressor(Net(), (ROWS,), sparsity=0.4, uniform=value)


def named(name: str, *params: str, size: int = 4, unit: str = "neurons", rows: int = 1) -> Family:
    index = torch.arange(size * rows).reshape(size, rows)
    return Family(name, unit, size, True, "", tuple(Member(param, 0, index, "producer", True) for param in params))


def test_what_repeats_is_decided_by_whole_name_parts():
    one, two = named("one", "layers.0.up.weight", "layers.0.up.bias"), named("two", "layers.11.up.bias", "layers.11.up.weight")
    others = [
        named("another name", "layers.1.gate.weight", "layers.1.gate.bias"),
        named("a number that is no index", "layers1.up.weight", "layers1.up.bias"),
        named("no bias", "layers.1.up.weight"),
        named("another size", "layers.1.up.weight", "layers.1.up.bias", size=5),
        named("another unit", "layers.1.up.weight", "layers.1.up.bias", unit="heads"),
        named("wider groups", "layers.1.up.weight", "layers.1.up.bias", rows=2),
    ]
    found = repeated([one, *others, two])
    assert [[family.name for family in tie] for tie in found] == [["one", "two"], *([other.name] for other in others)]
    assert repeated([]) == []


def test_a_random_selection_draws_one_share_for_what_repeats():
    graph = geta.analyze(Net(), (ROWS,))
    names = [f"layers.{i}.up" for i in (0, 1, 3)]
    tied = [graph.random_selection((0.1, 0.9), seed=seed, uniform=True) for seed in range(6)]
    assert all(len({int(selection[name].sum()) for name in names}) == 1 for selection in tied)
    assert len({int(selection["layers.0.up"].sum()) for selection in tied}) > 1
    assert any(int(selection["layers.0.up"].sum()) != int(selection["layers.2.up"].sum()) for selection in tied)
    free = [graph.random_selection((0.1, 0.9), seed=seed) for seed in range(6)]
    assert any(len({int(selection[name].sum()) for name in names}) > 1 for selection in free)
    plain, even = graph.random_selection(0.5, seed=3), graph.random_selection(0.5, seed=3, uniform=True)
    assert all(torch.equal(plain[name], even[name]) for name in plain)
    for wrong in ((0.6, 0.5), (0.5, 1.0), (-0.1, 0.5)):
        with pytest.raises(ConfigError, match="a range: its lower end first"):
            graph.random_selection(wrong)
