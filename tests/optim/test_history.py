"""`optimizer.history`: what it notes, that noting doesn't wait for the device, that it survives a checkpoint, and its figure."""

from __future__ import annotations

import io
import sys

import pytest
import torch

import geta
import optim_nets
from geta.errors import CheckpointError, GetaError
from geta.optim.history import History

STEPS = 60


def quantized(steps: int = STEPS):
    model, graph = optim_nets.net()
    geta.quantize(model, weights=geta.Bits(4, 8), activations=geta.Bits(8, 8), calibration=[optim_nets.batch(0)[0]])
    return model, geta.QASSO(torch.optim.SGD(model.parameters(), lr=0.05), graph, sparsity=0.5, schedule=steps)


def plain(kind: type, steps: int = STEPS):
    model, graph = optim_nets.net()
    return model, kind(torch.optim.SGD(model.parameters(), lr=0.05), graph, sparsity=0.5, schedule=steps)


def test_rows_agree_with_progress():
    model, optimizer = quantized()
    seen = []
    optim_nets.train(model, optimizer, 0, STEPS, lambda: seen.append(optimizer.progress()))
    rows = optimizer.history.rows
    assert [row.step for row in rows] == [now["step"] for now in seen] == list(range(1, STEPS + 1))
    for row, now in zip(rows, seen, strict=True):
        assert row.stage == optimizer.schedule.stage_at(row.step - 1)
        assert (row.pruned_groups, row.redundant_groups) == (now["pruned_groups"], now["redundant_groups"])
        assert row.group_sparsity == now["group_sparsity"]
        assert row.mean_weight_bits == pytest.approx(now["mean_weight_bits"], abs=1e-5)
        assert row.upper_bound == optimizer.schedule.upper_bits_at(row.step - 1, 8)
    assert rows[-1].mean_weight_bits == pytest.approx(sum(b for n, b in optimizer.bits.items() if ":" not in n) / 4)


@pytest.mark.parametrize("kind", [geta.HESSO, geta.HESSOCRIC])
def test_optimizers_that_only_prune_have_one_too(kind):
    model, optimizer = plain(kind)
    optim_nets.train(model, optimizer, 0, STEPS)
    rows = optimizer.history.rows
    assert {row.stage for row in rows} == {"warm-up", "joint", "cool-down"}
    assert rows[-1].pruned_groups == optimizer.target_groups == 12
    assert all(row.mean_weight_bits is None and row.upper_bound is None for row in rows)
    assert rows[0].learning_rate == 0.05
    first = next(row.step for row in rows if row.stage == "cool-down")
    assert [row.stage for row in rows[first - 1 :]] == ["cool-down"] * (STEPS - first + 1)


def test_long_runs_note_every_so_many_steps_and_the_ends_of_stages():
    history = History(100_000, 10)
    due = [step for step in range(1, 100_001) if history.due(step, ends=step in (10_001, 25_003))]
    assert len(due) == 202
    assert {10_001, 25_003, 100_000} <= set(due)


def test_runs_beyond_their_plan_stay_short():
    history = History(100, 10)
    for step in range(1, 5001):
        stage = "warm-up" if step <= 33 else "cool-down"
        if history.due(step, ends=step == 33):
            history.note(
                step=step, stage=stage, learning_rate=None, pruned_groups=0, redundant_groups=0, mean_weight_bits=None, upper_bound=None
            )
    assert len(history) <= 501
    assert 33 in [row.step for row in history.rows]
    assert history.rows[-1].step > 4900
    assert history.rows[0].learning_rate is None


def test_noting_reads_nothing_back_from_the_device(monkeypatch):
    model, optimizer = quantized()
    optim_nets.train(model, optimizer, 0, 10)
    kept = [row[-2] for row in optimizer.history._noted]
    assert all(isinstance(value, torch.Tensor) and value.dim() == 0 and not value.requires_grad for value in kept)
    read = []
    for name in ("item", "tolist", "cpu", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, _name=name, *_: read.append(_name))
    optimizer._note("warm-up", "projection")
    assert read == [] and len(optimizer.history) == 11


@pytest.mark.parametrize("make", [quantized, lambda: plain(geta.HESSO), lambda: plain(geta.HESSOCRIC)])
def test_a_resumed_run_has_all_of_it(make):
    model, optimizer = make()
    optim_nets.train(model, optimizer, 0, 35)
    saved = optim_nets.through_a_file(model, optimizer)
    optim_nets.train(model, optimizer, 35, STEPS)
    again, second = make()
    again.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert len(second.history) == 35
    optim_nets.train(again, second, 35, STEPS)
    assert second.history.rows == optimizer.history.rows


def test_a_checkpoint_of_before_there_was_a_history_loads():
    model, optimizer = plain(geta.HESSO)
    optim_nets.train(model, optimizer, 0, 5)
    state = optimizer.state_dict()
    del state["geta"]["noted"]
    optimizer.load_state_dict(state)
    assert optimizer.history.rows == []
    optim_nets.train(model, optimizer, 5, 7)
    assert [row.step for row in optimizer.history.rows] == [6, 7]


@pytest.mark.parametrize(
    "state", [{"rows": torch.zeros(2, 3), "every": 1}, {"rows": None, "every": 1}, {"rows": torch.zeros(0, 7), "every": 0}]
)
def test_a_damaged_history_is_refused(state):
    with pytest.raises(CheckpointError, match="history"):
        History(10, 1).load(state)


def test_the_figure():
    model, optimizer = quantized()
    optim_nets.train(model, optimizer, 0, STEPS)
    figure = optimizer.history.plot()
    groups, bits, rate = figure.axes
    assert [text.get_text() for text in groups.texts] == ["warm-up", "projection", "joint", "cool-down"]
    assert groups.lines[0].get_ydata()[-1] == 50.0
    assert bits.lines[1].get_ydata()[-1] == 8.0
    assert rate.get_xlabel() == "step"
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    assert stream.getvalue().startswith(b"\x89PNG")


def test_a_run_that_has_not_begun_can_be_drawn():
    _, optimizer = plain(geta.HESSO)
    optimizer.history.plot().savefig(io.BytesIO(), format="png")
    assert "0 rows" in repr(optimizer.history)


def test_missing_matplotlib_is_explained(monkeypatch):
    _, optimizer = plain(geta.HESSO)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GetaError, match=r"history\.plot\(\) needs matplotlib.*pip install 'geta\[plots\]'"):
        optimizer.history.plot()
