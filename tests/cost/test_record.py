"""The record of costs: comparison, JSON, printing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from geta.cost import Cost, cost
from geta.errors import CheckpointError, ConfigError


@pytest.fixture
def counted():
    return cost(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), (torch.randn(3, 6),))


def test_json_round_trip(counted):
    data = json.loads(json.dumps(counted.to_json()))
    assert Cost.from_json(data) == counted
    assert data["macs"] == 3 * (24 + 8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("macs"),
        lambda data: data.update(more=1),
        lambda data: data["per_op"].append({"name": "x"}),
        lambda data: data["per_op"].append(3),
        lambda data: data.update(macs="many"),
        lambda data: data.update(per_op=None),
        lambda data: data.update(input_shapes=[["a"]]),
        lambda data: data["per_op"][0].update(macs="1"),
        lambda data: data["per_op"][0].update(name=7),
    ],
)
def test_damaged_json_is_refused(counted, damage):
    data = counted.to_json()
    damage(data)
    with pytest.raises(CheckpointError):
        Cost.from_json(data)


def test_what_is_no_json_object_is_refused():
    with pytest.raises(CheckpointError):
        Cost.from_json([1, 2])


def test_ratios(counted):
    wide = cost(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(3, 6),))
    ratios = counted.relative_to(wide)
    assert ratios == {"macs": 0.5, "bops": 0.5, "params": 38 / 74, "weight_bytes": 38 / 74}
    nothing = cost(nn.ReLU(), (torch.randn(3, 6),))
    assert nothing.relative_to(nothing)["macs"] == 1.0
    assert counted.relative_to(nothing)["macs"] == float("inf")


def test_other_inputs_can_not_be_compared(counted):
    other = cost(nn.Linear(6, 4), (torch.randn(4, 6),))
    with pytest.raises(ConfigError, match=r"\[3, 6\] here, \[4, 6\] in the other"):
        counted.relative_to(other)


def test_the_table_reads_well(counted):
    lines = str(counted).splitlines()
    assert lines[0].split() == ["module", "op", "MACs", "weight", "bits", "act.", "bits", "BOPs"]
    assert lines[1].split() == ["0", "linear", "72", "32", "32", "73,728"]
    assert lines[-1] == "38 parameters, 152 bytes, for inputs [3, 6]"
