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


class Attention(nn.Module):
    """Six heads of eight channels with a bias for each, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(48, 144), nn.Linear(48, 48)
        self.bias = nn.Parameter(torch.zeros(6, 1, 1))
        self.up, self.down = nn.Linear(48, 40), nn.Linear(40, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:-1], 3, 6, 8).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) + self.bias).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(-2))
        return x + self.down(self.up(x).relu())


def test_a_profile_counts_channels_and_a_number_counts_groups():
    graph = geta.analyze(Attention(), (torch.randn(2, 5, 48),))
    heads, neurons = sorted(graph.prunable_families, key=lambda family: family.size)
    assert (heads.unit, heads.size, heads.channels) == ("heads", 6, 8)
    assert (neurons.size, neurons.channels) == (40, 1)
    kept = {name: int((~remove).sum()) for name, remove in graph.random_selection(0.5, multiple_of="cpu").items()}
    assert kept == {heads.name: 3, neurons.name: 24}  # 3 heads have 24 channels
    kept = {name: int((~remove).sum()) for name, remove in graph.random_selection(0.5, multiple_of="avx512-vnni").items()}
    assert kept == {heads.name: 4, neurons.name: 32}
    kept = {name: int((~remove).sum()) for name, remove in graph.random_selection(0.5, multiple_of=8).items()}
    assert kept == {heads.name: 6, neurons.name: 24}


@pytest.mark.parametrize("multiple_of", ["cpu", "avx512-vnni", 8])
def test_optimizers_count_as_the_selection_does(multiple_of):
    model = Attention()
    graph = geta.analyze(model, (torch.randn(2, 5, 48),))
    settings = {"sparsity": 0.9, "schedule": geta.Schedule(20, warmup=0.0, projection=0.0), "multiple_of": multiple_of}
    optimizer = geta.HESSO(torch.optim.SGD(model.parameters(), lr=0.01), graph, **settings)
    kept = {"cpu": {"heads": 1, "neurons": 8}, "avx512-vnni": {"heads": 2, "neurons": 16}, 8: {"heads": 6, "neurons": 8}}[multiple_of]
    assert optimizer.target_groups == 46 - sum(kept.values())
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(2, 5, 48)).square().mean().backward()
        optimizer.step()
    small = geta.compact(model, graph)
    sizes = {family.unit: len(small.info.kept[family.name]) for family in graph.prunable_families}
    assert sorted(sizes.values()) == sorted(kept.values())
    others = {"cpu", "avx512-vnni", 8} - {multiple_of}
    state = optimizer.state_dict()
    for other in others:
        wrong = geta.HESSO(torch.optim.SGD(model.parameters(), lr=0.01), graph, **{**settings, "multiple_of": other})
        with pytest.raises(geta.errors.CheckpointError, match="resume with the same settings"):
            wrong.load_state_dict(state)


def test_the_compressor_takes_a_profile():
    x = torch.randn(2, 6)
    compressor = geta.Compressor(network(), (x,), sparsity=0.6, multiple_of="nvidia-int8")
    optimizer = compressor.optimizer(torch.optim.SGD, lr=0.1, total_steps=40)
    assert optimizer.target_groups == 8 + 16
    with pytest.raises(ConfigError, match="no device profile is called 'tpu'"):
        geta.Compressor(network(), (x,), sparsity=0.6, multiple_of="tpu")
