"""Ranges of activations go with the network: set anew where values have outgrown them, left alone where they fit or were learned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import geta
import optim_nets
from geta.optim import QASSO, Schedule
from geta.optim.following import EVERY, RangeFollower
from geta.quant import Quantizer, quantizers
from geta.quant.sampling import sample_of

STEPS = 40
SCHEDULE = Schedule(STEPS, warmup=6, projection=6, joint=12, projection_periods=2, joint_periods=3)


def build(outgrown: float = 1.0, activations: object = (8, 8), lr: float = 0.0, **options: Any) -> tuple[nn.Module, QASSO]:
    """A network whose hidden values are `outgrown` times what calibration has seen; with lr = 0 nothing but the follower moves ranges."""
    model, graph = optim_nets.net()
    model.double()
    batches = [optim_nets.batch(step)[0].double() for step in range(STEPS)]
    torch.optim.swa_utils.update_bn(batches, model)
    model.eval()
    geta.quantize(  # without weights' quantizers the ranges would hold every value
        model, weights=(8, 8), activations=activations, calibration=batches, calibration_batches=STEPS, percentile=100.0, exclude=()
    )  # type: ignore[arg-type]
    with torch.no_grad():
        model.first.parametrizations.weight.original.mul_(outgrown)  # type: ignore[union-attr]
        quantizers(model)["first.weight"].q_m.mul_(outgrown)
        quantizers(model)["first.weight"].d.mul_(outgrown)
    base = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    return model, QASSO(base, graph, sparsity=0.0, schedule=SCHEDULE, quant_lr=lr, **options)  # type: ignore[arg-type]


def train(model: nn.Module, optimizer: QASSO, first: int, last: int, parts: int = 1) -> None:
    for step in range(first, last):
        x, y = optim_nets.batch(step)
        optimizer.zero_grad()
        for one, target in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
            (nn.functional.cross_entropy(model(one), target) / parts).backward()
        optimizer.step()


def ranges(model: nn.Module) -> dict[str, float]:
    return {name: q.q_m.item() for name, q in quantizers(model).items() if q.kind == "activation"}


def widths(model: nn.Module) -> dict[str, float]:
    return {name: q.bit_width().item() for name, q in quantizers(model).items() if q.kind == "activation"}


def test_a_range_that_values_outgrew_is_set_anew_at_the_same_bits() -> None:
    model, optimizer = build(outgrown=50.0)
    model.eval()  # the norm's statistics stay
    train(model, optimizer, 0, 1)
    before, bits = ranges(model), widths(model)
    train(model, optimizer, 1, 2)
    after = ranges(model)
    assert 5.0 < after["second:input"] / before["second:input"] < 100.0
    assert after["first:input"] == before["first:input"]
    assert widths(model) == pytest.approx(bits)
    assert any("were set anew" in line for line in optimizer.report())


@pytest.mark.parametrize(("bits", "lowest", "highest"), [(2, 1.0, 1.5), (4, 2.2, 3.4), (8, 3.9, 4.2)])
def test_the_new_range_suits_the_bits(bits: int, lowest: float, highest: float) -> None:
    """Of normal values the best ranges are about 1.2 (codes -1, 0, 1), 2.6 and 4 deviations."""
    start = torch.tensor(0.01, dtype=torch.float64)
    quantizer = Quantizer("one:input", "activation", geta.Bits(bits, bits), start, initial_bits=bits)
    x = torch.randn(64, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    follower = RangeFollower([quantizer])
    follower.watch(EVERY)
    quantizer(x)
    assert follower.follow_()
    assert lowest < quantizer.q_m.item() < highest
    assert quantizer.bit_width().item() == pytest.approx(bits)
    assert follower.times.tolist() == [1]


def test_ranges_that_fit_stay_as_they_are() -> None:
    model, optimizer = build()
    model.eval()
    before = ranges(model)
    train(model, optimizer, 0, STEPS)
    assert ranges(model) == before
    assert not any("were set anew" in line for line in optimizer.report())


@pytest.mark.parametrize(("bits", "stays"), [(2, True), (3, True), (8, False)])
def test_a_range_that_clips_a_little_stays_where_few_bits_gain_by_it(bits: int, stays: bool) -> None:
    """Of normal values the best range at 2 bits is about 1.2 deviations, at 3 bits 2.1; at 8 bits clipping there is the whole error."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    quantizer = Quantizer("one:input", "activation", geta.Bits(bits, bits), torch.tensor(1.7), initial_bits=bits)
    follower = RangeFollower([quantizer])
    follower.watch(EVERY)
    quantizer(x)
    follower.follow_()
    assert (quantizer.q_m.item() == pytest.approx(1.7)) == stays


def test_it_can_be_switched_off() -> None:
    model, optimizer = build(outgrown=50.0, follow=False)
    before = ranges(model)
    train(model, optimizer, 0, STEPS)
    assert ranges(model) == before


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_show_what_the_batch_shows(parts: int) -> None:
    """Only the last digit may differ: sums of the gradients are made in another order."""
    runs = []
    for count in (1, parts):
        model, optimizer = build(outgrown=50.0)
        model.eval()
        train(model, optimizer, 0, EVERY + 1, parts=count)
        runs.append(ranges(model))
    assert runs[0] == pytest.approx(runs[1], rel=1e-12)


def test_a_resumed_run_follows_bitwise() -> None:
    whole, optimizer = build(outgrown=50.0, lr=0.01)
    for stop in range(1, 2 * EVERY + 2, 5):
        train(whole, optimizer, optimizer.progress()["step"], stop)
        saved = copy.deepcopy({"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
        again, second = build(outgrown=50.0, lr=0.01)
        again.load_state_dict(saved["model"])
        second.load_state_dict(saved["optimizer"])
        train(whole, optimizer, stop, stop + 4)
        train(again, second, stop, stop + 4)
        assert ranges(again) == ranges(whole)
        assert second.report() == optimizer.report()


def test_validation_is_not_looked_at() -> None:
    model, optimizer = build()
    model.eval()
    train(model, optimizer, 0, EVERY)
    before = ranges(model)
    with torch.no_grad():
        model(1000.0 * optim_nets.batch(0)[0].double())
    train(model, optimizer, EVERY, EVERY + 1)
    assert ranges(model) == before


def test_silent_and_broken_values_change_nothing() -> None:
    for value in (0.0, float("nan"), float("inf")):
        quantizer = Quantizer("one:input", "activation", geta.Bits(8, 8), torch.tensor(1.0), initial_bits=8)
        follower = RangeFollower([quantizer])
        follower.watch(EVERY)
        assert quantizer.sample is not None
        quantizer.sample = torch.full((4, 100), value).flatten()
        follower.follow_()
        assert (quantizer.q_m.item(), quantizer.bit_width().item()) == (1.0, pytest.approx(8.0))


def test_a_layer_that_was_not_called_changes_nothing() -> None:
    quantizer = Quantizer("one:input", "activation", geta.Bits(8, 8), torch.tensor(1.0), initial_bits=8)
    follower = RangeFollower([quantizer])
    follower.watch(EVERY)
    assert follower.follow_()
    assert quantizer.q_m.item() == 1.0


def test_compiled_models_are_followed_too() -> None:
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, optimizer = build(outgrown=50.0)
        model.eval()
        used = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        for step in range(EVERY + 1):
            x, y = optim_nets.batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(used(x.double()), y).backward()
            optimizer.step()
        found.append(ranges(model))
    assert found[0] == pytest.approx(found[1])
    torch._dynamo.reset()


def test_samples_are_spread_and_belong_to_rows() -> None:
    x = torch.arange(4 * 3000, dtype=torch.float32).view(4, 3000)
    sample = sample_of(x)
    assert len(sample) == 4 * 256
    assert len(sample.unique()) == len(sample)
    stretches = sample.view(4, 256)
    assert bool((stretches.diff(dim=1) > 0).all())
    assert torch.equal(torch.cat([sample_of(x[:1]), sample_of(x[1:])]), sample)
    assert torch.equal(sample_of(x[:, :7]), x[:, :7].flatten())
    assert sample_of(torch.zeros(0, 5)).shape == (0,)
    assert sample_of(torch.zeros(5, 0)).shape == (0,)
    assert torch.equal(sample_of(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
