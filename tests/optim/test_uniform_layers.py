"""With uniform=True the branches of a block go together, so that training ends in a model of the same class with fewer layers."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import geta
import hf_nets
from depth_nets import NETS, Wrapped, mlp, on_tokens
from geta import ConfigError
from geta.graph.families import layer_units
from geta.optim.branch_plan import Unit, cheapest, nearest, reachable
from geta.optim.selection import Selector
from nets import bert

IDS = hf_nets.ids(2, 6)


def llama(layers: int = 4) -> tuple[Any, geta.DependencyGraph]:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**hf_nets._GROUPED, "num_hidden_layers": layers}))
    hf_nets.roughen(model)
    return model, geta.analyze(model, (), {"input_ids": IDS}, depth=True)


def trained(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def gone(graph: geta.DependencyGraph, selection: dict[str, torch.Tensor]) -> list[str]:
    """Blocks whose branches are removed, once for each branch."""
    layers = [family for family in graph.families if family.is_layer and family.name in selection]
    return sorted(family.block for family in layers if selection[family.name].all())


@pytest.mark.parametrize("name", ["QASSO", "HESSO", "HESSOCRIC"])
def test_training_ends_in_fewer_layers(name: str, tmp_path) -> None:
    model, graph = llama()
    if name == "QASSO":
        geta.quantize(model, weights=(4, 8), activations=None)
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    more = {"max_cycles": 1} if name == "HESSOCRIC" else {}
    optimizer = getattr(geta, name)(base, graph, sparsity=0.5, layer_sparsity=0.4, uniform=True, schedule=16, **more)
    assert optimizer.notes == [
        "3 of 8 residual branches were to be removed; 2 is the nearest possible, because whole blocks go, and of those that repeat across "
        "layers, and of the others together, at least one stays"
    ]
    trained(model, optimizer, 16)
    optimizer.check()
    blocks = gone(graph, optimizer.selection)
    assert len(blocks) == 2
    assert len(set(blocks)) == 1
    ordinary = [int(chosen.sum()) for family, chosen in optimizer.selection.items() if not family.endswith("(layer)")]
    assert sum(ordinary) == sum(family.size for family in graph.prunable_families if not family.is_layer) // 2
    (width,) = {48 - count for count in ordinary if count > 2}
    report = geta.save_pretrained(model.eval(), graph, tmp_path)
    assert report.needs_geta == ""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.num_hidden_layers, len(loaded.model.layers), loaded.config.intermediate_size) == (3, 3, width)
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert hf_nets.decoded(loaded, given) == hf_nets.decoded(model, given)


def test_a_budget_takes_whole_blocks() -> None:
    model, graph = llama(3)
    target = geta.Budget(params=0.45)
    optimizer = geta.HESSO(torch.optim.AdamW(model.parameters(), lr=1e-3), graph, target=target, uniform=True, schedule=12)
    trained(model, optimizer, 12)
    optimizer.check()
    blocks = gone(graph, optimizer.selection)
    assert len(blocks) == 2 * len(set(blocks)) > 0
    small = geta.compact(model.eval(), graph, product="eager")
    assert len(small.model.layers) == 3 - len(set(blocks))
    assert sum(p.numel() for p in small.parameters()) <= 0.45 * sum(p.numel() for p in model.parameters())


def test_a_run_resumes_in_the_middle_of_a_block() -> None:
    def fresh() -> tuple[Any, geta.DependencyGraph, Any]:
        model, graph = llama(3)
        base = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = geta.Schedule(total_steps=16, joint=8, joint_periods=4)
        return model, graph, geta.HESSO(base, graph, sparsity=0.0, layer_sparsity=0.7, uniform=True, schedule=schedule)

    model, graph, optimizer = fresh()
    trained(model, optimizer, optimizer.schedule.cooldown_start - 2)
    blocks = gone(graph, optimizer.selection)
    assert len(blocks) == 3
    assert len(set(blocks)) == 2  # the last branch is yet to go
    saved, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    other, _, second = fresh()
    other.load_state_dict(saved)
    second.load_state_dict(state)
    for one, rest in ((model, optimizer), (other, second)):
        trained(one, rest, 16 - optimizer.schedule.cooldown_start + 2)
        rest.check()
        assert len(set(gone(graph, rest.selection))) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_branches_without_a_block_stay_and_are_named() -> None:
    model, args, kwargs = bert()
    graph = geta.analyze(model, args, kwargs, depth=True)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    words = r"whole blocks go, and 'bert\.encoder\.layer\.0\.attention \(layer\)' is part of none .* still computes layer_norm at 'bert"
    with pytest.raises(ConfigError, match=words):
        geta.HESSO(base, graph, sparsity=0.5, layer_sparsity=0.5, uniform=True, schedule=4)
    optimizer = geta.HESSO(base, graph, sparsity=0.5, uniform=True, schedule=4)
    assert any(note.startswith("uniform: 4 of 4 residual branches stay, because whole blocks go") for note in optimizer.notes)
    assert gone(graph, graph.random_selection(0.5, uniform=True)) == []


def test_random_selections_take_whole_blocks() -> None:
    _, graph = llama()
    for seed, (share, count) in enumerate([(0.2, 0), (0.3, 1), (0.5, 2), (0.6, 2), (0.9, 3)]):
        blocks = gone(graph, graph.random_selection(share, seed=seed, uniform=True))
        assert len(blocks) == 2 * len(set(blocks)) == 2 * count


def test_blocks_alike_are_one_set() -> None:
    model, args = NETS["parallel"][0]()
    graph = geta.analyze(model, args, depth=True)
    assert [[[family.name for family in unit] for unit in one] for one in layer_units(graph.families, uniform=True)] == [
        [["1.attn (layer)", "1.mlp (layer)"], ["2.attn (layer)", "2.mlp (layer)"]]
    ]
    model, args = on_tokens(Wrapped(mlp()), Wrapped(mlp()), Wrapped(torch.nn.Linear(8, 8)))
    graph = geta.analyze(model, args, depth=True)
    sets = layer_units(graph.families, uniform=True)
    assert [[family.block for unit in one for family in unit] for one in sets] == [["1", "2"], ["3"]]
    assert len(layer_units(graph.families, uniform=False)) == 2


def options(sets: list[list[Unit]]) -> dict[int, float]:
    """The smallest costs by number of branches, by trying everything."""
    found: dict[int, float] = {}
    for flags in itertools.product(*(itertools.product((False, True), repeat=len(one)) for one in sets)):
        chosen = [unit for one, own in zip(sets, flags, strict=True) for unit, taken in zip(one, own, strict=True) if taken]
        left = [unit for one, own in zip(sets, flags, strict=True) for unit, taken in zip(one, own, strict=True) if not taken]
        if all(not all(own) for own in flags) and not any(unit.begun for unit in left):
            size, cost = sum(unit.size for unit in chosen), sum(unit.cost for unit in chosen)
            found[size] = min(cost, found.get(size, np.inf))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_units_are_found(seed: int) -> None:
    generator = np.random.default_rng(seed)
    shapes = [[2, 2, 2], [3, 3], [1, 2, 3]][: 1 + seed % 3]
    sets = [[Unit(size, float(generator.random())) for size in one] for one in shapes]
    expected = options(sets)
    possible = reachable(shapes)
    assert [total for total in range(20) if possible >> total & 1] == sorted(expected)
    for total, cost in expected.items():
        found = cheapest(sets, total)
        chosen = [one[place] for one, places in zip(sets, found, strict=True) for place in places]
        assert sum(unit.size for unit in chosen) == total
        assert sum(unit.cost for unit in chosen) == pytest.approx(cost)
    last = [[Unit(unit.size, unit.cost, begun=place == len(one) - 1) for place, unit in enumerate(one)] for one in sets]
    for total in options(last):
        assert all(len(one) - 1 in places for one, places in zip(last, cheapest(last, total), strict=True))
    assert nearest(possible, 1) == min(expected, key=lambda total: (abs(total - 1), total))


def test_a_block_that_is_begun_is_finished() -> None:
    """Scores change between periods, what is gone stays so; the branches of a block are marked one after the other."""
    sizes, layers, units = [4, 1, 1, 1, 1, 1, 1], [[1, 2, 3], [4, 5, 6]], [[[1, 4], [2, 5], [3, 6]]]
    selector = Selector(sizes, 0, ties=[[1, 4], [2, 5], [3, 6]], layers=layers, units=units, wanted_layers=3)
    assert (selector.layer_target, selector.target) == (2, 2)
    scores = np.array([9.0, 9, 9, 9, 0.5, 0.1, 0.6, 0.2, 0.9, 0.3])
    nothing = np.zeros(10, dtype=bool)
    assert np.flatnonzero(selector.mark(scores, nothing, 2)).tolist() == [4, 7]  # 0.7 is the smallest sum, though 0.1 the smallest score
    first = selector.mark(scores, nothing, 1)
    assert np.flatnonzero(first).tolist() == [4]
    assert np.flatnonzero(selector.mark(scores[::-1].copy(), first, 2)).tolist() == [7]
