"""Optimizers that remove whole residual branches: how many, which, and never all of a set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import geta
from depth_nets import NETS, WIDTH, Wrapped, mlp, on_tokens
from geta import ConfigError
from geta.cost.derive import cost_model
from geta.optim.cycle import spared
from geta.optim.groups import GroupIndex
from geta.optim.lowest import Lowest
from geta.optim.saliency import group_statistics
from geta.optim.selection import Selector


def trained(model: nn.Module, args: tuple[Any, ...], optimizer: torch.optim.Optimizer, steps: int) -> None:
    target = torch.linspace(-1.0, 1.0, model(*args).numel()).reshape(model(*args).shape)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(*args) - target).square().mean().backward()
        optimizer.step()


def gone(graph: geta.DependencyGraph, optimizer: Any) -> list[str]:
    selection = optimizer.selection
    return [family.name for family in graph.prunable_families if family.is_layer and bool(selection[family.name].all())]


def deep(blocks: int = 4) -> tuple[nn.Module, tuple[Any, ...], geta.DependencyGraph]:
    model, args = on_tokens(*[Wrapped(mlp()) for _ in range(blocks)])
    return model, args, geta.analyze(model, args, depth=True)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "QASSO": lambda base, graph, **more: geta.QASSO(base, graph, schedule=24, **more),
    "HESSO": lambda base, graph, **more: geta.HESSO(base, graph, schedule=24, **more),
    "HESSOCRIC": lambda base, graph, **more: geta.HESSOCRIC(base, graph, schedule=24, max_cycles=1, **more),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_share_of_branches_goes_and_the_share_of_groups(name: str) -> None:
    model, args, graph = deep()
    optimizer = OPTIMIZERS[name](torch.optim.AdamW(model.parameters(), lr=1e-2), graph, sparsity=0.5)
    trained(model, args, optimizer, 24)
    optimizer.check()
    removed = {family: int(chosen.sum()) for family, chosen in optimizer.selection.items()}
    assert len(gone(graph, optimizer)) == 2
    assert sum(count for family, count in removed.items() if not family.endswith("(layer)")) == 4 * 12 // 2
    small = geta.compact(model, graph)
    assert {family: small.info.family_sizes[family] - len(kept) for family, kept in small.info.kept.items()} == removed


def test_branches_go_alone_and_never_all_of_them() -> None:
    model, args, graph = deep(3)
    optimizer = geta.HESSO(torch.optim.SGD(model.parameters(), lr=1e-2), graph, sparsity=0.0, layer_sparsity=0.9, schedule=20)
    trained(model, args, optimizer, 20)
    assert len(gone(graph, optimizer)) == 2
    optimizer.check()
    model, args, graph = deep(1)
    optimizer = geta.HESSO(torch.optim.SGD(model.parameters(), lr=1e-2), graph, sparsity=0.5, layer_sparsity=0.99, schedule=20)
    trained(model, args, optimizer, 20)
    assert gone(graph, optimizer) == []
    assert any("a share of 0.99 of 1 residual branches is less than one" in note for note in optimizer.notes)


def test_batch_norm_branches_shrink_by_their_norm_and_share_rows_with_the_stream() -> None:
    """Rows of the last convolution belong to the stream's channels and to the branch; both may go."""
    model, args = NETS["basic blocks"][0]()
    graph = geta.analyze(model, args, depth=True)
    branch = next(family for family in graph.families if family.is_layer)
    assert branch.gated == {"1.branch.3.weight"}
    optimizer = geta.QASSO(torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9), graph, sparsity=0.4, schedule=20)
    trained(model, args, optimizer, 20)
    optimizer.check()
    assert len(gone(graph, optimizer)) == 1
    small = geta.compact(model, graph)
    assert small.info.max_difference < 1e-4


def test_a_run_with_branches_resumes_bitwise() -> None:
    def fresh() -> tuple[nn.Module, tuple[Any, ...], Any]:
        model, args, graph = deep(3)
        return model, args, geta.HESSO(torch.optim.AdamW(model.parameters(), lr=1e-2), graph, sparsity=0.4, schedule=24)

    model, args, optimizer = fresh()
    trained(model, args, optimizer, 9)
    saved, state = {name: value.clone() for name, value in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    other, _, second = fresh()
    other.load_state_dict(saved)
    second.load_state_dict(state)
    for one, rest in ((model, optimizer), (other, second)):
        trained(one, args, rest, 15)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("share", [0.75, 0.4])
def test_a_budget_takes_branches_where_they_are_cheap(share: float) -> None:
    """Costs are planned exactly; a small budget needs branches, and one of them stays."""
    model, args, graph = deep()
    optimizer = geta.HESSO(torch.optim.AdamW(model.parameters(), lr=1e-2), graph, target=geta.Budget(params=share), schedule=20)
    trained(model, args, optimizer, 20)
    optimizer.check()
    small = geta.compact(model, graph)
    optimizer.check_cost(small.cost)
    assert small.cost.params <= share * geta.cost(model, args).params
    assert len(gone(graph, optimizer)) <= 3


def test_a_budget_that_needs_every_branch_is_refused() -> None:
    model, _args, graph = deep(2)
    costs = cost_model(graph)
    everything = costs.evaluate([size - (1 if size > 1 else 0) for size in costs.family_sizes], [])["params"]
    one_stays = costs.evaluate([11, 11, 0, 1], [])["params"]
    with pytest.raises(ConfigError, match=f"smallest reachable is {one_stays:,}"):
        geta.HESSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, target=geta.Budget(params=int(everything) + 1), schedule=20)


def test_settings_that_contradict_are_refused() -> None:
    model, args, graph = deep(2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"layer_sparsity is 1\.0"):
        geta.QASSO(base, graph, sparsity=0.5, layer_sparsity=1.0, schedule=20)
    with pytest.raises(ConfigError, match="the budget decides which branches go"):
        geta.QASSO(base, graph, target=geta.Budget(params=0.5), layer_sparsity=0.5, schedule=20)
    with pytest.raises(ConfigError, match="no residual branch that can go"):
        geta.QASSO(base, geta.analyze(model, args), sparsity=0.5, layer_sparsity=0.5, schedule=20)
    with pytest.raises(ConfigError, match="no effect without depth=True"):
        geta.Compressor(model, args, sparsity=0.5, layer_sparsity=0.5)


def test_the_compressor_removes_branches_and_quantizes_the_rest() -> None:
    model, args, _ = deep()
    compressor = geta.Compressor(model, args, sparsity=0.25, depth=True, layer_sparsity=0.5)
    optimizer = compressor.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=24)
    trained(model, args, optimizer, 24)
    small = compressor.finish()
    assert [len(kept) for name, kept in small.info.kept.items() if name.endswith("(layer)")].count(0) == 2
    assert small.bits


def test_a_branch_scores_as_its_average_row() -> None:
    """Sums over all rows are divided by their number; so a branch doesn't dwarf the channels of other layers."""
    model, _args, graph = deep(2)
    index = GroupIndex(graph)
    before = [entry.tensor.detach().clone() for entry in index.parameters]
    after = [tensor * 0.9 for tensor in before]
    found = group_statistics(index, before, after)
    place = [family.name for family in index.families].index("1.branch (layer)")
    last = model[1].branch[3]
    whole = torch.cat([last.weight.detach().flatten(), last.bias.detach()])
    at = int(index.starts[place])
    assert float(found.norm[at]) == pytest.approx(float(whole.norm()) / WIDTH**0.5, rel=1e-5)
    assert float(found.size[at]) == whole.numel() / WIDTH
    assert float(found.inner[at]) == pytest.approx(0.1 * float(whole.square().sum()) / WIDTH, rel=1e-4)
    assert int(found.family[at]) == int(found.family[at + 1])  # compared within their set


def test_selection_keeps_one_of_each_set_and_the_best_ones() -> None:
    sizes, layers = [6, 6, 1, 1, 1, 1, 1], [[2, 3, 4], [5, 6]]
    selector = Selector(sizes, 5, layers=layers, wanted_layers=3)
    assert (selector.target, selector.layer_target, selector.note) == (8, 3, "")
    scores = np.concatenate([np.linspace(1, 2, 12), [0.1, 0.2, 0.3, 9.0, 8.0]])
    nothing = np.zeros(17, dtype=bool)
    assert np.flatnonzero(selector.mark(scores, nothing, 8)).tolist() == [0, 1, 2, 3, 4, 12, 13, 16]
    first = selector.mark(scores, nothing, 3)
    assert np.flatnonzero(first).tolist() == [0, 12, 13]
    rest = selector.mark(scores[::-1].copy(), first, 8)
    assert not (rest & first).any()
    assert int(rest.sum()) == 5
    assert int((rest | first)[12:].sum()) == 3
    short = Selector(sizes, 0, layers=layers, wanted_layers=5)
    assert short.layer_target == 3
    assert "5 of 5 residual branches were to be removed; 3 is the most possible" in short.note
    aligned = Selector(sizes, 4, multiple_of=4, layers=layers, wanted_layers=1)
    assert (aligned.target, aligned.layer_target) == (5, 1)


def test_lowest_agrees_with_the_selector() -> None:
    _model, _args, graph = deep()
    index = GroupIndex(graph)
    selector = Selector(index.sizes, 20, layers=index.layers, wanted_layers=3)
    for seed in range(5):
        scores = torch.rand(index.num_groups, generator=torch.Generator().manual_seed(seed))
        expected = selector.mark(scores.double().numpy(), np.zeros(index.num_groups, dtype=bool), selector.target)
        assert Lowest(index, selector)(scores).tolist() == expected.tolist()


def test_cycles_spare_a_branch_of_each_set() -> None:
    starts = np.array([0, 3, 4, 5, 6])
    chosen = np.array([True, True, False, True, True, True])
    assert spared(chosen, np.arange(6.0), starts, [[1, 2, 3]]).tolist() == [True, True, False, True, True, False]
