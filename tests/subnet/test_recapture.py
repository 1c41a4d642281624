"""An earlier capture serves again while nothing about the model changed; any change is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import geta
from geta.graph.fingerprint import fingerprint


class Settings:
    def __init__(self) -> None:
        self.scale = 2.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(4, 6), nn.Linear(6, 3), nn.Dropout(0.5)
        self.settings = Settings()
        self.function: Callable[[torch.Tensor], torch.Tensor] = torch.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(self.function(self.first(x)))) * self.settings.scale


def _count_captures(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    from geta.graph import dependency

    seen: list[bool] = []
    original = dependency.capture

    def counted(*args: object, train: bool = False, **kwargs: object) -> object:
        seen.append(train)
        return original(*args, train=train, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(dependency, "capture", counted)
    return seen


def test_one_capture_per_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(9, 4)
    graph = geta.analyze(model, (x,))
    seen = _count_captures(monkeypatch)
    first = geta.compact(model, graph, graph.random_selection(0.5, seed=0))
    assert seen == [True]
    with torch.no_grad():
        model.first.weight.mul_(3)  # values are read anew
    selection = graph.random_selection(0.5, seed=0)
    second = geta.compact(model, graph, selection)
    assert seen == [True]
    graph.zero_(model, selection)
    model.eval()
    torch.testing.assert_close(second.eval()(x), model(x))
    assert not torch.equal(first.eval()(x), second(x))


CHANGES: dict[str, Callable[[Net], object]] = {
    "plain attribute": lambda net: setattr(net.drop, "p", 0.1),
    "settings object": lambda net: setattr(net.settings, "scale", 3.0),
    "function": lambda net: setattr(net, "function", torch.tanh),
    "module": lambda net: setattr(net, "drop", nn.Identity()),
    "dtype": lambda net: net.double(),
    "hook": lambda net: net.first.register_forward_hook(lambda *_: None),
    "parametrization": lambda net: parametrize.register_parametrization(net.first, "weight", nn.Identity()),
    "frozen parameter": lambda net: net.first.weight.requires_grad_(False),
    "buffer": lambda net: net.register_buffer("extra", torch.zeros(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    model = Net()
    before = fingerprint(model)
    assert fingerprint(model) == before
    model.train(not model.training)
    assert fingerprint(model) == before
    CHANGES[change](model)
    assert fingerprint(model) != before


def test_a_changed_forward_is_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net(), torch.randn(2, 4)
    graph = geta.analyze(model, (x,))
    seen = _count_captures(monkeypatch)
    model.function = torch.tanh
    selection = graph.random_selection(0.5, seed=0)
    small = geta.compact(model, graph, selection)
    assert seen == [False, True]
    graph.zero_(model, selection)
    model.eval()
    torch.testing.assert_close(small.eval()(x), model(x))
