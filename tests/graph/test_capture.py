"""Capture: the user's model stays as it is, regions are inlined, batch sizes stay open where the model allows it."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import geta
from geta.errors import BadModelError
from geta.graph import analyze
from geta.graph.capture import canonical_module, capture, mode_of
from geta.graph.names import canonical_name, find_tensor


class Regions(nn.Module):
    """A no_grad region and an autocast region that is switched off, as rotary embeddings have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.sum(-1, keepdim=True).cos()
        with torch.autocast("cpu", enabled=False):
            hidden = self.first(x) * scale
        return self.second(hidden)


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_regions_are_inlined() -> None:
    captured = capture(Regions(), (torch.zeros(3, 4),))
    names = targets(captured.graph)
    assert "aten.cos.default" in names and names.count("aten.linear.default") == 2
    assert not any("wrap_with" in name or "_assert" in name for name in names)
    assert analyze(Regions(), (torch.zeros(3, 4),)).num_groups == 6


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batch_stays_open(batch: int) -> None:
    captured = capture(Regions(), (torch.zeros(batch, 4),))
    x = next(n for n in captured.graph.find_nodes(op="placeholder") if n.name not in captured.tensor_names)
    assert isinstance(x.meta["val"].shape[0], torch.SymInt)
    assert captured.notes == ()


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [self.second(torch.relu(self.first(row))) for row in x.unbind(0)]
        return torch.stack(rows)


def test_a_fixed_batch_is_captured_and_pruned() -> None:
    graph = analyze(FixedBatch(), (torch.zeros(3, 4),))
    assert graph.num_groups == 6


def test_modes_are_restored_after_an_error() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken on purpose")

    model = Broken().train()
    model.norm.eval()
    with pytest.raises(BadModelError, match="broken on purpose") as caught:
        capture(model, (torch.zeros(2, 4),))
    assert "test_capture.py" in str(caught.value)
    assert model.training and not model.norm.training


def test_mode_of_restores_each_module() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model[1].eval()
    with mode_of(model, True):
        assert model[1].training
    assert model.training and not model[1].training


def test_training_capture_leaves_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    captured = capture(model, (torch.randn(3, 4),), train=True)
    assert captured.training and "aten.add_.Tensor" in targets(captured.graph)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dead_code_is_dropped() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _ = self.first.weight.exp().sum()
            return self.first(x)

    assert "aten.exp.default" not in targets(capture(Looks(), (torch.zeros(2, 4),)).graph)


def test_names_survive_parametrization() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert [canonical_name(name) for name, _ in model.named_parameters()] == ["0.bias", "0.weight"]
    assert find_tensor(model, "0.weight") is model[0].parametrizations.weight.original
    assert canonical_name("a.parametrizations.weight.0.d") == "a.parametrizations.weight.0.d"
    assert canonical_module("a.b.parametrizations.weight.0") == "a.b"
    assert canonical_module("layers.slice(None, 2, None).1.norm") == "layers.1.norm"
    assert canonical_module("layers.slice(1, -1, 2).3") == "layers.7"
    for name, words in (("1.weight", "no module '1'"), ("0.nothing", "no tensor 'nothing'")):
        with pytest.raises(BadModelError, match=words):
            find_tensor(model, name)


def test_garbage_collection_goes_on_after_a_capture_that_failed() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not gc.isenabled()
            raise RuntimeError("no")

    assert gc.isenabled()
    with pytest.raises(BadModelError):
        capture(Broken(), (torch.zeros(2),))
    assert gc.isenabled()
    gc.disable()
    try:
        capture(nn.Linear(2, 2), (torch.zeros(2, 2),))
        assert not gc.isenabled(), "a user who has switched it off keeps it off"
    finally:
        gc.enable()


class Collects(nn.Module):
    """Takes its inputs by `*args` and `**kwargs`, as wrappers do, and repeats a token once per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.hidden, self.out = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, first, *rest, scale=1.0, **named):
        x = first + sum(rest) + named.get("shift", 0.0)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.out(self.hidden(x).relu()) * scale


@pytest.mark.parametrize(("more", "named"), [(0, ()), (2, ()), (0, ("shift",)), (1, ("shift", "unused"))])
def test_sizes_of_collected_inputs_stay_open(more, named):
    model = Collects().eval()

    def inputs(batch):
        tensors = [torch.randn(batch, 3, 4) for _ in range(1 + more + len(named))]
        return tuple(tensors[: 1 + more]), dict(zip(named, tensors[1 + more :], strict=True))

    graph = geta.analyze(model, *inputs(2))
    assert graph.notes == []
    assert "forward" not in vars(model)
    selection = graph.random_selection(0.5)
    small = geta.compact(model, graph, selection)
    graph.zero_(model, selection)
    args, kwargs = inputs(5)
    torch.testing.assert_close(small(*args, **kwargs), model(*args, **kwargs))


def test_a_forward_of_the_instance_is_kept():
    model = Collects().eval()
    own = model.forward

    def replaced(*args):
        return own(*args, scale=2.0)

    model.forward = replaced
    graph = geta.analyze(model, (torch.randn(2, 3, 4), torch.randn(2, 3, 4)))
    assert graph.notes == []
    assert model.forward is replaced
