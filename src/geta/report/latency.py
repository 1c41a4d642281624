"""Latency measured fairly: the candidates take turns in one process, and the median counts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call: the fastest, the median, the 95th percentile and the slowest of all timed rounds."""

    minimum: float
    median: float
    p95: float
    maximum: float

    def to_json(self) -> dict[str, float]:
        """Return plain data for result files."""
        return asdict(self)


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int = 30, warmup: int = 3) -> dict[str, Latency]:
    """Time every call once per round, in turn, so that a drift of the machine's speed meets all of them alike.

    calls:  name -> function without arguments.
    rounds: timed rounds; `warmup` untimed ones come before.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: _summary(sorted(found)) for name, found in times.items()}


def _summary(times: Sequence[float]) -> Latency:
    """times: in order."""
    return Latency(times[0], statistics.median(times), times[math.ceil(0.95 * len(times)) - 1], times[-1])


def inference_latency(models: Mapping[str, nn.Module], x: torch.Tensor, rounds: int = 30) -> dict[str, Latency]:
    """Time the inference of several models on the same input; each must be in evaluation mode.

    x: one batch, first dimension the batch.
    """
    with torch.inference_mode():
        return interleaved({name: lambda model=model: model(x) for name, model in models.items()}, rounds)  # type: ignore[misc]
