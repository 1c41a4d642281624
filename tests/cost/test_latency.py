"""Latency tables with made-up times: interpolation, plain data, and the prediction as one more kind of cost."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import geta
from geta.cost.derive import cost_model, network_layers
from geta.cost.latency import LatencyGrid, LatencyTable
from geta.cost.layers import LayerShape
from geta.cost.model import CostMoves
from geta.errors import CheckpointError, ConfigError
from latency_tables import made_up, milliseconds
from nets import NETS

CONV = LayerShape("conv2d", (("input", False, ((1, -1), (1, 0))), ("weight", True, ((1, 1), (1, 0)))), (("stride", (1, 1)),), (16, 24))


def test_between_the_points_it_is_linear_and_beyond_them_the_nearest_counts():
    axes = ((8, 16), (8, 16, 24))
    times = np.array([[a + 10 * b + a * b for b in axes[1]] for a in axes[0]], dtype=np.float64)
    grid = LatencyGrid.of(CONV, "floats", axes, times)
    values = np.array([[8, 10, 16, 12, 1, 99], [8, 20, 24, 9, 1, 99]], dtype=np.float64)
    inside = np.clip(values, [[8], [8]], [[16], [24]])
    np.testing.assert_allclose(grid.at(values), inside[0] + 10 * inside[1] + inside[0] * inside[1])


def test_a_layer_without_variables_has_one_time():
    grid = LatencyGrid.of(LayerShape("linear", (), (), ()), "floats", (), np.array(0.5))
    assert grid.at(np.zeros((0, 3))).tolist() == [0.5] * 3


@settings(deadline=None, max_examples=30, database=None, derandomize=True)
@given(st.lists(st.floats(0, 10), min_size=12, max_size=12))
def test_measured_times_become_rising_ones(numbers):
    times = np.array(numbers).reshape(3, 4)
    grid = LatencyGrid.of(CONV, "floats", ((1, 2, 16), (1, 2, 3, 24)), times)
    for axis in range(2):
        assert (np.diff(grid.times, axis=axis) >= 0).all()
    again = LatencyGrid.of(CONV, "floats", grid.axes, grid.times)
    assert (again.times == grid.times).all()
    if all((np.diff(times, axis=axis) >= 0).all() for axis in range(2)):
        assert (grid.times == times).all()


@pytest.mark.parametrize("name", ["resnet20_pad", "shufflenet_like", "mobilenet_v2_like", "bert", "llama_gqa"])
def test_layers_have_the_sizes_that_the_compact_network_has(name):
    model, args, kwargs = NETS[name]()
    graph = geta.analyze(model, args, kwargs)
    draw = random.Random(1)
    counts = {family.name: draw.randrange(family.size) for family in graph.prunable_families}
    selection = {family.name: torch.arange(family.size) < counts[family.name] for family in graph.prunable_families}
    small = geta.compact(model, graph, selection, verify=False)
    again = network_layers(geta.analyze(small, args, kwargs))
    found = network_layers(graph)
    assert found.notes == {}
    removed = [counts[family.name] for family in graph.prunable_families]
    shapes = [layer.shape.at([n - sum(m * removed[f] for f, m in slopes) for n, slopes in layer.variables]) for layer in found.layers]
    assert [(layer.shape.op, shape) for layer, shape in zip(found.layers, shapes, strict=True)] == [
        (layer.shape.op, layer.shape.at(layer.shape.extents)) for layer in again.layers
    ]


def test_a_batch_size_of_its_own():
    model, args, kwargs = NETS["bert"]()
    graph = geta.analyze(model, args, kwargs)
    assert {
        shape.at(shape.extents)["query"][0]
        for shape in (layer.shape for layer in network_layers(graph, 5).layers)
        if shape.op == "scaled_dot_product_attention"
    } == {5}
    fixed = geta.analyze(model, args, kwargs, dynamic_shapes={})
    with pytest.raises(ConfigError, match="batch size"):
        network_layers(fixed, 5)


class Folded(nn.Module):
    """Batch and heads in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 4)

    def forward(self, x):
        n, t, _ = x.shape
        q, k = (f(x).reshape(n, t, 3, 4).transpose(1, 2).reshape(n * 3, t, 4) for f in (self.q, self.k))
        weights = torch.bmm(q, k.transpose(1, 2)).reshape(n, 3, t, t).sum(1)
        return self.out(torch.bmm(weights, x))


def test_a_dimension_of_batch_times_heads_follows_both():
    graph = geta.analyze(Folded(), (torch.randn(2, 5, 6),))
    for batch in (1, 2, 4):
        layer = next(layer for layer in network_layers(graph, batch).layers if layer.shape.op == "bmm")
        if layer.shape.extents:
            assert layer.shape.at([2])["self"][0] == 2 * batch
        assert layer.shape.at(layer.shape.extents)["self"][0] == 3 * batch


@pytest.mark.parametrize("name", ["resnet20_pad", "vit"])
def test_the_prediction_is_the_sum_over_the_layers_and_moves_are_its_differences(name):
    model, args, kwargs = NETS[name]()
    graph = geta.analyze(model, args, kwargs)
    table = made_up(graph, scale=1.5, fixed_ms=0.25, per_element_ms=1e-6)
    costs, rng = cost_model(graph, table), np.random.default_rng(0)
    assert costs.kinds == ("macs", "bops", "params", "bytes", "latency_ms")
    moves = CostMoves(costs, np.zeros(0))
    found = network_layers(graph, table.batch)
    for _ in range(10):
        family = int(rng.integers(len(costs.families)))
        count = int(rng.integers(costs.family_sizes[family]))
        before = costs.evaluate(moves.removed, [])["latency_ms"]
        change = moves.removal_deltas(family, np.array([0, count]))[-1, 1]
        moves.set_removed(family, count)
        after = costs.evaluate(moves.removed, [])["latency_ms"]
        np.testing.assert_allclose([moves.cost[-1], change], [after, after - before], rtol=1e-9, atol=1e-12)
        layers = sum(
            milliseconds(layer.shape, [n - sum(m * moves.removed[f] for f, m in slopes) for n, slopes in layer.variables])
            for layer in found.layers
        )
        written = sum(
            one.factor * np.prod([n - sum(m * moves.removed[f] for f, m in slopes) for n, slopes in one.sizes])
            for one in found.others(constants=False)
        )
        assert after == pytest.approx(1.5 * layers + 0.25 + 1e-6 * written)
    assert costs.dense["latency_ms"] == pytest.approx(costs.evaluate([0] * len(costs.families), [])["latency_ms"])


def test_a_table_is_plain_data(tmp_path):
    model, args, kwargs = NETS["vgg7_bn"]()
    graph = geta.analyze(model, args, kwargs)
    table = replace(made_up(graph), integer_layers=("a", "b"), networks={"uncut": {"measured": 2.0, "predicted": 1.5}}, notes=("one",))
    table.save(tmp_path / "table.json")
    again = geta.LatencyTable.load(tmp_path / "table.json")
    assert again.to_json() == table.to_json() == json.loads(json.dumps(table.to_json()))
    assert again.fingerprint == table.fingerprint != replace(table, scale=2.0).fingerprint
    assert again == table != replace(table, scale=2.0)
    assert hash(again) == hash(table)
    assert len({geta.Budget(latency_ms=1.0, latency=one) for one in (table, again)}) == 1
    for words in (
        "ONNX Runtime, floats, batch 2, 1 thread",
        "conv2d",
        "uncut network: measured 2.0000 ms, predicted 1.5000 ms",
        "note: one",
    ):
        assert words in str(again)


def test_what_is_no_table_is_refused(tmp_path):
    model, args, kwargs = NETS["vgg7_bn"]()
    good = made_up(geta.analyze(model, args, kwargs)).to_json()
    time = good["times"][-1]
    bad = [
        [],
        {"format": 1},
        {**good, "latency_table": 99},
        {name: value for name, value in good.items() if name != "scale"},
        {**good, "scale": float("nan")},
        {**good, "batch": 0},
        {**good, "batch": True},
        {**good, "runtime": 3},
        {**good, "networks": {"uncut": 3}},
        {**good, "times": [{**time, "ms": [[1.0]]}]},
        {**good, "times": [{**time, "kernel": "fast"}]},
        {**good, "times": [{**time, "axes": [list(reversed(axis)) for axis in time["axes"]]}]},
        {**good, "times": [{**time, "ms": (np.array(time["ms"]) - 99).tolist()}]},
        {**good, "times": [{**time, "shape": {"op": "conv2d"}}]},
        {**good, "times": 3},
    ]
    for data in bad:
        with pytest.raises(CheckpointError, match=r"latency table|shape of a layer"):
            LatencyTable.from_json(data)
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(CheckpointError, match="can't be read"):
            LatencyTable.load(tmp_path / name)


def test_a_layer_that_was_not_measured_is_named():
    model, args, kwargs = NETS["vgg7_bn"]()
    graph = geta.analyze(model, args, kwargs)
    table = made_up(graph)
    with pytest.raises(ConfigError, match=r"no times for '.+' \(floats linear .*measure again"):
        cost_model(graph, replace(table, grids=tuple(grid for grid in table.grids if grid.shape.op != "linear")))
    model, args, kwargs = NETS["resnet20_pad"]()
    table = made_up(geta.analyze(model, args, kwargs))
    wider = geta.analyze(model, tuple(torch.cat([x, x], -1) for x in args), kwargs)
    with pytest.raises(ConfigError, match="other input sizes"):
        cost_model(wider, table)


def test_quantizers_do_not_change_the_layers():
    model, args, kwargs = NETS["resnet20_pad"]()
    graph = geta.analyze(model, args, kwargs)
    table = made_up(graph)
    geta.quantize(model, weights=(4, 8), activations=(8, 8), calibration=[args], results_of=graph)
    assert [layer.shape.key for layer in network_layers(graph).layers] == list(
        itertools.chain([layer.shape.key for layer in network_layers(geta.analyze(NETS["resnet20_pad"]()[0], args)).layers])
    )
    costs = cost_model(graph, table)
    assert costs.dense["latency_ms"] > 0
    assert costs.quantizers
