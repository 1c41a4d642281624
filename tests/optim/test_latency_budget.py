"""Budgets of predicted milliseconds, with made-up tables: no test here depends on how fast anything runs."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geta
from geta.errors import CheckpointError, ConfigError, GetaError
from geta.optim import HESSO, QASSO, Budget, Schedule
from latency_tables import made_up

STEPS = 12
SCHEDULE = Schedule(STEPS, warmup=2, projection=2, joint=6, projection_periods=1, joint_periods=2)
IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 10, 3)
        self.hidden, self.head = nn.Linear(10, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.outer(F.relu(self.inner(F.relu(self.stem(x))))))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


def build(optimizer: type = HESSO, **limits):
    torch.manual_seed(0)
    model = Net()
    graph = geta.analyze(model, (IMAGES,))
    table = made_up(graph, per_element_ms=1e-6)
    if optimizer is QASSO:
        geta.quantize(model, weights=(3, 8), activations=None, exclude=())
    settings = {"multiple_of": limits.pop("multiple_of", 1)}
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, graph, optimizer(base, graph, target=Budget(latency=table, **limits), schedule=SCHEDULE, **settings), table


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    model.eval()


def predicted(graph: geta.DependencyGraph, table: geta.LatencyTable, small: geta.CompactModel | None = None) -> float:
    from geta.cost.derive import cost_model

    costs = cost_model(graph, table)
    removed = [0 if small is None else family.size - len(small.kept[family.name]) for family in graph.prunable_families]
    return costs.evaluate(removed, np.zeros(len(costs.quantizers)))["latency_ms"]


TABLE = made_up(geta.analyze(Net(), (IMAGES,)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"latency_ms": 5.0}, "give the table that predicts it"),
        ({"latency_ms": 5.0, "latency": "table.json"}, "give the table that predicts it"),
        ({"latency": TABLE}, "latency_ms=None"),
        ({"latency": TABLE, "macs": 0.5}, "latency_ms=None"),
        ({"latency_ms": 0.0, "latency": TABLE}, "milliseconds above 0"),
        ({"latency_ms": -1.0, "latency": TABLE}, "milliseconds above 0"),
        ({"latency_ms": float("nan"), "latency": TABLE}, "milliseconds above 0"),
        ({"latency_ms": True, "latency": TABLE}, "milliseconds above 0"),
        ({"latency_ms": "half", "latency": TABLE}, "no share of anything"),
    ],
)
def test_a_latency_needs_milliseconds_and_a_table(arguments, words):
    with pytest.raises(ConfigError, match=words):
        Budget(**arguments)


@pytest.mark.parametrize(
    ("optimizer", "share", "other"),
    [(HESSO, 0.6, {}), (HESSO, 0.3, {"multiple_of": 2}), (QASSO, 0.5, {"bops": 0.04}), (HESSO, 0.9, {"macs": 0.3})],
)
def test_the_compact_network_is_predicted_to_be_as_fast_as_was_asked(optimizer, share, other):
    graph = geta.analyze(Net(), (IMAGES,))
    whole = predicted(graph, made_up(graph, per_element_ms=1e-6))
    model, graph, run, table = build(optimizer, latency_ms=share * whole, **other)
    assert run.cost_limits["latency_ms"] == share * whole
    assert any("milliseconds (predicted): at most" in line and "nothing planned yet" in line for line in run.report())
    train(model, run)
    run.check()
    small = geta.compact(model, graph)
    run.check_cost(small.cost)
    reached = predicted(graph, table, small)
    assert reached <= share * whole
    if not other:
        assert reached > 0.85 * share * whole
    lines = "\n".join(run.report())
    assert f"reached {reached:.4g} ({100 * reached / whole:.4g} %)" in lines
    assert "% of uncut)" in lines
    assert f"latency is a prediction for {table.words}" in lines


def test_layers_that_take_no_time_keep_their_groups():
    graph = geta.analyze(Net(), (IMAGES,))
    table = made_up(graph)
    slow = [grid for grid in table.grids if grid.shape.op == "conv2d"]
    free = [replace(grid, times=grid.times * 0) for grid in table.grids if grid.shape.op != "conv2d"]
    table = replace(table, grids=(*slow, *free))
    model = Net()
    graph = geta.analyze(model, (IMAGES,))
    target = Budget(latency_ms=0.4 * predicted(graph, table), latency=table)
    run = HESSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, target=target, schedule=SCHEDULE)
    train(model, run)
    kept = geta.compact(model, graph).kept
    assert len(kept["hidden"]) == 16
    assert len(kept["inner"]) < 12


def test_what_cannot_be_met_is_refused_before_training():
    words = r"latency_ms: at most 0\.0001 milliseconds \(predicted\) are allowed, but the smallest reachable is .* of the uncut network"
    with pytest.raises(ConfigError, match=words) as caught:
        build(QASSO, latency_ms=1e-4, multiple_of=2)
    assert "multiple_of than 2" in str(caught.value)
    assert "bit width" not in str(caught.value)


def test_a_table_of_another_network_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = geta.analyze(model, (torch.randn(2, 4),))
    with pytest.raises(ConfigError, match="the latency table has no times for '0'"):
        HESSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, target=Budget(latency_ms=1.0, latency=TABLE), schedule=SCHEDULE)


def test_bound_budgets_know_their_latency():
    graph = geta.analyze(Net(), (IMAGES,))
    bound = Budget(latency_ms=1.0, latency=made_up(graph)).bind(graph)
    assert bound.model_of(graph).kinds[-1] == "latency_ms"


@pytest.mark.parametrize("stop", [4, 7])
def test_resuming_is_bitwise_the_same(stop):
    graph = geta.analyze(Net(), (IMAGES,))
    limit = 0.5 * predicted(graph, made_up(graph, per_element_ms=1e-6))
    model, _, run, _ = build(QASSO, latency_ms=limit)
    train(model, run, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "run": run.state_dict()}, file)
    train(model, run, STEPS - stop)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, _, resumed, _ = build(QASSO, latency_ms=limit)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["run"])
    train(again, resumed, STEPS - stop)
    resumed.check()
    assert resumed.target_groups == run.target_groups > 0
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_checkpoint_of_another_table_is_refused():
    graph = geta.analyze(Net(), (IMAGES,))
    runs = []
    for scale in (1.0, 1.5):
        model = Net()
        graph = geta.analyze(model, (IMAGES,))
        target = Budget(latency_ms=5.0, latency=made_up(graph, scale=scale))
        runs.append(HESSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, target=target, schedule=SCHEDULE))
    with pytest.raises(CheckpointError, match="target"):
        runs[1].load_state_dict(runs[0].state_dict())


def test_a_planned_latency_above_the_budget_is_an_error_with_numbers():
    _, _, run, _ = build(latency_ms=0.5)
    with pytest.raises(GetaError, match=r"the budget is missed: milliseconds \(predicted\): at most 0\.5 .*reached 0\.75"):
        run._target.check({"latency_ms": 0.75})


def test_the_compressor_passes_it_on():
    graph = geta.analyze(Net(), (IMAGES,))
    table = made_up(graph)
    compressor = geta.Compressor(
        Net(), (IMAGES,), target=Budget(latency_ms=0.7 * predicted(graph, table), latency=table), weight_bits=None, multiple_of="cpu"
    )
    optimizer = compressor.optimizer(torch.optim.SGD, lr=0.01, schedule=SCHEDULE)
    train(compressor.model, optimizer)
    small = compressor.finish()
    assert predicted(compressor.graph, table, small) <= 0.7 * predicted(graph, table)
