"""Interrupted runs: the state holds tensors and plain data only, and the next steps are bitwise the same."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from geta.errors import CheckpointError
from geta.graph.families import Family, Member
from geta.optim import QASSO, Schedule
from geta.quant import quantize, quantizers

SCHEDULE = Schedule(30, warmup=5, projection=6, joint=12, projection_periods=3, joint_periods=3)


def build(base: str = "adamw", *, seed: int = 0, schedule: Schedule = SCHEDULE, **settings):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    quantize(model, weights=(3, 6), activations=(6, 8), calibration=[torch.randn(16, 5)], granularity="channel", exclude=())
    graph = Graph(model)
    bases = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    }
    return model, QASSO(bases[base](), graph, schedule=schedule, **{"sparsity": 0.5, **settings})


class Graph:
    """Two families written by hand, one of them with a buffer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.families = [self.family("0", 12, ["0.weight", "0.bias"])]
        self.families.append(self.family("2", 9, ["2.weight", "2.bias", "3.weight", "3.bias", "3.running_mean"]))

    @staticmethod
    def family(name: str, size: int, params: list[str]) -> Family:
        index = torch.arange(size)[:, None]
        return Family(name, "neurons", size, True, "", tuple(Member(param, 0, index, "producer", True) for param in params))


def train(model: nn.Module, optimizer: QASSO, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 5, generator=generator), torch.randint(0, 3, (16,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            assert isinstance(key, str | int)
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}.{number}")
    else:
        yield path, value


@pytest.mark.parametrize(
    ("base", "stop"), [("adamw", stop) for stop in (3, 5, 8, 11, 12, 14, 15, 22, 23, 27)] + [("momentum", stop) for stop in (3, 9, 14, 25)]
)
def test_the_next_steps_after_a_resume_are_bitwise_the_same(base, stop):
    """Stops inside each of the four stages, at their boundaries and at period boundaries."""
    model, optimizer = build(base)
    train(model, optimizer, 0, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    losses = train(model, optimizer, stop, stop + 5)

    resumed, second = build(base, seed=99)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert second.stage == SCHEDULE.stage_at(stop)
    assert train(resumed, second, stop, stop + 5) == losses
    for (name, one), (_, two) in zip(model.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert second.progress() == optimizer.progress()


def test_the_state_is_tensors_and_plain_data():
    model, optimizer = build()
    train(model, optimizer, 0, 14)
    kinds = {type(value) for _, value in leaves(optimizer.state_dict())}
    assert kinds <= {torch.Tensor, int, float, bool, str, type(None)}
    assert {"settings", "step", "stage", "noted", "redundant", "pruned", "bits", "followed"} == set(optimizer.state_dict()["geta"])


def test_the_state_is_a_copy_of_our_part():
    model, optimizer = build()
    train(model, optimizer, 0, 13)
    saved = optimizer.state_dict()["geta"]
    before = saved["redundant"].clone()
    train(model, optimizer, 13, 23)
    assert torch.equal(saved["redundant"], before)
    assert saved["step"] == 13


def test_signs_found_in_another_calibration_follow_the_model():
    model, optimizer = build()
    for quantizer in quantizers(model).values():
        quantizer.signed = True
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 0, 30)
    optimizer.check()


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"sparsity": 0.3}, "target_groups"),
        ({"schedule": Schedule(31)}, "schedule"),
        ({"multiple_of": 3}, "target_groups|multiple_of"),
        ({"forgetting": "uniform"}, "forgetting"),
        ({"weight_bits": (2, 6)}, "bits"),
    ],
)
def test_other_settings_are_refused_and_nothing_changes(other, key):
    model, optimizer = build()
    train(model, optimizer, 0, 14)
    saved = optimizer.state_dict()
    second_model, second = build(**other)
    before = {name: value.clone() for name, value in second_model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"the checkpoint was made with ({key}) = "):
        second.load_state_dict(saved)
    assert second.progress()["step"] == 0
    assert not second.state
    assert all(torch.equal(value, before[name]) for name, value in second_model.state_dict().items())


def test_foreign_and_damaged_states_are_refused():
    model, optimizer = build()
    with pytest.raises(CheckpointError, match="saved by a plain optimizer"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    damaged = optimizer.state_dict()
    del damaged["geta"]["pruned"]
    with pytest.raises(CheckpointError, match="lacks pruned"):
        optimizer.load_state_dict(damaged)
    fewer = optimizer.state_dict()
    fewer["param_groups"] = fewer["param_groups"][:1]
    with pytest.raises(CheckpointError, match="state of AdamW doesn't fit"):
        optimizer.load_state_dict(fewer)


def test_hooks_on_the_state_are_called():
    model, optimizer = build()
    calls = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: {k: v for k, v in state.items() if k != "note"})
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("loaded"))
    train(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    assert state["note"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["save", "loaded"]
    assert optimizer.state is optimizer.base.state
