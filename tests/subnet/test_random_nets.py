"""Property: for every small network, zero a random selection -> compact -> the same output, in both modes.

GETA_FUZZ_EXAMPLES sets the number of examples (default 300; `make fuzz` uses thousands).
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import HealthCheck, given, seed, settings

import random_nets
from geta.graph import analyze
from geta.subnet import compact
from geta.subnet.comparison import max_difference

EXAMPLES = int(os.environ.get("GETA_FUZZ_EXAMPLES", "300"))
SHARDS = 6  # so that parallel test workers share the load


def check(spec: Any, sparsity: float) -> int:
    """Assert the identity for one network, of which about half of the residual branches go too; returns how many groups were removed."""
    model, args = random_nets.build(spec)
    graph = analyze(model, args, depth=True)
    selection = graph.random_selection(sparsity, seed=len(str(spec)))
    generator = torch.Generator().manual_seed(len(str(spec)))
    layers = [family.name for family in graph.prunable_families if family.is_layer]
    selection.update({name: torch.rand(1, generator=generator) < 0.5 for name in layers})
    small = compact(model, graph, selection)
    zeroed = copy.deepcopy(model)
    graph.zero_(zeroed, selection)
    left = set(small.tensors())
    assert not [
        tensor
        for family in graph.families
        if family.name in layers and selection[family.name]
        for tensor in family.removes
        if tensor in left
    ]
    for training in (False, True):
        results = []
        for net in (zeroed, small):
            torch.manual_seed(0)
            with torch.no_grad():
                results.append(pytree.tree_leaves(net.train(training)(*args)))
        assert max_difference(*results)[1] <= 1e-5, f"training={training}"
    return sum(int(remove.sum()) for remove in selection.values())


@pytest.mark.fuzz
@pytest.mark.parametrize("shard", range(SHARDS))
def test_zeroed_equals_compact(shard: int) -> None:
    removed: list[int] = []

    @seed(1000 + shard)
    @settings(
        max_examples=-(-EXAMPLES // SHARDS),
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(random_nets.random_nets())
    def property_holds(spec: Any) -> None:
        removed.append(check(spec, 0.5))

    property_holds()
    assert len(removed) >= EXAMPLES // SHARDS
    assert sum(count > 0 for count in removed) > 0.6 * len(removed), "most networks must have something to remove"


def test_two_tracks_along_one_axis_are_both_kept() -> None:
    """Found by fuzzing: one of two tracks along the channels was dropped, and with it the cut of a transposed convolution."""
    blocks = [
        ["TransposedConv", {"out": 6, "stride": 1, "groups": 3, "bias": False}],
        ["TransposedConv", {"out": 8, "stride": 1, "groups": 2, "bias": True}],
        ["PReLU", {"shared": False}],
        ["Project", {"out": 3, "bias": True}],
    ]
    spec = {"dtype": "float64", "seed": 57, "input": ["image", 3, 5, 5], "vocabulary": 11, "tap": None, "blocks": blocks}
    assert check(spec, 0.5) > 0


def test_the_comparison_can_fail() -> None:
    """A wrong cut is noticed: remove one group and zero another."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    args = (torch.randn(2, 4),)
    graph = analyze(model, args)
    remove = torch.tensor([True, False, False, False, False, False])
    small = compact(model, graph, {"0": remove})
    graph.zero_(model, {"0": remove.flip(0)})
    assert small.verify(*args, reference=model) > 1e-3
