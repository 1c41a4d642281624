"""HESSO over real torch optimizers: its path exactly, exactly K zeros that stay, bitwise resume, the bare optimizer when switched off."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geta
from geta.errors import CheckpointError, ConfigError, GetaError
from geta.optim import HESSO, Saliency, Schedule
from geta.quant import quantize
from optim_nets import ByHand, batch, family, leaves, net, through_a_file, train

STEPS = 24
SCHEDULE = Schedule(STEPS, warmup=4, projection=4, joint=8, projection_periods=1, joint_periods=2)
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def build(base: str = "momentum", *, seed: int = 0, schedule: Schedule = SCHEDULE, **settings):
    model, graph = net(seed)
    return model, HESSO(BASES[base](model.parameters()), graph, schedule=schedule, **{"sparsity": 0.5, **settings})


def same(one: nn.Module, two: nn.Module) -> None:
    for (name, mine), (_, theirs) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name


def test_it_is_public():
    assert geta.HESSO is HESSO


@pytest.mark.parametrize("name", sorted(BASES))
def test_switched_off_it_is_bitwise_the_base_optimizer(name):
    plain, _ = net()
    bare = BASES[name](plain.parameters())
    model, optimizer = build(name, sparsity=0.0)
    train(plain, bare, 0, 20)
    train(model, optimizer, 0, 20)
    same(plain, model)
    assert optimizer.stage == "cool-down"
    optimizer.check()


def test_the_path_is_the_formula():
    """Linear neurons with constant gradients, so that delta is known: x_R <- (x_R + delta) (K_p - k - 1) / (K_p - k)."""
    model = nn.Linear(3, 4, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2, 3], [0.1, 0.1, 0.1], [4, 5, 6], [0.2, 0.1, 0.1]]))
    start = model.weight.detach().clone()
    grads = torch.tensor([[1.0, -1, 1], [1, 1, -1], [-1, 1, 1], [-1, -1, 1]], dtype=torch.float64)
    graph = ByHand(model, [family("neurons", 4, ["weight"])])
    lr, periods, length = 0.01, 2, 5
    schedule = Schedule(14, warmup=2, projection=0, joint=periods * length, joint_periods=periods)
    optimizer = HESSO(torch.optim.SGD(model.parameters(), lr=lr), graph, sparsity=0.5, schedule=schedule, saliency="magnitude")
    expected, gone, chosen = start.clone(), set(), set()
    for step in range(14):
        optimizer.zero_grad()
        (model.weight * grads).sum().backward()
        optimizer.step()
        if 2 <= step < 12 and (step - 2) % length == 0:  # one of the two smallest rows per period, by the value before the step
            norms = {row: expected[row].norm().item() for row in range(4) if row not in gone}
            chosen = {min(norms, key=norms.get)}
        expected = expected - lr * grads
        k = (step - 2) % length
        for row in chosen:
            expected[row] *= (length - k - 1) / (length - k)
        if 2 <= step < 12 and k == length - 1:
            gone, chosen = gone | chosen, set()
        for row in gone:
            expected[row] = 0.0
        assert torch.allclose(model.weight, expected, rtol=1e-12, atol=1e-15), step
    assert gone == {1, 3}
    optimizer.check()


@pytest.mark.parametrize("base", sorted(BASES))
def test_exactly_k_groups_end_at_zero_and_stay_there(base):
    model, optimizer = build(base)
    counts = []

    def look() -> None:
        zero = optimizer._index.zero_groups()
        removed = torch.cat(list(optimizer.selection.values()))
        assert torch.equal(zero, removed)
        counts.append(int(zero.sum()))

    train(model, optimizer, 0, STEPS, look)
    assert counts == [0] * 11 + [6] * 4 + [12] * 9
    assert optimizer.target_groups == 12
    optimizer.check()
    assert model.norm.running_mean[optimizer.selection["conv"]].abs().sum() == 0
    assert "12 of 24 groups removed, 12 wanted" in optimizer.report()


def test_alignment_keeps_multiples():
    model, optimizer = build(multiple_of=4)
    train(model, optimizer, 0, STEPS)
    optimizer.check()
    kept = {name: int((~removed).sum()) for name, removed in optimizer.selection.items()}
    assert all(kept[name] in allowed for name, allowed in {"conv": (4, 8), "first": (4, 6), "second": (4, 8, 10)}.items()), kept


def test_a_projection_stage_counts_as_warm_up():
    model, optimizer = build()
    plain, _ = net()
    stages = []
    train(plain, BASES["momentum"](plain.parameters()), 0, 8)
    train(model, optimizer, 0, 8, lambda: stages.append(optimizer.stage))
    same(plain, model)
    assert stages == ["warm-up"] * 7 + ["joint"]
    assert (optimizer.schedule.warmup_steps, optimizer.schedule.projection_steps, optimizer.schedule.cooldown_start) == (8, 0, 16)


def test_quantizers_are_refused():
    model, graph = net()
    quantize(model, weights=(4, 8), activations=None, exclude=())
    with pytest.raises(ConfigError, match=r"the model has 4 quantizers \(first: 'conv.weight'\), but HESSO only prunes.*geta.QASSO"):
        HESSO(BASES["sgd"](model.parameters()), graph, schedule=SCHEDULE)


def test_closures_are_called_once_and_their_loss_comes_back():
    model, optimizer = build("sgd")
    twin, second = build("sgd")
    calls = []
    for step in range(STEPS):
        x, y = batch(step)

        def closure(x=x, y=y):
            calls.append(1)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        returned = optimizer.step(closure)
        assert returned.item() == train(twin, second, step, step + 1)[0]
    assert len(calls) == STEPS
    same(model, twin)
    optimizer.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_that_two_families_zero_decay_along_both_dimensions(dtype):
    """`second.weight` loses rows with one family and columns with another: the general branch of the decay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).to(dtype)
    graph = ByHand(
        model,
        [family("inner", 6, ["0.weight", "0.bias"], ["2.weight"], zero=True), family("outer", 5, ["2.weight", "2.bias"])],
    )
    schedule = Schedule(10, warmup=1, projection=0, joint=6, joint_periods=1)
    optimizer = HESSO(torch.optim.SGD(model.parameters(), lr=0.0), graph, sparsity=0.5, schedule=schedule)
    start = model[2].weight.detach().clone()
    for step in range(10):
        optimizer.zero_grad()
        model(torch.randn(8, 4, dtype=dtype)).square().sum().backward()
        optimizer.step()
        flags = optimizer.redundant if 1 <= step < 6 else optimizer.selection
        mask = flags["outer"][:, None] | flags["inner"][None, :]
        share = min(max((6 - step) / 6, 0.0), 1.0)
        assert mask.any() == (step >= 1)
        expected = torch.where(mask, start * share, start)
        assert torch.allclose(model[2].weight, expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0.0), step
    assert 0 < int(optimizer.selection["inner"].sum()) < 6
    optimizer.check()


@pytest.mark.parametrize("base", ["adamw", "momentum"])
@pytest.mark.parametrize("stop", [2, 8, 9, 11, 12, 15, 16, 20])
def test_the_next_steps_after_a_resume_are_bitwise_the_same(base, stop):
    model, optimizer = build(base)
    train(model, optimizer, 0, stop)
    saved = through_a_file(model, optimizer)
    losses = train(model, optimizer, stop, STEPS)
    resumed, second = build(base, seed=9)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert train(resumed, second, stop, STEPS) == losses
    same(model, resumed)
    assert second.progress() == optimizer.progress()
    assert {type(value) for _, value in leaves(saved["optimizer"])} <= {torch.Tensor, int, float, bool, str, type(None)}


def test_other_settings_are_refused_on_resume():
    model, optimizer = build()
    train(model, optimizer, 0, 9)
    saved = copy.deepcopy(optimizer.state_dict())
    for other, key in (
        ({"sparsity": 0.3}, "target_groups"),
        ({"saliency": "fisher"}, "observers"),
        ({"schedule": Schedule(40)}, "schedule"),
    ):
        with pytest.raises(CheckpointError, match=f"made with {key}"):
            build(**other)[1].load_state_dict(saved)


def test_a_saliency_instance_is_accepted():
    model, optimizer = build(saliency=Saliency("magnitude", normalise="family"))
    train(model, optimizer, 0, STEPS)
    optimizer.check()
    removed = [int(flags.sum()) for flags in optimizer.selection.values()]
    assert min(removed) > 0, "per-family normalisation takes from every family"


def test_stopping_early_is_said():
    model, optimizer = build()
    train(model, optimizer, 0, 10)
    with pytest.raises(GetaError, match="stopped at step 10, in joint; targets are met from step 16"):
        optimizer.check()
