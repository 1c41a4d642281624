"""Sets of bit widths as a constraint of training: what a run ends with, how it gets there, resumed and within a budget."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import geta
import optim_nets
from geta.optim import QASSO, Budget, Schedule
from geta.quant import quantizers

STEPS = 24
SCHEDULE = Schedule(STEPS, warmup=2, projection=4, joint=12, projection_periods=2, joint_periods=3)
SETS = {4, 8}


def build(
    weights: object = SETS, schedule: Schedule = SCHEDULE, sparsity: float = 0.5, *, follow: bool = True, **chosen: object
) -> tuple[nn.Module, QASSO]:
    model, graph = optim_nets.net()
    geta.quantize(model, weights=weights, activations=SETS, calibration=[optim_nets.batch(0)[0]], exclude=(), **chosen)  # type: ignore[arg-type]
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, QASSO(base, graph, sparsity=sparsity, schedule=schedule, follow=follow)  # type: ignore[arg-type]


def widths(model: nn.Module) -> dict[str, float]:
    return {name: quantizer.bit_width().item() for name, quantizer in quantizers(model).items()}


def spread_out(model: nn.Module) -> None:
    """Step sizes that the optimizer would not find by itself so soon, all over the range."""
    for place, quantizer in enumerate(quantizers(model).values()):
        bits = 4.0 + 4.0 * place / 7
        with torch.no_grad():
            quantizer.project_(bits, bits)


@pytest.mark.parametrize(
    "schedule",
    [
        SCHEDULE,
        Schedule(STEPS, warmup=2, projection=4, joint=12, joint_periods=1),
        Schedule(STEPS, warmup=2, projection=14, joint=0),
        Schedule(STEPS, warmup=0, projection=1, joint=1),
    ],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_run_ends_with_allowed_widths(schedule: Schedule, sparsity: float) -> None:
    if sparsity and not schedule.joint_steps:
        sparsity = 0.0
    model, optimizer = build(schedule=schedule, sparsity=sparsity)
    optim_nets.train(model, optimizer, 0, STEPS)
    optimizer.check()
    for name, bits in widths(model).items():
        assert round(bits) in SETS, name
        assert bits == pytest.approx(round(bits), abs=1e-3)


def test_the_last_period_leads_there_without_a_jump() -> None:
    model, optimizer = build(sparsity=0.0, follow=False)  # with another range the base optimizer would propose other steps
    optim_nets.train(model, optimizer, 0, 14)  # the last period is steps 14 to 17
    spread_out(model)
    seen = []
    optim_nets.train(model, optimizer, 14, 18, after=lambda: seen.append(widths(model)))
    for name, last in seen[-1].items():
        assert last == pytest.approx(round(last), abs=1e-3)
        assert round(last) in SETS
        distances = [abs(one[name] - last) for one in seen]
        assert all(later <= earlier + 0.02 for earlier, later in itertools.pairwise(distances)), name
        assert max(earlier - later for earlier, later in itertools.pairwise(distances)) < 1.0, name
    assert any(abs(seen[-2][name] - seen[-1][name]) > 0.05 for name in seen[-1])


def test_ranges_beside_sets_are_left_alone() -> None:
    """A quantizer without gaps does the same whether or not another one has some."""
    runs = []
    for special in ({"first": 8}, {"first": 8, "second": {4, 8}}):
        model, optimizer = build((4, 8), bits_of=special)
        optim_nets.train(model, optimizer, 0, 14)
        spread_out(model)
        optim_nets.train(model, optimizer, 14, 15)
        runs.append(widths(model))
    assert runs[0]["conv.weight"] == runs[1]["conv.weight"]
    assert runs[0]["second.weight"] != runs[1]["second.weight"]


def test_weight_bits_of_the_optimizer_take_sets() -> None:
    model, graph = optim_nets.net()
    geta.quantize(model, weights=(4, 8), activations=None, exclude=())
    optimizer = QASSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, sparsity=0.5, weight_bits={2, 8}, schedule=SCHEDULE)  # type: ignore[arg-type]
    optim_nets.train(model, optimizer, 0, STEPS)
    optimizer.check()
    assert {round(bits) for bits in widths(model).values()} <= {2, 8}


def test_check_finds_a_width_between() -> None:
    model, optimizer = build()
    optim_nets.train(model, optimizer, 0, STEPS)
    quantizer = next(iter(quantizers(model).values()))
    quantizer.project_(6, 6)
    with pytest.raises(geta.GetaError, match=r"has 6\.0000 bits where \d, one of 4, 8, was fixed"):
        optimizer.check()


@pytest.mark.parametrize("stop", [13, 15, 17, 18, 20])
def test_resuming_is_exact(stop: int) -> None:
    model, optimizer = build()
    optim_nets.train(model, optimizer, 0, stop)
    saved = optim_nets.through_a_file(model, optimizer)
    optim_nets.train(model, optimizer, stop, STEPS)
    again, resumed = build()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    optim_nets.train(again, resumed, stop, STEPS)
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_checkpoint_of_other_widths_is_refused() -> None:
    model, optimizer = build()
    other, ranges = build((4, 8))
    with pytest.raises(geta.CheckpointError, match="bits"):
        ranges.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(widths(model)) == len(widths(other))


def trained(compressor: geta.Compressor, inputs: torch.Tensor) -> geta.CompactModel:
    optimizer = compressor.optimizer(torch.optim.AdamW, lr=0.01, schedule=SCHEDULE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        compressor.model(inputs).square().mean().backward()
        optimizer.step()
    return compressor.finish()


@pytest.mark.parametrize("make", [lambda: {"target": Budget(bops=0.05)}, lambda: {"sparsity": 0.5}])
def test_a_compressor_with_sets_and_ends(make: Callable[[], dict]) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(8, 6)
    compressor = geta.Compressor(
        model, (inputs,), weight_bits={2, 4, 8}, activation_bits={4, 8}, end_bits=8, calibration=[inputs], exclude=(), **make()
    )
    small = trained(compressor, inputs)
    assert small.bits["0.weight"] == small.bits["4.weight"] == small.bits["0:input"] == small.bits["4:input"] == 8
    assert small.bits["2.weight"] in (2, 4, 8)
    assert small.bits["2:input"] in (4, 8)


def test_end_bits_without_quantization_are_refused() -> None:
    with pytest.raises(geta.ConfigError, match="end_bits have no effect"):
        geta.Compressor(nn.Linear(2, 2), (torch.ones(1, 2),), sparsity=0.5, weight_bits=None, end_bits=8)
