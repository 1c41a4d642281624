"""Step sizes as the bank sets them: the same numbers as `geta.quant` computes, finite whatever the base optimizer proposed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geta
from geta.optim import QASSO, Schedule
from geta.optim.bank import QuantizerBank
from geta.optim.forget import Forgetting
from geta.quant import Bits, Quantizer, ops, quantize, quantizers
from optim_nets import batch, net


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_step_sizes_are_those_of_the_quantizer(linear: bool, signed: bool) -> None:
    ranges = [torch.tensor(0.7), torch.rand(5, 1) + 0.1]
    found = [Quantizer(f"w{i}", "weight", Bits(4, 8), q_m, linear=linear, signed=signed) for i, q_m in enumerate(ranges)]
    bank = QuantizerBank(found)
    for bits in (torch.tensor([3.0, 8.0]), torch.tensor([4.5, 6.0]), bank.lower_L):
        for _ in range(2):
            steps = bank.step_size_of(bits, bank.read())
            expected = [ops.step_size(b, q.q_m, q.t, signed).flatten() for b, q in zip(bits.tolist(), found, strict=True)]
            assert torch.equal(steps, torch.cat(expected).detach())
    if linear:
        with torch.no_grad():
            found[0].q_m.mul_(2.0)
        assert bank.step_size_of(bank.lower_L, bank.read())[0] == ops.step_size(4, found[0].q_m, found[0].t, signed)


@pytest.mark.parametrize("forgetting", ["descent", "blend", "uniform", "cosine"])
@pytest.mark.parametrize("implementation", [{}, {"foreach": False}])
def test_a_step_size_below_zero_comes_back_into_its_range(forgetting: Forgetting, implementation: dict[str, Any]) -> None:
    model, graph = net()
    quantize(model, weights=(4, 8), activations=None, exclude=())
    base = torch.optim.SGD(model.parameters(), lr=0.01, **implementation)
    optimizer = QASSO(base, graph, schedule=Schedule(20, warmup=1, projection=1, joint=12, joint_periods=2), forgetting=forgetting)
    for step in range(20):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for quantizer in quantizers(model).values():
            quantizer.d.grad = torch.full_like(quantizer.d, 1e4)
        optimizer.step()
        assert all(3.999 <= bits <= 16.001 for bits in optimizer.bits.values()), (step, optimizer.bits)
    optimizer.check()


@pytest.mark.parametrize("nonlinear", [True, False])
@pytest.mark.parametrize("stage", ["warm-up", "projection", "joint", "cool-down"])
def test_a_range_at_most_halves_or_doubles_in_a_step(stage: str, nonlinear: bool) -> None:
    """A range of 0.05 with a gradient of 200, as deep networks have at their start, went to nothing in one step, and its layer with it."""
    model, graph = net()
    quantize(model, weights=Bits(4, 8), activations=None, nonlinear=nonlinear, exclude=())
    schedule = Schedule(20, warmup=0.25, projection=0.25, joint=0.25)
    optimizer = QASSO(torch.optim.SGD(model.parameters(), lr=0.01), graph, sparsity=0.5, schedule=schedule, quant_lr=1.0)
    for step in range(20):
        optimizer.zero_grad()
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
        now, before = optimizer.stage, {name: float(quantizer.q_m.detach()) for name, quantizer in quantizers(model).items()}
        for place, (name, quantizer) in enumerate(quantizers(model).items()):
            steep = (1e6, -1e6, 1e-3 * before[name])[place % 3]
            quantizer.q_m.grad = torch.full_like(quantizer.q_m, steep if now == stage else 0.0)
        optimizer.step()
        for place, (name, quantizer) in enumerate(quantizers(model).items()):
            if now == stage and not schedule.is_period_start(step):  # where ranges are tightened first
                factor = float(quantizer.q_m.detach()) / before[name]
                assert factor == pytest.approx((0.5, 2.0, 0.999)[place % 3], rel=1e-6)
    optimizer.check()


def test_bits_of_layers_that_lose_groups_go_straight_to_what_the_rule_says() -> None:
    """Whatever the base optimizer wants: what it adds on the way would have to be taken back in the last few steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    images = torch.randn(16, 1, 8, 8)
    graph = geta.analyze(model, (images,))
    quantize(model, weights=(4, 8), activations=None, exclude=())
    schedule = Schedule(20, warmup=1, projection=1, joint=16, joint_periods=1)
    optimizer = QASSO(torch.optim.SGD(model.parameters(), lr=0.01), graph, schedule=schedule)
    path: list[float] = []
    for _ in range(18):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        for quantizer in quantizers(model).values():
            quantizer.d.grad = 100.0 * quantizer.d.detach()  # a tenth of d in every step: more bits
        optimizer.step()
        path.append(optimizer.bits["0.weight"])
    falls = [one - two for one, two in itertools.pairwise(path[1:])]
    assert path[-1] == pytest.approx(4.0, abs=1e-3)
    assert falls == pytest.approx([4.0 / 16] * 16, abs=0.02)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), {"foreach": True}),
        (lambda p: torch.optim.AdamW(p, lr=0.1), {"fused": True}),
        (lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False), {"foreach": False, "fused": None}),
        (lambda p: torch.optim.SGD(p, lr=0.1, fused=True), {"foreach": None, "fused": True}),
        (lambda p: torch.optim.Adam(p, lr=0.1, capturable=True, foreach=True), {"foreach": True, "fused": None}),
        (lambda p: torch.optim.RMSprop(p, lr=0.1), {"foreach": None}),
    ],
)
def test_quantizer_parameters_are_updated_in_one_go(base: Any, expected: dict[str, Any]) -> None:
    model, graph = net()
    quantize(model, weights=(4, 8), activations=None, exclude=())
    optimizer = QASSO(base(model.parameters()), graph, schedule=10)
    others, mine = optimizer.param_groups[0], optimizer.param_groups[-1]
    assert {key: mine[key] for key in expected} == expected
    assert all(others[key] == optimizer.defaults[key] for key in ("foreach", "fused") if key in optimizer.defaults)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nonlinear", [False, True])
def test_constraining_in_one_pass_gives_the_same_bits(dtype: torch.dtype, nonlinear: bool) -> None:
    torch.manual_seed(0)
    ranges = [torch.rand(()) + 0.01, torch.rand(5, 1) + 0.01, torch.tensor(2.0**-24), torch.tensor(2.0**20)]
    sets = [
        [Quantizer(f"w{i}", "weight", Bits(4, 8), q_m, linear=not nonlinear, signed=bool(i % 2)).to(dtype) for i, q_m in enumerate(ranges)]
        for _ in range(2)
    ]
    banks = [QuantizerBank(found) for found in sets]
    upper = torch.full((4,), 6.5, dtype=banks[0].lower_L.dtype)
    for _ in range(200):
        before = banks[0].ranges()
        with torch.no_grad():
            for one, other in zip(*sets, strict=True):
                q_m, d = one.q_m * torch.randn_like(one.q_m).exp(), one.d * torch.randn_like(one.d) * 4
                for quantizer in (one, other):
                    quantizer.q_m.copy_(q_m)
                    quantizer.d.copy_(d)
            versions = [quantizer.d._version for quantizer in sets[0]]
            banks[0].constrain_(before, upper)
            banks[1].guard_(before)
            banks[1].write_d_(banks[1].projected(upper, banks[1].read()))
        assert all(quantizer.d._version > version for quantizer, version in zip(sets[0], versions, strict=True))
        for one, other in zip(*(bank.read() for bank in banks), strict=True):
            assert torch.equal(one, other)
