"""Time of one training step of the demo's ResNet-20: plain SGD on the plain network against QASSO in each of its stages.

All candidates take turns in one process, so only the ratios mean something; the table gives min / median / max of each.
Run it with `make bench`; `--rounds N` and `--batch N` change the defaults.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import geta
from geta.cli.demo_model import resnet20
from geta.report.latency import Latency, interleaved

_ENDLESS = 1_000_000
_SETTLE = 3
SCHEDULES = {
    "warm-up": geta.Schedule(_ENDLESS, warmup=0.9, projection=1, joint=1),
    "projection": geta.Schedule(_ENDLESS, warmup=0, projection=0.9, joint=1),
    "joint": geta.Schedule(_ENDLESS, warmup=0, projection=1, joint=0.9),
    "cool-down": geta.Schedule(_ENDLESS, warmup=0, projection=1, joint=1),
}


@dataclass(frozen=True)
class Candidate:
    """One way to train: `whole` does a training step, `update` only the optimizer's part of it on the gradients at hand."""

    whole: Callable[[], object]
    update: Callable[[], object]


def candidate(stage: str | None, images: torch.Tensor, labels: torch.Tensor) -> Candidate:
    """Build the plain candidate (stage None), or the one that stays in `stage` of QASSO."""
    geta.seed_everything(0)
    model: torch.nn.Module = resnet20()
    optimizer: torch.optim.Optimizer
    if stage is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    else:
        graph = geta.analyze(model, (images[:2],))
        geta.quantize(model, weights=geta.Bits(4, 8), activations=geta.Bits(8, 8), calibration=[images])
        base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        optimizer = geta.QASSO(base, graph, sparsity=0.5, schedule=SCHEDULES[stage])

    def whole() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    for _ in range(_SETTLE):
        whole()
    if isinstance(optimizer, geta.QASSO) and optimizer.stage != stage:
        raise RuntimeError(f"the optimizer is in stage {optimizer.stage}, not in {stage}: the schedule of this benchmark is wrong")
    return Candidate(whole, optimizer.step)


def spread(time: Latency) -> str:
    """Word a latency as min / median / max milliseconds."""
    return f"{time.minimum:.2f} / {time.median:.2f} / {time.maximum:.2f}"


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    images, labels = torch.rand(options.batch, 1, 8, 8), torch.arange(options.batch) % 10
    candidates = {stage or "plain SGD": candidate(stage, images, labels) for stage in (None, *SCHEDULES)}
    whole = interleaved({name: one.whole for name, one in candidates.items()}, options.rounds)
    update = interleaved({name: one.update for name, one in candidates.items()}, options.rounds)
    title = (
        f"ResNet-20, batch {options.batch} of 1x8x8, {options.rounds} rounds, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, "
        f"Python {platform.python_version()}; milliseconds, min / median / max"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("", "training step", "ratio", "optimizer.step()", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in candidates:
        ratios = [times[name].median / times["plain SGD"].median for times in (whole, update)]
        table.add_row(name, spread(whole[name]), f"{ratios[0]:.2f}", spread(update[name]), f"{ratios[1]:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
