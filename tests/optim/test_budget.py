"""Budgets: what may be said, what can't be met, and that every optimizer meets what can, also after a resume."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geta
from geta.errors import CheckpointError, ConfigError, GetaError
from geta.optim import HESSO, HESSOCRIC, QASSO, Budget, Schedule
from geta.quant import quantize

STEPS = 16
SCHEDULE = Schedule(STEPS, warmup=2, projection=2, joint=8, projection_periods=1, joint_periods=3)
IMAGES = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 4


class Net(nn.Module):
    """Convolutions with BatchNorm, a residual join and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.outer(F.relu(self.inner(x))))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


def build(target: Budget | None, optimizer: type = QASSO, **settings):
    torch.manual_seed(0)
    model = Net()
    graph = geta.analyze(model, (IMAGES,))
    kind = settings.pop("quantized", "both" if optimizer is QASSO else None)
    if kind is not None:
        both = {"activations": (4, 8), "calibration": [IMAGES]} if kind == "both" else {"activations": None}
        quantize(model, weights=(3, 8), exclude=(), **both)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, graph, optimizer(base, graph, target=target, schedule=SCHEDULE, **settings)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    model.eval()


def costs(small: geta.CompactModel) -> dict[str, float]:
    cost = small.cost
    return {"macs": cost.macs, "bops": cost.bops, "params": cost.params, "bytes": cost.weight_bytes}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "limits nothing"),
        ({"bops": 0.0}, "bops=0.0"),
        ({"bops": 1.5}, "bops=1.5"),
        ({"macs": 1}, "macs=1"),
        ({"params": True}, "params=True"),
        ({"bytes": "3k"}, "bytes='3k'"),
        ({"bops": float("nan")}, "bops=nan"),
        ({"bops": 0.5, "bit_weight": -1.0}, "bit_weight=-1.0"),
    ],
)
def test_budgets_that_say_nothing_sensible_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        Budget(**arguments)


def test_shares_are_of_the_dense_network_and_integers_are_absolute():
    limits = Budget(bops=0.25, params=300).limits({"macs": 10, "bops": 10240, "params": 600, "bytes": 2400})
    assert limits == {"bops": 2560.0, "params": 300.0}


def test_sparsity_and_target_exclude_each_other():
    with pytest.raises(ConfigError, match=r"both sparsity = 0\.5 and target"):
        build(Budget(bops=0.5), sparsity=0.5)
    with pytest.raises(ConfigError, match=r"target is 0\.1"):
        build(0.1)
    with pytest.raises(ConfigError, match="a budget is to be met, but the schedule has no joint stage"):
        model = Net()
        HESSO(
            torch.optim.SGD(model.parameters(), lr=0.1),
            geta.analyze(model, (IMAGES,)),
            target=Budget(macs=0.5),
            schedule=Schedule(9, joint=0),
        )


def test_what_cannot_be_met_is_refused_before_training_with_the_smallest_cost():
    with pytest.raises(
        ConfigError, match=r"the smallest reachable is ([\d,]+) \(.*multiple_of than 4.*smallest bit width \(now 3\)"
    ) as caught:
        build(Budget(bops=0.0001, params=0.9), multiple_of=4)
    assert "params:" not in str(caught.value)
    smallest = int(str(caught.value).split("reachable is ")[1].split(" (")[0].replace(",", ""))
    _, _, optimizer = build(Budget(bops=smallest), multiple_of=4)
    assert optimizer.cost_limits == {"bops": smallest}
    with pytest.raises(ConfigError, match=r"quantize the model"):
        build(Budget(bytes=0.01), HESSO)


CASES = [
    (Budget(bops=0.02), QASSO, {}, 0.03),
    (Budget(bops=0.1, params=0.5), QASSO, {"quantized": "weights"}, 0.05),
    (Budget(bytes=0.12), QASSO, {}, 0.08),
    (Budget(macs=0.4), QASSO, {"quantized": None}, 0.15),
    (Budget(macs=0.6, params=900), HESSO, {}, 0.15),
    (Budget(macs=0.5), HESSO, {"multiple_of": 4}, None),
    (Budget(macs=0.5), HESSOCRIC, {}, 0.15),
    (Budget(params=0.5), HESSOCRIC, {"multiple_of": 4, "max_cycles": 1}, None),
]


@pytest.mark.parametrize(("target", "optimizer", "settings", "near"), CASES)
def test_the_compact_network_costs_what_was_planned_and_no_more(target, optimizer, settings, near):
    model, graph, run = build(target, optimizer, **settings)
    before = run.progress()
    assert before["target_groups"] is None
    assert before["groups_left"] is None
    assert any("nothing planned yet" in line for line in run.report())
    train(model, run)
    run.check()
    small = geta.compact(model, graph)
    reached, limits = costs(small), run.cost_limits
    run.check_cost(small.cost)
    assert all(reached[kind] <= limit for kind, limit in limits.items())
    if near is not None:
        assert any(reached[kind] >= limit * (1 - near) for kind, limit in limits.items())
    assert run.progress()["pruned_groups"] == run.target_groups == run.progress()["target_groups"]
    assert all(f"reached {reached[kind]:,.0f} " in "\n".join(run.report()) for kind in limits)
    multiple = settings.get("multiple_of", 1)
    assert all(len(kept) % multiple == 0 or len(kept) == small.info.family_sizes[name] for name, kept in small.kept.items())


def test_planned_bits_become_the_bounds_and_the_result():
    model, graph, run = build(Budget(bops=0.015))
    train(model, run, 4)
    assert run.progress()["upper_bound"] == 8
    uppers = []
    for _ in range(STEPS - 4):
        train(model, run, 1)
        uppers.append(run.progress()["upper_bound"])
    planned = dict(zip([q.name for q in geta.quant.quantizers(model).values()], run._target.plan.bits, strict=True))
    assert geta.compact(model, graph).bits == planned
    assert run.bits == planned
    assert 3 <= min(planned.values()) < 8
    assert uppers == sorted(uppers, reverse=True)
    assert uppers[-1] == max(planned.values())


def test_a_budget_that_bits_alone_meet_removes_nothing():
    model, graph, run = build(Budget(bops=0.0625))
    train(model, run)
    run.check()
    assert run.target_groups == 0
    assert set(run.bits.values()) == {8.0}
    assert costs(geta.compact(model, graph))["bops"] <= run.cost_limits["bops"]


@pytest.mark.parametrize("stop", [4, 5, 8])
@pytest.mark.parametrize("optimizer", [QASSO, HESSO, HESSOCRIC])
def test_resuming_is_bitwise_the_same(optimizer, stop):
    target = Budget(bops=0.02) if optimizer is QASSO else Budget(macs=0.5)
    model, _, run = build(target, optimizer)
    train(model, run, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "run": run.state_dict()}, file)
    train(model, run, STEPS - stop)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, _, resumed = build(target, optimizer)
    train(again, resumed, 6)  # whatever was planned here is forgotten
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["run"])
    assert (resumed.progress()["target_groups"] is None) == (stop <= SCHEDULE.joint_start)
    train(again, resumed, STEPS - stop)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True) if a.dim())
    assert resumed.target_groups == run.target_groups


def test_corrected_scores_decide_what_a_budget_takes(monkeypatch):
    """HESSO-CRIC plans twice: from the first scores which groups it examines, from the corrected ones what goes."""
    plans = []
    make = geta.optim.budget.BudgetTarget.make

    def noted(self, scores):
        plans.append((scores.copy(), make(self, scores)))
        return plans[-1][1]

    monkeypatch.setattr(geta.optim.budget.BudgetTarget, "make", noted)
    model, graph, run = build(Budget(macs=0.5), HESSOCRIC)
    train(model, run)
    assert len(plans) == 2
    assert (plans[0][0] != plans[1][0]).any()
    removed = [int(gone.sum()) for gone in run.selection.values()]
    assert removed == list(plans[1][1].removed)
    assert costs(geta.compact(model, graph))["macs"] <= run.cost_limits["macs"]


def test_a_family_is_not_emptied_because_its_groups_are_dear():
    """Two layers score alike, one costs 8 times as much: beside all of the other it could keep 2 of 32, but one more is worth some."""

    class Dear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dear, self.cheap = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(1, 32, 3, padding=1, stride=3)
            self.heads = nn.ModuleList([nn.Linear(32, 4), nn.Linear(32, 4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = (F.relu(layer(x)).mean((2, 3)) for layer in (self.dear, self.cheap))
            return self.heads[0](first) + self.heads[1](second)

    model = Dear()
    graph = geta.analyze(model, (torch.zeros(2, 1, 32, 32),))
    run = HESSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, target=Budget(macs=0.167), schedule=SCHEDULE)
    plan = run._target.make(torch.ones(64, dtype=torch.float64).numpy())
    names = [family.name for family in graph.families if family.prunable]
    assert {name: 32 - gone for name, gone in zip(names, plan.removed, strict=True)} == {"dear": 3, "cheap": pytest.approx(24, abs=3)}


def test_the_damage_of_a_family_starts_with_its_lowest_score_and_has_no_end():
    scores = torch.tensor([0.001, 0.002, 0.1, 0.2, 0.4]).double().numpy()
    damage = geta.optim.budget._damage(scores)
    assert damage[0] == 0.0
    assert damage[1] == pytest.approx(0.001, rel=2e-3)  # hardly more than the score, as long as little is gone
    assert (damage[2:-1] > scores.cumsum()[1:-1]).all()
    assert damage[-1] == float("inf")
    assert (geta.optim.budget._damage(0.0 * scores) == 0.0).all()


def test_a_checkpoint_of_another_budget_is_refused():
    _, _, first = build(Budget(macs=0.5), HESSO)
    _, _, second = build(Budget(macs=0.6), HESSO)
    with pytest.raises(CheckpointError, match="target"):
        second.load_state_dict(first.state_dict())


def test_a_cost_above_the_budget_is_an_error_with_numbers():
    _, _, run = build(Budget(macs=0.5), HESSO)
    with pytest.raises(GetaError, match=r"the budget is missed: MACs: at most [\d,]+ \(50 % of dense\), reached [\d,]+ \(100 %\)"):
        run.check_cost(geta.cost(Net(), (IMAGES,)))
