"""Small networks with residual branches of every kind, with the branches that can go and those that can't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets import randomize

WIDTH = 8
Built = tuple[nn.Module, tuple[Any, ...]]


class Wrapped(nn.Module):
    """x + branch(x), then `after`."""

    def __init__(self, branch: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.after = branch, after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.branch(x))


class InPlace(nn.Module):
    """As ResNets write it: the sum and what follows overwrite memory."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch, self.relu = branch, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += x
        return self.relu(out)


class ReadAgain(nn.Module):
    """The stream is read after the sum was written over in place, so the two must not share memory."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        total = x + self.branch(x)
        total.mul_(2.0)
        return total * x


class Attention(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Parallel(nn.Module):
    """Attention and MLP read the same norm and are added to each other first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(), mlp(norm=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.attn(h) + self.mlp(h) + x


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]


class Scale(nn.Module):
    """A layer scale, and a path that is dropped for some examples in training."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.gamma[:, None, None] * x
        if self.training:
            scaled = scaled * scaled.new_empty((len(x), 1, 1, 1)).fill_(2.0)
        return scaled


class Shared(nn.Module):
    """One layer is the branch of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x).relu()
        return x + self.layer(x).tanh()


class Shown(nn.Module):
    """The branch's result is also returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        branch = self.layer(x)
        return x + branch, branch


class Adapted(nn.Module):
    """A low-rank adapter beside the last layer of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.lora_a, self.lora_b = nn.Linear(12, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return x + (self.down(h) + self.lora_b(self.lora_a(h)))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.table


def mlp(*after: nn.Module, norm: bool = True) -> nn.Sequential:
    return nn.Sequential(*([nn.LayerNorm(WIDTH)] if norm else []), nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH), *after)


def basic(*after: nn.Module) -> nn.Sequential:
    def conv() -> list[nn.Module]:
        return [nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)]

    return nn.Sequential(*conv(), nn.ReLU(), *conv(), *after)


def on_tokens(*blocks: nn.Module) -> Built:
    net = nn.Sequential(nn.Linear(6, WIDTH), *blocks, nn.Linear(WIDTH, 3))
    return randomize(net), (torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1)),)


def on_images(*blocks: nn.Module) -> Built:
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3))
    return randomize(net), (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)),)


def convnext() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.Conv2d(WIDTH, 16, 1), nn.GELU(), nn.Conv2d(16, WIDTH, 1), Scale()
    )


NETS: dict[str, tuple[Callable[[], Built], tuple[str, ...]]] = {
    "basic blocks": (lambda: on_images(*[Wrapped(basic(), nn.ReLU()) for _ in range(3)]), ("1.branch", "2.branch", "3.branch")),
    "in place": (lambda: on_images(*[InPlace(basic()) for _ in range(3)]), ("1.branch", "2.branch", "3.branch")),
    "read again": (lambda: on_images(*[ReadAgain(basic()) for _ in range(2)]), ("1.branch", "2.branch")),
    "squeeze": (lambda: on_images(*[Wrapped(basic(Gate())) for _ in range(2)]), ("1.branch", "2.branch")),
    "convnext": (lambda: on_images(*[Wrapped(convnext()) for _ in range(2)]), ("1.branch", "2.branch")),
    "pre-norm": (
        lambda: on_tokens(*[m for _ in range(2) for m in (Wrapped(Attention()), Wrapped(mlp()))]),
        tuple(f"{n}.branch" for n in (1, 2, 3, 4)),
    ),
    "post-norm": (lambda: on_tokens(*[Wrapped(mlp(norm=False), nn.LayerNorm(WIDTH)) for _ in range(2)]), ("1.branch", "2.branch")),
    "norm behind": (lambda: on_tokens(*[Wrapped(mlp(nn.LayerNorm(WIDTH))) for _ in range(2)]), ("1.branch", "2.branch")),
    "parallel": (lambda: on_tokens(Parallel(), Parallel()), ("1.attn", "1.mlp", "2.attn", "2.mlp")),
    "adapter": (lambda: on_tokens(Adapted(), Adapted()), ("1", "2")),
}
"""Name -> (what makes the network, the branches that can go)."""

STUCK: dict[str, tuple[Callable[[], Built], str]] = {
    "sigmoid": (lambda: on_tokens(Wrapped(mlp(nn.Sigmoid()))), "passes sigmoid at 1.branch.4, which isn't known to make zero of zero"),
    "positions": (lambda: on_tokens(Wrapped(Positions())), "has '1.branch.table' added, which is no parameter"),
    "shared": (lambda: on_tokens(Shared()), "has '1.layer.bias' read at linear at 1.layer too"),
    "shown": (lambda: (Shown(), (torch.randn(2, WIDTH),)), "has the result of linear at layer read at the model's output too"),
    "no weights": (
        lambda: on_images(Wrapped(basic(nn.BatchNorm2d(WIDTH, affine=False)))),
        "passes batch_norm at 1.branch.5, which isn't known to make zero of zero",
    ),
}
"""Name -> (what makes the network, why its branch can't go)."""
