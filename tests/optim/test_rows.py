"""Compiled kernels of the joint stage against PyTorch's operators: the same training, whatever the layout, bits and forgetting rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geta.errors import GetaError
from geta.optim import HESSO, QASSO, Schedule, rows, stacked
from geta.quant import native_status, quantize
from optim_nets import ByHand, Net, batch, family, net

STEPS = 16
SCHEDULE = Schedule(STEPS, warmup=2, projection=2, joint=9, projection_periods=1, joint_periods=3)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(STEPS)) -> dict[str, torch.Tensor]:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}


def by_operators(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rows, "library", lambda: None)
    patch.setattr(stacked, "_library", lambda: None)


def both(make: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """(result with the kernels, result without): `make()` gives a model and an optimizer."""
    assert native_status().used, native_status()
    found = []
    for fast in (True, False):
        with monkeypatch.context() as patch:
            if not fast:
                by_operators(patch)
            model, optimizer = make()
            state = trained(model, optimizer, range(5))
            assert (optimizer._pruner._fast is not None) == fast
            state = trained(model, optimizer, range(5, STEPS))
            assert (optimizer._pruner._removed is not None) == fast
            found.append((state, optimizer))
    return found[0], found[1]


def mixed(seed: int = 0) -> tuple[Net, ByHand]:
    """A family whose columns are zeroed too, so that one parameter needs the operators while others don't."""
    model, graph = net(seed)
    graph.families[1] = family("first", 6, ["first.weight", "first.bias"], ["second.weight"], zero=True)
    return model, graph


@pytest.mark.parametrize("options", [{}, {"granularity": "channel"}, {"nonlinear": True}, {"weights": None, "activations": (8, 8)}, None])
@pytest.mark.parametrize("forgetting", ["descent", "blend", "uniform", "cosine"])
@pytest.mark.parametrize("start", [net, mixed])
def test_training_is_the_same(start: Any, forgetting: Any, options: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, QASSO]:
        model, graph = start()
        model.double()
        if options is not None:
            settings = {"weights": (4, 8), "activations": None, "exclude": (), **options}
            if settings["activations"] is not None:
                settings["calibration"] = [batch(99)[0].double()]
            quantize(model, **settings)
        base = torch.optim.AdamW(model.parameters(), lr=0.02)
        return model, QASSO(base, graph, schedule=SCHEDULE, forgetting=forgetting)

    (fast, optimizer), (slow, other) = both(make, monkeypatch)
    optimizer.check()
    assert all(map(torch.equal, optimizer.selection.values(), other.selection.values()))
    for name, tensor in fast.items():
        torch.testing.assert_close(tensor, slow[name], rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_hesso_trains_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, HESSO]:
        model, graph = mixed()
        return model, HESSO(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), graph, schedule=SCHEDULE)

    (fast, optimizer), (slow, _) = both(make, monkeypatch)
    optimizer.check()
    assert all(torch.equal(tensor, slow[name]) for name, tensor in fast.items())


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_ELEMENTS_PER_THREAD", 1)
    states = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            model, graph = net()
            quantize(model, weights=(4, 8), activations=None, exclude=())
            optimizer = QASSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, schedule=SCHEDULE)
            generator = torch.Generator().manual_seed(0)
            for _ in range(STEPS):
                for parameter in model.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                optimizer.step()
            optimizer.check()
            states.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_channels_last_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 8, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.repeat(1, 2, 1, 1))

    def make() -> tuple[nn.Module, QASSO]:
        torch.manual_seed(0)
        model, graph = Two().double().to(memory_format=torch.channels_last), net()[1]
        assert not model.conv.weight.is_contiguous()
        quantize(model, weights=(4, 8), activations=None, exclude=())
        graph.model = model
        return model, QASSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, schedule=SCHEDULE)

    (fast, optimizer), (slow, _) = both(make, monkeypatch)
    optimizer.check()
    for name, tensor in fast.items():
        torch.testing.assert_close(tensor, slow[name], rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_a_resumed_run_is_bitwise_the_same_inside_a_period() -> None:
    def make() -> tuple[nn.Module, QASSO]:
        model, graph = mixed()
        quantize(model, weights=(4, 8), activations=None, exclude=())
        return model, QASSO(torch.optim.AdamW(model.parameters(), lr=0.02), graph, schedule=SCHEDULE)

    model, optimizer = make()
    trained(model, optimizer, range(6))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = trained(model, optimizer, range(6, STEPS))
    model, optimizer = make()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    found = trained(model, optimizer, range(6, STEPS))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_parameters_may_move_but_not_change_their_kind() -> None:
    model, graph = net()
    optimizer = QASSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, schedule=SCHEDULE)
    trained(model, optimizer, range(5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    trained(model, optimizer, range(5, 6))
    model.double()
    with pytest.raises(GetaError, match=r"'first.weight' changed its shape, type, device or memory layout"):
        trained(model, optimizer, range(6, 7))


def test_kernels_count_as_changes() -> None:
    model, graph = net()
    optimizer = HESSO(torch.optim.SGD(model.parameters(), lr=0.0), graph, schedule=SCHEDULE)
    trained(model, optimizer, range(5))
    model.requires_grad_(requires_grad=False)
    before = [parameter._version for parameter in model.parameters()]
    optimizer.step()
    changed = [now._version > then for now, then in zip(model.parameters(), before, strict=True)]
    assert any(changed)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float64,) * 3, (torch.bfloat16,) * 3])
def test_small_parameters_as_one_vector(dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for fast in (True, False):
        start = [torch.tensor(1.0), torch.arange(1.0, 5).view(4, 1), torch.ones(1)]
        tensors = [nn.Parameter(tensor.to(dtype)) for tensor, dtype in zip(start, dtypes, strict=True)]
        with monkeypatch.context() as patch, torch.no_grad():
            if not fast:
                by_operators(patch)
            stack = stacked.Stacked(tensors)
            assert stack.reachable() == (fast and dtypes[0] is not torch.bfloat16)
            assert stack.read().tolist() == [1, 1, 2, 3, 4, 1]
            versions = [tensor._version for tensor in tensors]
            stack.write_(stack.read() * 3 - 4)
            stack.clamp_(-0.5, 7)
            assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))
            tensors[1].data = tensors[1].data.clone()
            results.append(stack.read().tolist())
    assert results[0] == results[1] == [-0.5, -0.5, 2, 5, 7, -0.5]
    assert stacked.Stacked([]).clamp_(0, 1) is None
