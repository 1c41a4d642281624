"""Small quantized compact models of every kind that the exporters know, with inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import geta


@dataclass(frozen=True)
class Case:
    """build: a fresh model. shape: of its input. options: of `geta.quantize`."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    results: bool = True


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv1, self.bn1 = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return self.head((x + y).relu().mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, steps, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, steps, -1))
        return {"hidden": x + self.down(nn.functional.gelu(self.up(self.norm2(x))))}


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 16), nn.Linear(16, 24), nn.Linear(24, 11, bias=False)

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)).relu())


class Recurrent(nn.Module):
    """ONNX Runtime wants time first, so that a transposition stands behind the table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru, self.head = nn.Embedding(11, 8), nn.GRU(8, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, ids):
        return self.head(self.gru(self.embed(ids))[0].mean(1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)),
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 8, 1), nn.Hardswish(), nn.Flatten(), nn.Linear(8 * 64, 5)),
    )


class Padded(nn.Module):
    """Inverted residuals as mobile networks have them: capped activations, and padding that a block does itself, also on one side alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.out = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.again, self.last = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 3, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        pad = nn.functional.pad
        x = self.out(pad(self.deep(pad(self.stem(pad(x, (0, 1, 0, 1))), (1, 1, 1, 1))), (0, 0, 0, 0)))
        x = x + pad(self.again(x).clamp(-1, 1), (1, 1, 1, 1))
        x = self.last(pad(x.relu(), (0, 1, 0, 1)))
        return self.head(nn.functional.relu6(x).mean((2, 3)))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def upsampling() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1)
    )


_BITS = geta.Bits
CASES: dict[str, Case] = {
    "convolutions": Case(convolutions, (2, 3, 12, 12)),
    "residual": Case(Residual, (2, 3, 8, 8)),
    "residual without quantized results": Case(Residual, (2, 3, 8, 8), results=False),
    "depthwise": Case(depthwise, (2, 3, 8, 8)),
    "padded": Case(Padded, (2, 3, 16, 16)),
    "padded, 5 bits": Case(Padded, (2, 3, 16, 16), {"activations": _BITS(5, 5)}),
    "padded, nonlinear": Case(Padded, (2, 3, 16, 16), {"nonlinear": True}),
    "perceptron": Case(perceptron, (5, 12)),
    "upsampling": Case(upsampling, (2, 3, 8, 8)),
    "attention": Case(Attention, (2, 7, 16), results=False),
    "words": Case(Words, (2, 9), results=False),
    "recurrent": Case(Recurrent, (2, 9), results=False),
    "weights only": Case(convolutions, (2, 3, 12, 12), {"activations": None}),
    "weights only, per channel": Case(perceptron, (5, 12), {"activations": None, "granularity": "channel"}),
    "words of few bits": Case(Words, (2, 9), {"weights": _BITS(3, 4)}, results=False),
    "2 to 3 bits": Case(convolutions, (2, 3, 12, 12), {"weights": _BITS(2, 3), "activations": _BITS(4, 4)}),
    "8 bits per channel": Case(Residual, (2, 3, 8, 8), {"weights": _BITS(8, 8), "granularity": "channel"}),
    "12 bits": Case(perceptron, (5, 12), {"weights": _BITS(12, 12), "activations": _BITS(12, 12)}),
    "nonlinear": Case(perceptron, (5, 12), {"nonlinear": True}),
    "fixed": Case(perceptron, (5, 12), {"weights": geta.FixedBits(4), "activations": geta.FixedBits(8)}),
}


def inputs(case: Case, batch: int | None = None, seed: int = 1) -> torch.Tensor:
    shape = case.shape if batch is None else (batch, *case.shape[1:])
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, shape, generator=generator) if case.build in (Words, Recurrent) else torch.randn(shape, generator=generator)


def compacted(name: str) -> geta.CompactModel:
    """The case's model with real bit widths, half of its groups removed."""
    case = CASES[name]
    geta.seed_everything(0)
    model, x = case.build(), inputs(case)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight, mean=0.5)
            nn.init.normal_(module.bias, std=0.3)
    model.eval()
    graph = geta.analyze(model, (x,))
    options = {"calibration": [inputs(case, 32, seed) for seed in range(4)], "exclude": ()} | case.options
    if options.get("activations", 8) is None:
        del options["calibration"]
    elif case.results:
        options["results_of"] = graph
    geta.quantize(model, **options)
    for quantizer in geta.quant.quantizers(model).values():
        if not quantizer.linear:
            with torch.no_grad():
                quantizer.t.fill_(1.2 if quantizer.kind == "weight" else 0.8)
        quantizer.project_(quantizer.bits.lower, quantizer.bits.upper)
        quantizer.round_bits_()
    selection = graph.random_selection(0.5, seed=0)
    graph.zero_(model, selection)
    return geta.compact(model, graph, selection).eval()
