"""What removing whole residual branches saves, before it is done."""

from __future__ import annotations

import pytest
import torch

import geta
from depth_nets import NETS
from geta.cost.derive import cost_model
from geta.cost.outlook import outlook


@pytest.mark.parametrize("name", ["in place", "pre-norm", "parallel"])
def test_costs_of_networks_without_branches_are_exact(name: str) -> None:
    model, args = NETS[name][0]()
    graph = geta.analyze(model, args, depth=True)
    costs = cost_model(graph)
    branches = [family.name for family in graph.prunable_families if family.is_layer]
    for gone in (branches[:1], branches[1:3]):
        selection = graph.random_selection(0.4, seed=3)
        selection.update({branch: torch.tensor([branch in gone]) for branch in branches})
        small = geta.compact(model, graph, selection).cost
        found = costs.evaluate([int(selection[family].sum()) for family in costs.families], [])
        assert (found["macs"], found["params"], found["bytes"]) == (small.macs, small.params, small.weight_bytes)
    shared = ("what only several residual branches share (a norm in front of both) counts as if it stayed",)
    assert costs.notes == (shared if name == "parallel" else ())


def test_what_two_branches_share_is_bounded_from_above() -> None:
    model, args = NETS["parallel"][0]()
    graph = geta.analyze(model, args, depth=True)
    selection = {
        family.name: torch.full((family.size,), family.name.startswith("1.") and family.is_layer) for family in graph.prunable_families
    }
    small, costs = geta.compact(model, graph, selection).cost, cost_model(graph)
    found = costs.evaluate([int(selection[family].sum()) for family in costs.families], [])
    assert found["macs"] == small.macs
    assert found["params"] == small.params + 16  # the norm in front of both


def test_the_outlook_counts_branches_as_if_they_stayed() -> None:
    model, args = NETS["pre-norm"][0]()
    plain, deep = (outlook(geta.analyze(model, args, depth=depth)) for depth in (False, True))
    assert plain.rows == deep.rows
    assert deep.notes == ("whole residual branches count as if they stayed",)
