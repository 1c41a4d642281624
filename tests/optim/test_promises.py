"""The white-box promises over 200 random draws of network, sparsity, bits, schedule, base optimizer and forgetting rule.

Exactly K groups are zero at the end, a group that reached zero stays there, every bit width is an integer in its range, nothing is ever
non-finite, and the compact network computes what the zeroed one does.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geta

DRAWS = 200
SHARDS = 10
_OPTIMIZERS = ("sgd", "momentum", "nesterov", "adam", "adamw", "amsgrad", "rmsprop", "nadam", "adagrad")


class Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, width: int, inner: int, groups: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.first, self.norm = nn.Conv2d(width, inner, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(inner)
        self.second, self.head = nn.Conv2d(inner, width, 1), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(x.mean(dim=(2, 3)))


class Attention(nn.Module):
    """One block of a transformer with grouped keys and values."""

    def __init__(self, heads: int, kv_heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        width = 8
        self.q, self.k, self.v = (nn.Linear(width, n * size, bias=False) for n in (heads, kv_heads, kv_heads))
        self.o, self.norm = nn.Linear(heads * size, width), nn.LayerNorm(width)
        self.up, self.gate, self.down, self.head = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(12, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            part(h).unflatten(-1, (n, self.size)).transpose(1, 2)
            for part, n in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.heads != self.kv_heads)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(x.mean(dim=1))


def build(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """A network and the shape of one input."""
    kind = rng.choice(("mlp", "cnn", "residual", "attention", "tied"))
    if kind == "mlp":
        widths = [5, *(rng.randint(3, 14) for _ in range(rng.randint(1, 3)))]
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), rng.choice((nn.ReLU, nn.GELU, nn.Tanh))())]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 3)), (5,)
    if kind == "cnn":
        a, b = 2 * rng.randint(2, 5), rng.randint(3, 8)
        norm = rng.choice((nn.BatchNorm2d(a), nn.GroupNorm(2, a), nn.Identity()))
        body = [nn.Conv2d(2, a, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(a, a, 3, padding=1, groups=rng.choice((1, a)))]
        return nn.Sequential(*body, nn.Conv2d(a, b, 1), nn.PReLU(b), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(b, 3)), (2, 5, 5)
    if kind == "residual":
        width = 2 * rng.randint(2, 4)
        return Residual(width, 2 * rng.randint(2, 5), rng.choice((1, 2))), (2, 5, 5)
    if kind == "attention":
        return Attention(4, rng.choice((1, 2, 4)), rng.choice((2, 4))), (6, 8)
    shared = nn.Linear(9, 9)
    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(9, 3)), (5,)


def base(rng: random.Random, model: nn.Module) -> torch.optim.Optimizer:
    parameters: Any = list(model.parameters())
    if rng.random() < 0.3:  # groups with learning rates of their own
        parameters = [{"params": parameters[::2], "lr": 3e-3}, {"params": parameters[1::2], "weight_decay": 0.05}]
    rate = 10 ** rng.uniform(-4, -1.3)
    kind, decay = rng.choice(_OPTIMIZERS), rng.choice((0.0, 1e-4, 0.05))
    if kind in ("sgd", "momentum", "nesterov"):
        momentum = 0.0 if kind == "sgd" else 0.9
        return torch.optim.SGD(parameters, lr=rate, momentum=momentum, nesterov=kind == "nesterov", weight_decay=decay)
    if kind == "amsgrad":
        return torch.optim.Adam(parameters, lr=rate, amsgrad=True, weight_decay=decay)
    optimizers = {"adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop", "nadam": "NAdam", "adagrad": "Adagrad"}
    chosen: torch.optim.Optimizer = getattr(torch.optim, optimizers[kind])(parameters, lr=rate, weight_decay=decay)
    return chosen


def bits(rng: random.Random) -> tuple[int, int]:
    low = rng.randint(2, 8)
    return low, rng.randint(low, 10)


def schedule(rng: random.Random) -> geta.Schedule:
    warmup, projection, joint, cooldown = (rng.randint(low, 9) for low in (0, 1, 1, 1))
    return geta.Schedule(
        warmup + projection + joint + cooldown,
        warmup=warmup,
        projection=projection,
        joint=joint,
        projection_periods=rng.randint(1, projection),
        joint_periods=rng.randint(1, joint),
        initial_bits=rng.choice((10, 12, 16)),
    )


def finite(model: nn.Module) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values() if tensor.is_floating_point())


def check(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model, shape = build(rng)
    data = [torch.randn(4, *shape) for _ in range(3)]
    graph = geta.analyze(model, (data[0],))
    quantized = rng.random() < 0.85
    weights, activations = bits(rng), bits(rng) if rng.random() < 0.5 else None
    settings: dict[str, Any] = {"sparsity": rng.choice((0.0, 0.1, 0.3, 0.5, 0.7, 0.9)), "schedule": schedule(rng)}
    settings["forgetting"] = rng.choice(("descent", "uniform", "cosine", "blend"))
    settings["multiple_of"] = rng.choice((1, 1, 2))
    if quantized:
        granularity = rng.choice(("tensor", "channel"))
        batches = None if activations is None else data
        geta.quantize(model, weights=weights, activations=activations, calibration=batches, granularity=granularity, exclude=())
        settings |= {"quant_lr": 10 ** rng.uniform(-5, -3), "tighten": rng.random() < 0.5}
    optimizer = geta.QASSO(base(rng, model), graph, **settings)
    gone = torch.zeros(optimizer._index.num_groups, dtype=torch.bool)
    for step in range(settings["schedule"].total_steps):
        x = data[step % 3] * (1e3 if rng.random() < 0.02 else 1.0)  # an outlier now and then
        optimizer.zero_grad()
        F.cross_entropy(model(x), x.flatten(1)[:, :3].argmax(1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)  # or the outlier makes the plain optimizer diverge
        optimizer.step()
        assert finite(model), f"step {step}"
        if optimizer.stage in ("joint", "cool-down"):
            assert bool(optimizer._index.zero_groups()[gone].all()), f"a group came back at step {step}"
            gone = torch.from_numpy(optimizer._pruner.pruned.copy())
    optimizer.check()
    assert int(optimizer._index.zero_groups().sum()) == optimizer.target_groups
    wanted = int(settings["sparsity"] * optimizer._index.num_groups)
    assert optimizer.target_groups == wanted or any(f"{wanted}" in note for note in optimizer.notes), optimizer.notes
    ranges = {"weight": weights, "activation": activations}
    for name, quantizer in geta.quant.quantizers(model).items():
        low, high = ranges[quantizer.kind]
        width = optimizer.bits[quantizer.name]
        assert width == round(width) and low <= width <= high, f"{name}: {width} bits, allowed {low} to {high}"
    small = geta.compact(model.eval(), graph)
    x = torch.randn(3, *shape)
    if not quantized:
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)
    assert bool(small(x).isfinite().all())


@pytest.mark.parametrize("shard", range(SHARDS))
def test_promises_hold_for_random_draws(shard):
    for seed in range(shard, DRAWS, SHARDS):
        try:
            check(seed)
        except Exception as error:
            raise AssertionError(f"draw {seed}: {type(error).__name__}: {error}") from error
