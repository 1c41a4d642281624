"""Hugging Face accelerate around model, optimizer, data and scheduler: the plain loop's result, and its checkpoints go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import geta
from geta.optim import HESSO, HESSOCRIC, QASSO, Schedule
from optim_nets import batch

STEPS = 30
SCHEDULE = Schedule(STEPS, warmup=5, projection=6, joint=12, projection_periods=3, joint_periods=2, initial_bits=8)


class Batches(Dataset):
    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return batch(step)


class Convolutions(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(x)))).flatten(1))


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps one state per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def build(kind: str) -> tuple[nn.Module, Any, Any, Any]:
    torch.manual_seed(0)
    model = Convolutions()
    graph = geta.analyze(model, (batch(0)[0],))
    if kind == "qasso":
        geta.quantize(model, weights=(4, 8), activations=(6, 8), calibration=[batch(100)[0]], initial_bits=8)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    made = {"qasso": QASSO, "hesso": HESSO, "cric": HESSOCRIC}[kind]
    optimizer = made(base, graph, sparsity=0.5, schedule=SCHEDULE)
    return model, graph, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, STEPS)


def plain(kind: str, *, bf16: bool = False) -> tuple[nn.Module, Any]:
    model, _, optimizer, scheduler = build(kind)
    for step in range(STEPS):
        x, y = batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(x)
        F.cross_entropy(out.float(), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer


def accelerated(accelerator: Accelerator, kind: str, stop: int = STEPS, resume: Path | None = None) -> tuple[nn.Module, Any, Any]:
    model, graph, optimizer, scheduler = build(kind)
    data = DataLoader(Batches(), batch_size=1, collate_fn=lambda items: items[0])
    outer, wrapped, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
    first = 0
    if resume is not None:
        accelerator.load_state(resume)
        first = optimizer.progress()["step"]
        data = accelerator.skip_first_batches(data, first)
    for _, (x, y) in zip(range(first, stop), data, strict=False):
        accelerator.backward(F.cross_entropy(outer(x), y))
        wrapped.step()
        scheduler.step()
        wrapped.zero_grad()
    return model, graph, optimizer


def same(one: tuple[nn.Module, Any], two: tuple[nn.Module, Any]) -> None:
    for _, optimizer in (one, two):
        optimizer.check()
    assert all(torch.equal(removed, two[1].selection[name]) for name, removed in one[1].selection.items())
    for (name, mine), (_, theirs) in zip(one[0].state_dict().items(), two[0].state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["qasso", "hesso", "cric"])
def test_prepared_objects_train_as_the_plain_loop(kind, bf16):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
    model, graph, optimizer = accelerated(accelerator, kind)
    same((model, optimizer), plain(kind, bf16=bf16))
    small = geta.compact(accelerator.unwrap_model(model, keep_fp32_wrapper=False), graph)
    assert sum(len(kept) for kept in small.info.kept.values()) == 14 - optimizer.target_groups


@pytest.mark.parametrize("kind", ["qasso", "hesso", "cric"])
@pytest.mark.parametrize("stop", [8, 15, 27])
def test_its_checkpoints_go_on_bitwise(kind, stop, tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerated(accelerator, kind, stop)
    accelerator.save_state(tmp_path / "state")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    model, _, optimizer = accelerated(Accelerator(cpu=True), kind, resume=tmp_path / "state")
    same((model, optimizer), plain(kind))


def test_accumulated_gradients_are_one_step():
    """Two batches per step: the schedule counts steps of the optimizer."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, _, optimizer, _ = build("qasso")
    outer, wrapped = accelerator.prepare(model, optimizer)
    other, _, second, _ = build("qasso")
    for step in range(2 * STEPS):
        x, y = batch(step)
        with accelerator.accumulate(outer):
            accelerator.backward(F.cross_entropy(outer(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(outer.parameters(), 1.0)
            wrapped.step()
            wrapped.zero_grad()
        (F.cross_entropy(other(x), y) / 2).backward()
        if step % 2:
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            second.step()
            second.zero_grad()
    assert optimizer.progress()["step"] == STEPS
    same((model, optimizer), (other, second))
