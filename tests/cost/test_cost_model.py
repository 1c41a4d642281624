"""The cost model is exactly the cost of the compact model, for random selections and bit widths of well-known and random networks."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import geta
from geta.cost.derive import cost_model
from geta.cost.model import KINDS, CostMoves
from geta.errors import BadModelError
from geta.quant import quantize, quantizers
from geta.quant.ops import step_size
from nets import NETS
from random_nets import build, random_nets

FUZZING = os.environ.get("GETA_FUZZ_EXAMPLES")
EXAMPLES = 10 if FUZZING is None else max(10, int(FUZZING) // 10)


def set_bits(model: nn.Module, draw: random.Random) -> dict[str, int]:
    """Give every quantizer a random integer bit width."""
    chosen = {}
    for name, quantizer in quantizers(model).items():
        chosen[name] = draw.randint(quantizer.bits.lower, quantizer.bits.upper)
        with torch.no_grad():
            quantizer.d.copy_(step_size(chosen[name], quantizer.q_m, quantizer.t, quantizer.signed))
    return chosen


def random_counts(graph: geta.DependencyGraph, draw: random.Random) -> dict[str, torch.Tensor]:
    """Remove a random number of random groups of every family."""
    selection = {}
    for family in graph.prunable_families:
        gone = draw.sample(range(family.size), draw.randrange(family.size))
        selection[family.name] = torch.zeros(family.size, dtype=torch.bool).index_fill_(0, torch.tensor(gone, dtype=torch.int64), True)
    return selection


def real(model: nn.Module, graph: geta.DependencyGraph, selection) -> tuple[dict[str, float], dict[str, float]]:
    """Costs of the compact model and of the dense one, by kind."""
    small = geta.compact(model, graph, selection, verify=False)
    counted = (small.cost, geta.Cost.from_json(small.info.dense_cost))
    one, dense = ({"macs": c.macs, "bops": c.bops, "params": c.params, "bytes": c.weight_bytes} for c in counted)
    return one, dense


QUANTIZED = {
    "float": None,
    "weights": {"weights": (4, 8), "activations": None},
    "both": {"weights": (2, 8), "activations": (4, 8), "granularity": "channel"},
    "fixed": {"weights": geta.FixedBits(1.58), "activations": geta.FixedBits(4), "granularity": "channel"},
    "mixed": {"weights": geta.FixedBits(1), "activations": (4, 8)},
}
CASES = [
    ("resnet20_pad", "float"),
    ("vgg7_bn", "weights"),
    ("densenet_like", "both"),
    ("llama_gqa", "both"),
    ("vgg7_bn", "fixed"),
    ("resnet20_conv", "mixed"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_is_exactly_the_cost_of_the_compact_model(name, kind):
    model, args, kwargs = NETS[name]()
    graph = geta.analyze(model, args, kwargs)
    if QUANTIZED[kind] is not None:
        calibration = [kwargs or args] if QUANTIZED[kind]["activations"] else None
        quantize(model, calibration=calibration, **QUANTIZED[kind])
    costs, draw = cost_model(graph), random.Random(3)
    assert costs.notes == ()
    selection, bits = random_counts(graph, draw), set_bits(model, draw)
    counts = [int(selection[family].sum()) for family in costs.families]
    found, dense = real(model, graph, selection)
    assert costs.evaluate(counts, [bits[q] for q in costs.quantizers]) == found
    assert costs.dense == dense
    assert sum(counts) > 0
    assert sorted(costs.quantizers) == sorted(bits)


class Odd(nn.Module):
    """Auxiliary head in training only, a tied weight, a concatenation of quantized and float values, a weight with two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.aux = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 5)
        self.left, self.right, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 4)
        self.right.weight = self.left.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x).relu()).relu().mean((2, 3))
        z = self.head(torch.cat([self.left(y), self.right(y).relu()], 1))
        return z + self.aux(y).sum(1, keepdim=True) if self.training else z


@pytest.mark.parametrize("quantized", [False, True])
def test_odd_networks_cost_what_the_model_says(quantized):
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(2, 3, 6, 6)
    graph = geta.analyze(model, (x,))
    if quantized:
        quantize(model, weights=(3, 6), activations=(5, 8), calibration=[x], exclude=["aux"])
    costs, draw = cost_model(graph), random.Random(0)
    for _ in range(3):
        selection, bits = random_counts(graph, draw), set_bits(model, draw)
        found, _ = real(model, graph, selection)
        counts = [int(selection[family].sum()) for family in costs.families]
        assert costs.evaluate(counts, [bits[q] for q in costs.quantizers]) == found


@pytest.mark.fuzz
@settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=FUZZING is None, suppress_health_check=list(HealthCheck))
@given(random_nets(), st.integers(0, 2**20), st.booleans())
def test_random_networks_never_cost_more_than_the_model_says(spec, seed, quantized):
    model, args = build(spec)
    graph = geta.analyze(model, args)
    if quantized:
        quantize(model, weights=(3, 8), activations=None, exclude=())
    costs, draw = cost_model(graph), random.Random(seed)
    selection, bits = random_counts(graph, draw), set_bits(model, draw)
    found, dense = real(model, graph, selection)
    expected = costs.evaluate([int(selection[f].sum()) for f in costs.families], [bits[q] for q in costs.quantizers])
    assert all(found[kind] <= expected[kind] for kind in KINDS)
    assert costs.notes or found == expected
    assert costs.dense == dense


def test_moves_are_differences_of_the_exact_costs():
    model, args, kwargs = NETS["resnet20_conv"]()
    graph = geta.analyze(model, args, kwargs)
    quantize(model, weights=(4, 8), activations=(4, 8), calibration=[args])
    costs, rng = cost_model(graph), np.random.default_rng(0)
    moves = CostMoves(costs, np.full(len(costs.quantizers), 8.0))
    for _ in range(40):
        before = np.array(list(costs.evaluate(moves.removed, moves.bits).values()))
        np.testing.assert_allclose(moves.cost, before, rtol=1e-12)
        if rng.random() < 0.5:
            family = int(rng.integers(len(costs.families)))
            count = int(rng.integers(costs.family_sizes[family]))
            change = moves.removal_deltas(family, np.array([0, count]))[:, 1]
            moves.set_removed(family, count)
        else:
            quantizer, bits = int(rng.integers(len(costs.quantizers))), float(rng.integers(4, 9))
            change = moves.bits_deltas(quantizer, np.array([8.0, bits]))[:, 1]
            moves.set_bits(quantizer, bits)
        after = np.array(list(costs.evaluate(moves.removed, moves.bits).values()))
        np.testing.assert_allclose(change, after - before, rtol=1e-9, atol=1e-6 * before.max())


def test_a_model_that_changed_since_the_analysis_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    graph = geta.analyze(model, (torch.randn(2, 4),))

    class Skip(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.weight, self.bias = inner.weight, inner.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + nn.functional.linear(x, self.weight, self.bias)

    model[1] = Skip(model[1])
    with pytest.raises(BadModelError, match="coupled differently"):
        cost_model(graph)
