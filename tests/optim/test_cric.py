"""HESSO-CRIC as an optimizer: its phases, exactly K zeros for random settings, and the case that one snapshot gets wrong."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import geta
from geta.errors import ConfigError, GetaError
from geta.optim import HESSO, HESSOCRIC, Schedule
from geta.optim.lowest import Lowest
from geta.quant import quantize
from optim_nets import ByHand, batch, family, net, train

STEPS = 60
SCHEDULE = Schedule(STEPS, warmup=6, projection=4, joint=36)
BASES = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def build(base: str = "momentum", *, schedule: Schedule = SCHEDULE, **options):
    model, graph = net()
    return model, HESSOCRIC(BASES[base](model.parameters()), graph, schedule=schedule, **{"sparsity": 0.5, **options})


class Diagonal(nn.Module):
    """prediction = sum_i inner_i outer_i x_i: each feature has a neuron of its own, so that no other one can replace it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(0.5 + 0.5 * torch.rand(features))
        self.outer = nn.Parameter(0.5 + 0.5 * torch.rand(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.inner * self.outer).sum(1)


def regression(kind: type[HESSO | HESSOCRIC], seed: int, periods: int | None) -> tuple[float, int]:
    """(final loss, how many of the three features that the target depends on were removed); half of the eight neurons go.

    The needed features have large units, so their weights are small, and they are learnt long before the snapshot, so their gradient
    is zero there. The useless ones have tiny units: their weights hardly move, and what gradient there is, is theirs. Both
    optimizers get the default saliency, the same data, schedule and base optimizer.
    """
    torch.manual_seed(seed)
    features, needed_count, large, tiny = 8, 3, 4.0, 0.05
    model = Diagonal(features)
    generator = torch.Generator().manual_seed(seed + 1)
    needed = torch.zeros(features, dtype=torch.bool)
    needed[torch.randperm(features, generator=generator)[:needed_count]] = True
    x = torch.randn(256, features, generator=generator) * torch.where(needed, large, tiny)
    y = x @ torch.where(needed, (1.0 + torch.rand(features)) / large, 0.0)
    graph = ByHand(model, [family("features", features, ["inner", "outer"])])
    schedule = Schedule(240, warmup=60, projection=0, joint=120, joint_periods=periods)
    optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.02), graph, sparsity=0.5, schedule=schedule)
    for _ in range(240):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    optimizer.check()
    return F.mse_loss(model(x), y).item(), int((optimizer.selection["features"] & needed).sum())


@pytest.mark.parametrize("seed", range(8))
def test_one_snapshot_prunes_what_is_indispensable_and_the_cycle_keeps_it(seed):
    for periods in (1, 5):
        loss, removed = regression(HESSO, seed, periods)
        assert removed >= 1
        assert loss > 0.5
    loss, removed = regression(HESSOCRIC, seed, None)
    assert removed == 0
    assert loss < 0.01


def test_it_is_public():
    assert geta.HESSOCRIC is HESSOCRIC


@pytest.mark.parametrize("base", sorted(BASES))
def test_phases_follow_one_another_and_the_model_goes_back_each_time(base):
    """Two full cycles: what a step sees after a cycle is the warm-up's end, bitwise, with the optimizer's state."""
    model, optimizer = build(base, max_cycles=2, sampling_steps=7, hybrid_steps=10)
    seen: list[str] = []
    kept: dict[int, tuple[dict, dict]] = {}

    def look() -> None:
        now = optimizer.progress()
        seen.append(now["phase"])
        kept[now["step"]] = (
            {name: value.clone() for name, value in model.state_dict().items()},
            {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.base.state_dict()["state"].items()},
        )

    train(model, optimizer, 0, 10, look)
    assert optimizer.stage == "joint"
    train(model, optimizer, 10, STEPS, look)
    first = seen.index("hybrid")
    cycles = first - seen.index("cycle")
    assert cycles in (7, 14), "one or two cycles of seven steps; what is seen is the phase of the next step"
    assert seen == ["warm-up"] * 9 + ["cycle"] * cycles + ["hybrid"] * 10 + ["cool-down"] * (STEPS - 19 - cycles)
    for end in (10 + 7, first + 1):
        for part, saved in zip(kept[10], kept[end], strict=True):
            assert str(part.keys()) == str(saved.keys())
        for name, value in kept[10][0].items():
            assert torch.equal(value, kept[end][0][name]), (end, name)
        for position, entries in kept[10][1].items():
            assert all(torch.equal(value, kept[end][1][position][key]) for key, value in entries.items())
    optimizer.check()
    assert optimizer._origin is None, "the copy is given back"


def test_zeros_are_exactly_k_and_stay_and_the_report_says_why_cycles_ended():
    model, optimizer = build(max_cycles=2)
    phases = []

    def look() -> None:
        phases.append(optimizer.progress()["phase"])
        if phases[-1] == "cool-down":
            assert int(optimizer._index.zero_groups().sum()) == optimizer.target_groups == 12
            assert torch.equal(torch.cat(list(optimizer.selection.values())), optimizer._index.zero_groups())

    train(model, optimizer, 0, STEPS, look)
    optimizer.check()
    now = optimizer.progress()
    assert (now["stage"], now["phase"], now["pruned_groups"], now["period"]) == ("cool-down", "cool-down", 12, None)
    assert now["cycles_ended"].startswith(("after cycle", "max_cycles"))
    assert any(line == f"cycles ended: {now['cycles_ended']}" for line in optimizer.report())
    assert {type(value) for value in now.values()} <= {int, float, str, type(None)}


def test_report_shows_the_cycle():
    model, optimizer = build(sampling_steps=6)
    train(model, optimizer, 0, 13)
    assert optimizer.progress()["cycle"] == 1
    assert optimizer.progress()["period"] == 0
    assert any(line.startswith("cycle 1 of at most 3: 12 groups examined, ") for line in optimizer.report())
    with pytest.raises(GetaError, match="stopped at step 13, in joint"):
        optimizer.check()


def test_a_large_tolerance_ends_after_one_cycle_and_the_cool_down_starts_earlier():
    model, optimizer = build(max_cycles=3, sampling_steps=8, hybrid_steps=9, tolerance=24)
    train(model, optimizer, 0, 10 + 8 + 9)
    assert optimizer.stage == "cool-down"
    assert SCHEDULE.stage_at(27) == "joint"
    assert "at most tolerance = 24" in optimizer.progress()["cycles_ended"]
    optimizer.check()
    train(model, optimizer, 27, 40)
    optimizer.check()


def test_warm_up_is_the_base_optimizer_and_sparsity_zero_stays_it():
    for sparsity, last in ((0.5, 10), (0.0, STEPS)):
        plain, _ = net()
        model, optimizer = build("adamw", sparsity=sparsity)
        train(plain, BASES["adamw"](plain.parameters()), 0, last)
        train(model, optimizer, 0, last)
        assert all(torch.equal(one, two) for one, two in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    optimizer.check()


def test_the_final_scores_are_the_mean_of_the_recorded_ones():
    """Every step's scores, collected by hand from a spy, lead to the groups that were removed."""
    model, optimizer = build(max_cycles=2, sampling_steps=6, hybrid_steps=6)
    recorded = []
    score = optimizer._pruner.scores
    optimizer._pruner.scores = lambda before: (recorded.append(score(before)), recorded[-1])[1]
    train(model, optimizer, 0, STEPS)
    assert len(recorded) in (6, 12)
    assert torch.allclose(torch.stack(recorded).mean(0), optimizer._score_sum_G / optimizer._records)
    lowest = Lowest(optimizer._index, optimizer._pruner.selector)(torch.stack(recorded).mean(0))
    assert torch.equal(lowest, torch.cat(list(optimizer.selection.values())))


# probe


def test_the_probe_zeroes_shares_of_each_family_and_changes_nothing():
    model, optimizer = build(schedule=Schedule(80, warmup=4, projection=0, joint=60), probe_weight=1.0)
    assert optimizer._plan.probe_steps == 1 + 9
    train(model, optimizer, 0, 4, loss=True)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    state = {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.base.state_dict()["state"].items()}
    zero, losses = [], []
    for step in range(4, 14):
        zero.append([int(flags.sum()) for flags in optimizer._index.selection(optimizer._index.zero_groups()).values()])
        losses += train(model, optimizer, step, step + 1, loss=True)
        assert optimizer.stage == "joint"
    quarters = [
        [[2, 4, 6][i] if f == 0 else 0, [1, 3, 4][i] if f == 1 else 0, [2, 5, 7][i] if f == 2 else 0] for f in range(3) for i in range(3)
    ]
    buffered = [[row[0], row[1], row[2]] for row in quarters]
    assert zero == [[0, 0, 0], *buffered]
    assert optimizer.progress()["phase"] == "cycle"
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    for i, entries in optimizer.base.state_dict()["state"].items():
        assert all(torch.equal(value, state[i][key]) for key, value in entries.items())
    assert optimizer._losses.tolist() == pytest.approx(losses)
    train(model, optimizer, 14, 80)
    optimizer.check()


def test_a_heavy_probe_protects_the_family_whose_absence_is_dear():
    """The loss depends on one family only, the one of smaller norms: magnitudes prune it, the probe's term doesn't."""
    removed = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        model = nn.Module()
        model.useful, model.useless = nn.Linear(4, 6), nn.Linear(4, 6)
        graph = ByHand(model, [family(name, 6, [f"{name}.weight", f"{name}.bias"]) for name in ("useful", "useless")])
        with torch.no_grad():
            model.useful.bias.fill_(1.0)
            model.useless.weight.mul_(10.0)
        schedule = Schedule(60, warmup=2, projection=0, joint=40)
        base = torch.optim.SGD(model.parameters(), lr=1e-5)
        optimizer = HESSOCRIC(base, graph, sparsity=0.4, schedule=schedule, saliency="magnitude", probe_weight=weight)
        for step in range(60):
            x = torch.randn(64, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = (model.useful(x) - 1.0).square().mean() + 0.0 * model.useless(x).sum()
            loss.backward()
            optimizer.step(loss=loss)
        optimizer.check()
        removed.append([int(flags.sum()) for flags in optimizer.selection.values()])
    assert removed == [[4, 0], [0, 4]]


def test_closures_work_in_every_phase():
    model, optimizer = build(schedule=Schedule(70, warmup=4, projection=0, joint=50), probe_weight=0.5)
    twin, second = build(schedule=Schedule(70, warmup=4, projection=0, joint=50), probe_weight=0.5)
    for step in range(70):
        x, y = batch(step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == train(twin, second, step, step + 1, loss=True)[0]
    assert all(torch.equal(one, two) for one, two in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    optimizer.check()


def test_learning_rate_schedulers_and_gradient_scalers_work_and_learning_rates_are_not_set_back():
    model, optimizer = build("adamw", schedule=Schedule(70, warmup=4, projection=0, joint=50), probe_weight=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 70)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    rates = []
    for step in range(70):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer, loss=loss)
        scaler.update()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    optimizer.check()
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)


def test_lists_in_the_state_of_the_base_go_back_too():
    """LBFGS keeps lists of tensors, and everything under its first parameter."""
    model, graph = net()
    base = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2, history_size=3)
    optimizer = HESSOCRIC(
        base, graph, sparsity=0.5, schedule=Schedule(30, warmup=3, projection=0, joint=22), max_cycles=2, sampling_steps=5
    )
    kept: list[list] = []
    for step in range(30):
        x, y = batch(step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        if optimizer.progress()["step"] in (3, 8):
            state = next(iter(base.state.values()))
            kept.append([state["func_evals"], [value.clone() for value in state["old_dirs"]]])
    assert kept[0][0] == kept[1][0]
    assert len(kept[0][1]) == len(kept[1][1]) > 0
    assert all(torch.equal(one, two) for one, two in zip(kept[0][1], kept[1][1], strict=True))
    optimizer.check()


def test_parameters_that_only_the_optimizer_knows_go_back_too():
    model, graph = net()
    scale = nn.Parameter(torch.ones(()))
    base = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    optimizer = HESSOCRIC(
        base, graph, sparsity=0.5, schedule=Schedule(30, warmup=3, projection=0, joint=22), max_cycles=2, sampling_steps=5
    )
    seen = []
    for step in range(9):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x) * scale, y).backward()
        optimizer.step()
        seen.append(scale.item())
    assert seen[7] == seen[2] != seen[6]


def test_what_is_wrong_with_a_loss_is_said_before_training():
    model, optimizer = build(schedule=Schedule(70, warmup=4, projection=0, joint=50), probe_weight=0.5)
    with pytest.raises(ConfigError, match=r"probe_weight = 0.5 compares losses: call optimizer.step\(loss=loss\)"):
        optimizer.step()
    with pytest.raises(ConfigError, match="give one of them"):
        optimizer.step(lambda: 1.0, loss=1.0)
    with pytest.raises(ConfigError, match=r"loss has shape \(2,\)"):
        optimizer.step(loss=torch.ones(2))
    assert optimizer.progress()["step"] == 0
    x, y = batch(0)
    for step in range(4 + 10):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if step < 4 + 9:
            optimizer.step(loss=-1.0)
    with pytest.raises(ConfigError, match="the reference loss is -1 and 0 of 10 losses are not finite"):
        optimizer.step(loss=-1.0)


# settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_cycles": 0}, "max_cycles is 0"),
        ({"tolerance": -1}, "tolerance is -1"),
        ({"sampling_steps": 0}, "sampling_steps is 0"),
        ({"hybrid_steps": 1.5}, "hybrid_steps is 1.5"),
        ({"probe_weight": -1.0}, "probe_weight is -1"),
        ({"probe_weight": float("nan")}, "probe_weight"),
        (
            {"sampling_steps": 10, "hybrid_steps": 7},
            r"has 36 steps, but 0 of the probe \+ max_cycles 3 \* sampling_steps 10 \+ hybrid_steps 7 are 37",
        ),
        ({"max_cycles": 40}, "use fewer or shorter cycles"),
        ({"schedule": Schedule(20, joint=6), "probe_weight": 1.0}, "has 6 steps, but 10 of the probe"),
        ({"schedule": Schedule(20, joint=0)}, "no joint stage"),
        ({"sparsity": 1.0}, "sparsity"),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        build(**options)


def test_quantizers_are_refused_and_unused_settings_noted():
    model, graph = net()
    quantize(model, weights=(4, 8), activations=None, exclude=())
    with pytest.raises(ConfigError, match="HESSOCRIC only prunes"):
        HESSOCRIC(BASES["adamw"](model.parameters()), graph, schedule=SCHEDULE)
    optimizer = build(schedule=Schedule(STEPS, joint_periods=2))[1]
    assert any("joint_periods = 2 has no effect" in note for note in optimizer.notes)


# properties


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    multiple_of=st.integers(1, 3),
    sparsity=st.floats(0.05, 0.9),
    numbers=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0, 7.0]), min_size=36, max_size=36),
)
@settings(max_examples=int(os.environ.get("GETA_FUZZ_EXAMPLES", "60")), deadline=None)
@pytest.mark.fuzz
def test_the_lowest_groups_on_the_device_are_those_of_the_selector(sizes, multiple_of, sparsity, numbers):
    model = nn.Module()
    for i, size in enumerate(sizes):
        model.register_parameter(f"p{i}", nn.Parameter(torch.ones(size)))
    graph = ByHand(model, [family(f"f{i}", size, [f"p{i}"]) for i, size in enumerate(sizes)])
    schedule = Schedule(30, warmup=1, projection=0, joint=20)
    optimizer = HESSOCRIC(torch.optim.SGD(model.parameters(), lr=0.1), graph, sparsity=sparsity, schedule=schedule, multiple_of=multiple_of)
    selector, total = optimizer._pruner.selector, sum(sizes)
    scores = torch.tensor(numbers[:total])
    lowest = optimizer._lowest(scores)
    assert int(lowest.sum()) == selector.target
    for start, size, counts in zip(selector.starts, sizes, selector.options, strict=False):
        assert int(lowest[start : start + size].sum()) <= counts[-1]
    if multiple_of == 1:
        nothing = torch.zeros(total, dtype=torch.bool).numpy()
        assert lowest.tolist() == selector.mark(scores.numpy(), nothing, selector.target).tolist()


@given(
    base=st.sampled_from(sorted(BASES)),
    sparsity=st.floats(0.05, 0.9),
    multiple_of=st.integers(1, 3),
    cycles=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3)),
    probe=st.booleans(),
    saliency=st.sampled_from([None, "taylor_first", "fisher", "activation", {"cosine": 1.0, "fisher": 0.5}]),
)
@settings(max_examples=int(os.environ.get("GETA_FUZZ_EXAMPLES", "12")), deadline=None)
@pytest.mark.fuzz
def test_exactly_k_zeros_for_any_settings(base, sparsity, multiple_of, cycles, probe, saliency):
    max_cycles, sampling, hybrid, tolerance = cycles
    joint = max_cycles * sampling + hybrid + 10 * probe
    model, optimizer = build(
        base,
        schedule=Schedule(joint + 8, warmup=3, projection=0, joint=joint),
        sparsity=sparsity,
        multiple_of=multiple_of,
        saliency=saliency,
        max_cycles=max_cycles,
        sampling_steps=sampling,
        hybrid_steps=hybrid,
        tolerance=tolerance,
        probe_weight=0.3 * probe,
    )
    selections = []

    def look() -> None:
        if optimizer.stage == "cool-down":
            selections.append(optimizer._index.zero_groups())

    train(model, optimizer, 0, joint + 8, look, loss=True)
    optimizer.check()
    assert len(selections) >= 5
    assert all(torch.equal(selections[0], later) for later in selections)
    for flags in optimizer.selection.values():
        kept = int((~flags).sum())
        assert kept == len(flags) or (kept > 0 and kept % multiple_of == 0)


class NoHostSync(TorchDispatchMode):
    """Fails on operators that wait for the device or whose output shape depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("saliency", [None, "fisher", "activation"])
def test_steps_inside_a_cycle_never_wait_for_the_device(saliency):
    model, optimizer = build(max_cycles=2, sampling_steps=8, hybrid_steps=8, saliency=saliency)
    inside = {"warm-up": (1, 9), "cycle": (1, 7), "hybrid": (1, 7), "cool-down": (1, 99)}
    checked = set()
    for step in range(STEPS):
        phase, k = optimizer._phase, optimizer._k
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        low, high = inside[phase]
        if low <= (step if phase in ("warm-up", "cool-down") else k) < high:
            checked.add(phase)
            with NoHostSync():
                optimizer.step()
        else:
            optimizer.step()
    assert checked == set(inside)
    optimizer.check()
