"""Training runs that save checkpoints and go on from the last one, to be killed at any moment; importable by spawned processes."""

from __future__ import annotations

import io
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import geta
from geta.quant import quantize
from geta.report.files import write_atomically
from optim_nets import ByHand, family

STEPS = 64
SCHEDULE = geta.Schedule(STEPS, warmup=14, projection=16, joint=18, projection_periods=4, joint_periods=3)
EVERY = 2
"""Steps between checkpoints."""


def make(kind: str) -> tuple[nn.Module, Any, torch.optim.lr_scheduler.LRScheduler]:
    """The same start in every process."""
    torch.manual_seed(7)
    parts = [nn.Linear(5, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)]
    model = nn.Sequential(*parts)
    settings: dict[str, Any] = {"sparsity": 0.5, "schedule": SCHEDULE, "saliency": {"cosine": 1.0, "fisher": 1.0, "activation": 1.0}}
    if kind == "qasso":
        quantize(model, weights=(3, 6), activations=(6, 8), calibration=[torch.randn(16, 5)], granularity="channel", exclude=())
    second = ["3.weight", "3.bias", "4.weight", "4.bias", "4.running_mean"]
    graph = ByHand(model, [family("0", 12, ["0.weight", "0.bias"], ["3.weight"]), family("3", 9, second, ["6.weight"])])
    base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    if kind == "cric":
        optimizer: Any = geta.HESSOCRIC(base, graph, **settings, max_cycles=2, probe_weight=0.5)
    else:
        optimizer = {"qasso": geta.QASSO, "hesso": geta.HESSO}[kind](base, graph, **settings)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def save(path: Path, step: int, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
    file = io.BytesIO()
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({**state, "random": torch.get_rng_state()}, file)
    write_atomically(path, file.getvalue())


def train(kind: str, folder: Path, announce: Connection | None = None) -> None:
    """Train from the last checkpoint in `folder`, if there is one, to the end; leaves `final.pt`. Says every step that it begins."""
    torch.set_num_threads(1)
    model, optimizer, scheduler = make(kind)
    first, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["random"])
        first = saved["step"]
    for step in range(first, STEPS):
        if announce is not None:
            announce.send((step, optimizer.stage))
        x = torch.randn(16, 5)
        loss = F.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        if kind == "cric":
            optimizer.step(loss=loss)
        else:
            optimizer.step()
        scheduler.step()
        if (step + 1) % EVERY == 0:
            save(checkpoint, step + 1, model, optimizer, scheduler)
    optimizer.check()
    save(folder / "final.pt", STEPS, model, optimizer, scheduler)


def train_on_ranks(rank: int, folder: Path, killed: tuple[int, int] | None) -> int:
    """QASSO on two ranks; rank 0 saves, all resume from that. killed: (rank, step), that rank kills itself in that step."""
    model, optimizer, scheduler = make("qasso")
    first, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first = saved["step"]
    outer = DistributedDataParallel(model)
    for step in range(first, STEPS):
        torch.manual_seed(1000 * rank + step)
        x = torch.randn(8, 5)
        loss = F.cross_entropy(outer(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        if killed == (rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        scheduler.step()
        if (step + 1) % EVERY == 0:
            if rank == 0:
                save(checkpoint, step + 1, model, optimizer, scheduler)
            dist.barrier()
    optimizer.check()
    if rank == 0:
        save(folder / "final.pt", STEPS, model, optimizer, scheduler)
    return first
