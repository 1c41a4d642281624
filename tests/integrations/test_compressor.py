"""The object that joins all stages: what it returns, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geta
from geta.errors import ConfigError


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


IMAGES = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 4


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    model.eval()


def test_from_model_to_compact_model(tmp_path):
    model = small_net()
    compressor = geta.Compressor(model, (IMAGES,), sparsity=0.5, weight_bits=(4, 8), activation_bits=8, calibration=[IMAGES])
    optimizer = compressor.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=60)
    assert isinstance(optimizer, geta.QASSO)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    train(model, optimizer, 60)
    small = compressor.finish()
    assert sum(map(len, small.kept.values())) == compressor.graph.num_groups // 2 == 12
    assert all(isinstance(bits, int) and 4 <= bits <= 8 for bits in small.bits.values())
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in small_net().parameters())
    small.eval().save(tmp_path / "small")
    assert torch.equal(geta.load(tmp_path / "small").eval()(IMAGES), small(IMAGES))


def test_pruning_alone_is_the_zeroed_model():
    model = small_net()
    compressor = geta.Compressor(model, (IMAGES,), sparsity=0.25, weight_bits=None)
    train(model, compressor.optimizer(torch.optim.SGD, lr=0.05, schedule=geta.Schedule(total_steps=40)), 40)
    small = compressor.finish().eval()
    assert small.bits == {}
    assert sum(map(len, small.kept.values())) == 18
    torch.testing.assert_close(small(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


def test_an_optimizer_of_ones_own_is_wrapped():
    model = small_net()
    compressor = geta.Compressor(model, (IMAGES,), sparsity=0.5)
    assert compressor.progress() is None
    assert compressor.trained_by is None
    layers = [{"params": model[0].parameters(), "lr": 0.01}, {"params": [*model[1:].parameters()], "lr": 0.1}]
    base = torch.optim.SGD(layers, momentum=0.9)
    optimizer = compressor.wrap(base, total_steps=40, compression={"quant_lr": 1e-4})
    assert optimizer.base is base
    assert compressor.trained_by is optimizer
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1, 1e-4]
    train(model, optimizer, 40)
    assert compressor.progress() == optimizer.progress()
    assert type(compressor.finish("eager")) is nn.Sequential
    with pytest.raises(ConfigError, match="already has its optimizer"):
        compressor.wrap(base, total_steps=40)
    with pytest.raises(ConfigError, match="exactly one of total_steps"):
        geta.Compressor(small_net(), (IMAGES,), sparsity=0.5).wrap(base)


def test_settings_of_the_compression_reach_the_optimizer():
    compressor = geta.Compressor(small_net(), (IMAGES,), sparsity=0.5)
    with pytest.raises(TypeError, match="no_such_setting"):
        compressor.optimizer(torch.optim.SGD, lr=0.1, total_steps=60, compression={"no_such_setting": 1})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.0}, "sparsity = 1.0"),
        ({"sparsity": -0.1}, "sparsity = -0.1"),
        ({"sparsity": 0.0, "weight_bits": None}, "nothing would become smaller"),
        ({"sparsity": 0.5, "weight_bits": None, "granularity": "channel"}, "have no effect without quantization"),
        ({"sparsity": 0.5, "weight_bits": None, "calibration": [IMAGES]}, "have no effect without quantization"),
        ({"sparsity": 0.5, "weight_bits": (8, 4)}, r"\(8, 4\)"),
        ({"sparsity": 0.5, "activation_bits": 8}, "calibration"),
        ({"sparsity": 0.5, "multiple_of": 0}, "multiple_of"),
    ],
)
def test_impossible_settings(settings, words):
    model = small_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=words):
        geta.Compressor(model, (IMAGES,), **settings)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_order_of_calls_is_checked():
    model = small_net()
    compressor = geta.Compressor(model, (IMAGES,), sparsity=0.5)
    with pytest.raises(ConfigError, match="call optimizer"):
        compressor.finish()
    with pytest.raises(ConfigError, match="exactly one of total_steps"):
        compressor.optimizer(torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match="exactly one of total_steps"):
        compressor.optimizer(torch.optim.SGD, lr=0.1, total_steps=40, schedule=geta.Schedule(total_steps=40))
    optimizer = compressor.optimizer(torch.optim.SGD, lr=0.05, total_steps=40)
    with pytest.raises(ConfigError, match="already has its optimizer"):
        compressor.optimizer(torch.optim.SGD, lr=0.05, total_steps=40)
    train(model, optimizer, 8)
    with pytest.raises(ConfigError, match="stopped in stage 'projection' at step 8"):
        compressor.finish()
