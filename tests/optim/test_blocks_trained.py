"""QASSO over weights with one scale per block of columns: constraints, kernels and operators alike, resume, budgets that count scales."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geta
from geta.cost.derive import cost_model
from geta.optim import QASSO, Schedule, rows, stacked
from geta.optim.bank import QuantizerBank
from geta.quant import native_status, quantize, quantizers
from optim_nets import ByHand, family

STEPS = 24
SCHEDULE = Schedule(STEPS, warmup=3, projection=4, joint=12, projection_periods=2, joint_periods=3)
GROUPS: dict[str, Any] = {"granularity": "group", "group_size": 8, "exclude": ()}


def net(seed: int = 0) -> tuple[nn.Sequential, ByHand]:
    """Blocks of 8, 8 and 4 columns; of 8, 8 and 8; of 8 and 2."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3))
    families = [
        family("0", 24, ["0.weight", "0.bias"], ["2.weight"]),
        family("2", 10, ["2.weight", "2.bias"], ["4.weight"]),
    ]
    return model, ByHand(model, families)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
    return x, x[:, :18].reshape(16, 3, 6).mean(2).argmax(1)


def train(model: nn.Module, optimizer: QASSO, first: int = 0, last: int = STEPS) -> list[float]:
    losses = []
    for step in range(first, last):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def build(seed: int = 0, **options: Any) -> tuple[nn.Module, QASSO]:
    model, graph = net(seed)
    quantize(model, weights=(3, 6), activations=(6, 8), calibration=[batch(99)[0]], **GROUPS)
    return model, QASSO(torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1), graph, schedule=SCHEDULE, **options)


@pytest.mark.parametrize("forgetting", ["descent", "blend"])
@pytest.mark.parametrize("nonlinear", [False, True])
def test_compiled_kernels_and_operators_train_the_same(forgetting: Any, nonlinear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_status().used, native_status()
    states = []
    for fast in (True, False):
        with monkeypatch.context() as patch:
            if not fast:
                patch.setattr(rows, "library", lambda: None)
                patch.setattr(stacked, "_library", lambda: None)
            model, graph = net()
            quantize(model.double(), weights=(4, 8), activations=None, nonlinear=nonlinear, **GROUPS)
            optimizer = QASSO(torch.optim.AdamW(model.parameters(), lr=0.02), graph, schedule=SCHEDULE, forgetting=forgetting)
            train(model, optimizer, 0, 10)
            reached = [] if optimizer._pruner._fast is None else optimizer._pruner._fast_positions
            names = {optimizer._index.parameters[position].name for position in reached}
            assert ("0.weight" in names) == (fast and not nonlinear)
            train(model, optimizer, 10)
            optimizer.check()
            states.append({name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)})
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_forgotten_is_the_fake_quantized_weight() -> None:
    """c + ratio v with d = ratio * unit, block by block."""
    model, _ = net()
    quantize(model, weights=(4, 4), activations=None, initial_bits=4, **GROUPS)
    bank = QuantizerBank([*quantizers(model).values()])
    now, weight = bank.read(), model[2].parametrizations.weight.original.detach()
    low = bank.step_size_of(bank.lower_L, now)
    chosen = torch.tensor([1, 4, 7])
    shaped, rest = bank.split(1, (weight[chosen], weight.shape, lambda tensor: tensor[chosen]), now, low)
    torch.testing.assert_close(shaped + rest, model[2].weight.detach()[chosen])  # d is d(b_l) itself
    assert float(rest.abs().max()) > 0


def test_tightening_shrinks_the_range_of_each_block_at_its_bits() -> None:
    model, optimizer = build()
    bank, weights = optimizer._bank, {name: q for name, q in quantizers(model).items() if q.kind == "weight"}
    with torch.no_grad():
        for quantizer in weights.values():
            quantizer.q_m.mul_(5.0)
            quantizer.d.mul_(5.0)
        before = {name: q.bit_width() for name, q in weights.items()}
        bank.tighten_(optimizer._tightened)
    for name, quantizer in weights.items():
        magnitudes = model[int(name[0])].parametrizations.weight.original.detach().abs()
        largest = torch.stack([part.amax(1) for part in magnitudes.split(8, 1)], 1)
        assert torch.equal(quantizer.q_m.detach(), largest)
        torch.testing.assert_close(quantizer.bit_width(), before[name], rtol=0, atol=1e-3)


def test_a_whole_run_and_its_compact_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3))
    compressor = geta.Compressor(model, (batch(0)[0],), sparsity=0.5, weight_bits=(3, 6), **GROUPS)
    optimizer = compressor.optimizer(torch.optim.AdamW, lr=0.02, schedule=SCHEDULE)
    train(model, optimizer)
    small = compressor.finish()
    assert sum(len(kept) for kept in small.kept.values()) == 17
    assert set(small.bits.values()) <= set(range(3, 7))
    assert small.info.max_difference < 1e-12
    for quantizer in quantizers(model).values():  # one bit width per tensor, whatever the block
        torch.testing.assert_close(quantizer.bit_width(), torch.full_like(quantizer.d, optimizer.bits[quantizer.name]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("stop", [2, 5, 9, 13, 21])
def test_the_next_steps_after_a_resume_are_bitwise_the_same(stop: int) -> None:
    model, optimizer = build()
    train(model, optimizer, 0, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    losses = train(model, optimizer, stop, stop + 3)
    resumed, second = build(seed=7)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert train(resumed, second, stop, stop + 3) == losses
    assert all(torch.equal(one, two) for one, two in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_weights_that_are_stored_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(24, 20), nn.ReLU(), Conv1D(10, 24), nn.ReLU(), nn.Linear(10, 3))
    graph = geta.analyze(model, (batch(0)[0],))
    quantize(model, weights=(3, 6), activations=None, **GROUPS)
    assert [list(q.d.shape) for q in quantizers(model).values()] == [[3, 24], [3, 10], [3, 2]]
    optimizer = QASSO(torch.optim.AdamW(model.parameters(), lr=0.02), graph, sparsity=0.5, schedule=SCHEDULE)
    train(model, optimizer)
    optimizer.check()
    small = geta.compact(model, graph)
    assert small.info.max_difference < 1e-12


def test_budgets_count_the_scales() -> None:
    """The planned bytes are those of the compact model, or a little more: a block's scales stay until its last column goes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3))
    graph = geta.analyze(model, (batch(0)[0],))
    quantize(model, weights=(3, 6), activations=None, **GROUPS)
    costs = cost_model(graph)
    assert [note.split("'")[1] for note in costs.notes] == ["2.weight", "4.weight"]  # the first one's columns are inputs
    with torch.no_grad():
        for quantizer in quantizers(model).values():
            quantizer.round_bits_()
    bits = np.full(len(costs.quantizers), 6.0)
    nothing = {family.name: torch.zeros(family.size, dtype=torch.bool) for family in graph.prunable_families}
    whole = geta.compact(model, graph, nothing).cost.weight_bytes
    assert costs.evaluate(np.zeros(2, dtype=np.int64), bits)["bytes"] == whole == geta.cost(model, (batch(0)[0],)).weight_bytes
    scales = 4 * (24 * 3 + 10 * 3 + 3 * 2)
    assert whole == scales + 4 * (24 + 10 + 3) + sum(-(-size * 6 // 8) for size in (480, 240, 30))

    optimizer = QASSO(torch.optim.AdamW(model.parameters(), lr=0.02), graph, target=geta.Budget(bytes=600), schedule=SCHEDULE)
    train(model, optimizer)
    optimizer.check()
    small = geta.compact(model, graph)
    optimizer.check_cost(small.cost)
    assert 400 < small.cost.weight_bytes <= 600
    assert any("scales of '2.weight' are bounded from above" in line for line in optimizer.report())
