"""HESSO-CRIC interrupted anywhere: inside the probe, cycles, the hybrid period; what follows is bitwise the same."""

from __future__ import annotations

import pytest
import torch

from geta.errors import CheckpointError
from geta.optim import HESSOCRIC, Schedule
from optim_nets import leaves, net, through_a_file, train

STEPS = 46
SCHEDULE = Schedule(STEPS, warmup=5, projection=0, joint=36)
OPTIONS = {"max_cycles": 3, "sampling_steps": 6, "hybrid_steps": 8, "probe_weight": 0.5}


def build(base: str = "adamw", *, seed: int = 0, **options):
    model, graph = net(seed)
    bases = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    }
    return model, HESSOCRIC(bases[base](), graph, **{"sparsity": 0.5, "schedule": SCHEDULE, **OPTIONS, **options})


def interrupted(stop: int, base: str, **options) -> str:
    """The phase in which the run was cut, after checking that the rest is bitwise the same."""
    model, optimizer = build(base, **options)
    train(model, optimizer, 0, stop, loss=True)
    phase = optimizer.progress()["phase"]
    saved = through_a_file(model, optimizer)
    losses = train(model, optimizer, stop, STEPS, loss=True)
    resumed, second = build(base, seed=9, **options)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert (second.progress()["phase"], second.stage) == (phase, saved["optimizer"]["geta"]["stage"])
    assert train(resumed, second, stop, STEPS, loss=True) == losses
    for (name, mine), (_, theirs) in zip(model.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name
    assert second.progress() == optimizer.progress()
    second.check()
    return phase


def test_a_cut_after_any_step_changes_nothing():
    phases = [interrupted(stop, "adamw") for stop in range(1, STEPS)]
    assert set(phases) == {"warm-up", "probe", "cycle", "hybrid", "cool-down"}


@pytest.mark.parametrize("saliency", ["fisher", "activation", {"magnitude": 1.0, "fisher": 1.0, "activation": 1.0}])
@pytest.mark.parametrize("stop", [3, 5, 6, 11, 15, 18, 21, 24, 30])
def test_what_was_observed_is_kept(stop, saliency):
    assert interrupted(stop, "momentum", saliency=saliency)


@pytest.mark.parametrize("stop", [2, 8, 17, 35, 44])
def test_the_state_is_tensors_and_plain_data_and_a_copy(stop):
    model, optimizer = build(saliency={"magnitude": 1.0, "fisher": 1.0, "activation": 1.0})
    train(model, optimizer, 0, stop, loss=True)
    saved = optimizer.state_dict()
    kinds = {type(value) for _, value in leaves(saved)}
    assert kinds <= {torch.Tensor, int, float, bool, str, type(None)}
    ours = {path: value.clone() if isinstance(value, torch.Tensor) else value for path, value in leaves(saved["geta"])}
    train(model, optimizer, stop, STEPS, loss=True)
    for path, value in leaves(saved["geta"]):
        assert torch.equal(value, ours[path]) if isinstance(value, torch.Tensor) else value == ours[path], path


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"max_cycles": 2}, "cycles"),
        ({"tolerance": 1}, "cycles"),
        ({"saliency": "fisher"}, "observers"),
        ({"sparsity": 0.4}, "target_groups"),
    ],
)
def test_other_settings_are_refused(other, key):
    model, optimizer = build()
    train(model, optimizer, 0, 20, loss=True)
    with pytest.raises(CheckpointError, match=f"made with {key}"):
        build(**other)[1].load_state_dict(optimizer.state_dict())
