"""Scores without a copy of the model: a step that is taken back leaves nothing behind, and the run is bitwise the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geta.optim import HESSO, QASSO, Saliency, Schedule, pruner
from geta.optim.groups import GroupIndex
from geta.optim.pruner import can_rehearse
from geta.optim.rehearsal import chunks, rehearsed
from geta.quant import quantize
from optim_nets import ByHand, batch, family, leaves, net
from tensor_bytes import TensorBytes

STEPS = 14
SCHEDULE = Schedule(STEPS, warmup=1, projection=2, joint=9, projection_periods=1, joint_periods=3)
BASES = {
    "sgd": lambda p, **more: torch.optim.SGD(p, lr=0.05, weight_decay=1e-3, **more),
    "momentum": lambda p, **more: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, **more),
    "adam": lambda p, **more: torch.optim.Adam(p, lr=0.01, amsgrad=True, **more),
    "adamw": lambda p, **more: torch.optim.AdamW(p, lr=0.01, **more),
    "maximize": lambda p, **more: torch.optim.AdamW(p, lr=0.01, maximize=True, **more),
    "nadam": lambda p, **more: torch.optim.NAdam(p, lr=0.01, **more),
    "radam": lambda p, **more: torch.optim.RAdam(p, lr=0.01, **more),
    "adamax": lambda p, **more: torch.optim.Adamax(p, lr=0.01, **more),
    "adadelta": torch.optim.Adadelta,
    "adagrad": lambda p, **more: torch.optim.Adagrad(p, lr=0.01, **more),
    "asgd": lambda p, **more: torch.optim.ASGD(p, lr=0.01, **more),
    "rmsprop": lambda p, **more: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True, **more),
    "rprop": lambda p, **more: torch.optim.Rprop(p, lr=0.01, **more),
    "adafactor": lambda p, **more: torch.optim.Adafactor(p, lr=0.01, **more),
}


def backward(model: nn.Module, step: int) -> torch.Tensor:
    x, y = batch(step)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def content(model: nn.Module, base: torch.optim.Optimizer) -> dict[str, Any]:
    gradients = [p.grad for p in model.parameters()]
    found = dict(leaves({"model": dict(model.state_dict()), "state": base.state_dict(), "grad": gradients}))
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_a_rehearsed_step_is_the_real_one_and_leaves_nothing_behind(kind, foreach):
    """At the very first step, where state is made, and later; chunk by chunk it moves parameters to where the whole step does."""
    model, graph = net()
    base, index = BASES[kind](model.parameters(), foreach=foreach), GroupIndex(graph)
    assert can_rehearse(base)
    assert len(list(chunks(index.parameters))) > 1
    for step in range(3):
        base.zero_grad()
        backward(model, step)
        before, proposed = content(model, base), {}
        for entries in chunks(index.parameters):
            with rehearsed(base, entries) as old:
                proposed.update({entry.name: entry.tensor.detach().clone() for entry in entries})
                assert all(torch.equal(x, before[f".model.{entry.name}"]) for entry, x in zip(entries, old, strict=True))
        same(content(model, base), before)
        base.step()
        now = model.state_dict()
        assert sorted(proposed) == sorted(entry.name for entry in index.parameters)
        assert all(torch.equal(values, now[name]) for name, values in proposed.items())
        assert any(not torch.equal(values, before[f".model.{name}"]) for name, values in proposed.items())


class Own(torch.optim.SGD):
    """Somebody's own optimizer may look at all parameters at once."""


def test_what_cannot_be_taken_back_is_not_rehearsed():
    model, _ = net()
    assert not can_rehearse(Own(model.parameters(), lr=0.1))
    assert not can_rehearse(torch.optim.LBFGS(model.parameters()))
    assert not can_rehearse(torch.optim.AdamW(model.parameters(), capturable=True))
    patched = torch.optim.SGD(model.parameters(), lr=0.1)
    patched.step = lambda closure=None: None
    assert not can_rehearse(patched)


def test_an_error_in_the_body_takes_the_step_back_too():
    model, graph = net()
    base, index = torch.optim.AdamW(model.parameters()), GroupIndex(graph)
    backward(model, 0)
    before = content(model, base)
    with pytest.raises(KeyError), rehearsed(base, index.parameters[:2]):
        raise KeyError
    same(content(model, base), before)


def run(kind: str, closure: bool, saliency: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model, graph = net()
    if kind == "qasso":
        quantize(model, weights=(4, 8), activations=(8, 8), calibration=[batch(0)[0]])
    frozen = model.second.bias.requires_grad_(False)
    base = torch.optim.AdamW([p for p in model.parameters() if p is not frozen], lr=0.02)
    optimizer = {"qasso": QASSO, "hesso": HESSO}[kind](base, graph, sparsity=0.5, schedule=SCHEDULE, saliency=saliency)
    calls = []
    for step in range(STEPS):
        optimizer.zero_grad()

        def evaluate(step: int = step) -> torch.Tensor:
            calls.append(step)
            optimizer.zero_grad()
            return backward(model, step)

        if closure:
            assert float(optimizer.step(evaluate).detach()) > 0
        else:
            evaluate()
            optimizer.step()
    assert calls == list(range(STEPS))
    optimizer.check()
    return content(model, optimizer)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(("kind", "saliency"), [("qasso", None), ("hesso", "fisher"), ("hesso", "activation")])
def test_the_run_is_bitwise_that_with_a_copy(kind, saliency, closure, monkeypatch):
    counted = []
    scores = pruner.Pruner.rehearsed_scores
    monkeypatch.setattr(pruner.Pruner, "rehearsed_scores", lambda self, base: counted.append(1) or scores(self, base))
    rehearsing = run(kind, closure, saliency)
    assert len(counted) == (0 if saliency == "activation" else 3)  # its report reads the weights after the step
    monkeypatch.setattr(pruner, "can_rehearse", lambda base: False)
    same(rehearsing, run(kind, closure, saliency))
    assert len(counted) == (0 if saliency == "activation" else 3)


def wide(layers: int = 16, width: int = 160) -> tuple[nn.Module, ByHand]:
    """Equal layers, so that a copy of all is much more than the largest of them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers + 1)))
    return model, ByHand(model, [family(str(i), width, [f"{i}.weight", f"{i}.bias"], [f"{i + 1}.weight"]) for i in range(layers)])


def marking_bytes(monkeypatch: pytest.MonkeyPatch, rehearses: bool) -> tuple[int, int]:
    """(the most tensor bytes that exist besides what was there during the step that marks groups, bytes of the scored parameters)."""
    model, graph = wide()
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = HESSO(
        base, graph, sparsity=1 / 160, schedule=Schedule(6, warmup=1, projection=0, joint=4, joint_periods=1), saliency=Saliency()
    )
    with monkeypatch.context() as patch:
        if not rehearses:
            patch.setattr(pruner, "can_rehearse", lambda base: False)
        for step in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 160)).square().mean().backward()
            known = [*model.parameters(), *(p.grad for p in model.parameters())]
            known += [v for state in base.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
            with TensorBytes(known) as counted:
                optimizer.step()
            assert (optimizer._pruner.redundant.sum() > 0) == (step == 1)
    return counted.peak, sum(entry.tensor.numel() * 4 for entry in optimizer._index.parameters)


def test_scores_take_no_second_copy_of_the_model(monkeypatch):
    """Sixteen layers: what marking needs is a few times the largest one, not all of them."""
    copied, parameters = marking_bytes(monkeypatch, rehearses=False)
    needed, _ = marking_bytes(monkeypatch, rehearses=True)
    largest = 160 * 160 * 4
    assert parameters == 16 * (largest + 160 * 4)
    assert copied > parameters
    assert needed < 8 * largest  # a layer, its gradient and its two moments, and up to three intermediate results
    assert needed < 0.6 * parameters


def test_chunks_keep_the_order_and_the_limit():
    _, graph = net()
    entries = GroupIndex(graph).parameters
    runs = list(chunks(entries))
    assert [entry for run in runs for entry in run] == entries
    assert 1 < len(runs) < len(entries)
    most = max(entry.stored.numel() for entry in entries)
    assert all(sum(entry.stored.numel() for entry in run) <= most for run in runs)
    assert list(chunks([])) == []
