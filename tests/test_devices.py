"""Device profiles: named numbers, accepted wherever `multiple_of` is, and one error for unknown names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import geta
from geta.devices import PROFILES, resolve_multiple
from geta.errors import ConfigError
from geta.optim import Selector


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 4))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))
def test_profiles_are_complete(profile):
    assert geta.device_profile(profile.name) == profile
    assert profile.multiple_of in (8, 16, 32)
    assert 8 in profile.weight_bits
    assert 8 in profile.activation_bits
    assert profile.name in str(profile)
    assert profile.source in str(profile)
    assert f"multiples of {profile.multiple_of}" in str(profile)


def test_the_flag_of_the_export_follows_the_instructions():
    assert {name: profile.uint8_weights for name, profile in PROFILES.items()} == {
        "cpu": True,
        "avx512-vnni": False,
        "arm-dotprod": False,
        "nvidia-int8": False,
    }


@pytest.mark.parametrize(
    ("name", "hint"), [("avx512_vnni", "did you mean 'avx512-vnni'"), ("CPU", "did you mean 'cpu'"), ("qqq", "known are")]
)
def test_an_unknown_name_is_an_error_with_the_known_ones(name, hint):
    for call in (geta.device_profile, resolve_multiple):
        with pytest.raises(ConfigError, match=hint) as caught:
            call(name)
        assert all(known in str(caught.value) for known in PROFILES)


@pytest.mark.parametrize("value", [0, -8, 2.0, True, None])
def test_what_is_no_multiple_is_refused(value):
    with pytest.raises(ConfigError, match="multiple_of"):
        resolve_multiple(value)


def test_every_place_that_takes_a_multiple_takes_a_profile():
    graph = geta.analyze(network(), (torch.randn(2, 6),))
    by_name, by_number = (graph.random_selection(0.6, multiple_of=multiple) for multiple in ("avx512-vnni", 16))
    assert all(torch.equal(by_name[family], by_number[family]) for family in by_number)
    assert Selector([64, 32], 40, "avx512-vnni").target == Selector([64, 32], 40, 16).target
    for optimizer in (geta.QASSO, geta.HESSO, geta.HESSOCRIC):
        model = network()
        graph = geta.analyze(model, (torch.randn(2, 6),))
        settings = {"sparsity": 0.6, "schedule": geta.Schedule(40)}
        runs = [
            optimizer(torch.optim.SGD(model.parameters(), lr=0.1), graph, multiple_of=multiple, **settings)
            for multiple in ("nvidia-int8", 32)
        ]
        assert runs[0].target_groups == runs[1].target_groups == 8 + 16
        with pytest.raises(ConfigError, match="did you mean 'nvidia-int8'"):
            optimizer(torch.optim.SGD(model.parameters(), lr=0.1), graph, multiple_of="nvidia", **settings)


def test_the_compressor_takes_a_profile():
    x = torch.randn(2, 6)
    compressor = geta.Compressor(network(), (x,), sparsity=0.6, multiple_of="nvidia-int8")
    optimizer = compressor.optimizer(torch.optim.SGD, lr=0.1, total_steps=40)
    assert optimizer.target_groups == 8 + 16
    with pytest.raises(ConfigError, match="no device profile is called 'tpu'"):
        geta.Compressor(network(), (x,), sparsity=0.6, multiple_of="tpu")
