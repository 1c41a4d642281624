"""Small networks with dependency graphs written by hand, for tests of optimizers: analysing them every time would only take time."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from geta.graph.families import Family, Member


class ByHand:
    """A dependency graph: a model and families."""

    def __init__(self, model: nn.Module, families: Sequence[Family]) -> None:
        self.model = model
        self.families = list(families)


def family(name: str, size: int, produced: Iterable[str], consumed: Iterable[str] = (), *, zero: bool = False) -> Family:
    """One group per row of the produced tensors (dimension 0) and per column of the consumed ones (dimension 1)."""
    index = torch.arange(size)[:, None]
    members = [Member(param, 0, index, "producer", True) for param in produced]
    members += [Member(param, 1, index, "consumer", zero) for param in consumed]
    return Family(name, "neurons", size, True, "", tuple(members))


class Net(nn.Module):
    """A convolution with BatchNorm and three linear layers: [B, 1, 6, 6] -> [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.first, self.second, self.head = nn.Linear(8, 6), nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def net(seed: int = 0) -> tuple[Net, ByHand]:
    """`Net` and its graph: families of 8, 6 and 10 groups."""
    torch.manual_seed(seed)
    model = Net()
    produced = ["conv.weight", "norm.weight", "norm.bias", "norm.running_mean"]
    families = [
        family("conv", 8, produced, ["first.weight"]),
        family("first", 6, ["first.weight", "first.bias"], ["second.weight"]),
        family("second", 10, ["second.weight", "second.bias"], ["head.weight"]),
    ]
    return model, ByHand(model, families)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The data of one step; the class is which third of the image is brightest."""
    x = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(step))
    return x, x.view(16, 3, 12).mean(2).argmax(1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, after=lambda: None, **extra) -> list[float]:
    """Steps `first` .. `last - 1`; `extra` names may be "loss", which is then passed to step."""
    losses = []
    for step in range(first, last):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if extra.get("loss"):
            optimizer.step(loss=loss)
        else:
            optimizer.step()
        losses.append(loss.item())
        after()
    return losses


def through_a_file(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Both states, saved and read again without pickled objects."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(value, path: str = ""):
    """Every (path, value) of nested dictionaries and lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            assert isinstance(key, str | int), path
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}.{number}")
    else:
        yield path, value
