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


_FEWEST_ROUNDS = 3


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 30,
    warmup: int = 3,
    *,
    seconds: float = math.inf,
    burst: float = 0.0,
    settle: float = 0.0,
) -> dict[str, Latency]:
    """Time every call once per round, in turn, so that a drift of the machine's speed meets all of them alike.

    calls:   name -> function without arguments.
    rounds:  timed rounds; `warmup` untimed ones come before.
    seconds: no further round begins after so much time, but three are always timed (or `rounds`, if that is fewer).
    burst:   each turn repeats its call for so many seconds, at least once, and the fastest counts: for many short candidates, which
        drive each other out of the caches.
    settle:  a turn begins with so many seconds of untimed calls, if the last timed one was shorter: a network of microseconds is served
        again and again, not each time after another one has filled the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds if seconds < math.inf else math.inf
    for number in range(warmup + rounds):
        if number >= warmup + min(_FEWEST_ROUNDS, rounds) and end < math.inf and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if number < warmup:
                call()
                continue
            if settle and times[name] and times[name][-1] < settle * 1e3:
                _turn(call, settle)
            times[name].append(_turn(call, burst) * 1e3)
    return {name: _summary(sorted(found)) for name, found in times.items()}


def _turn(call: Callable[[], object], burst: float) -> float:
    """Seconds of the fastest call in a burst; one call, where there is none."""
    best, spent = math.inf, 0.0
    while True:
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
        if spent >= burst:
            return best


def _summary(times: Sequence[float]) -> Latency:
    """times: in order."""
    return Latency(times[0], statistics.median(times), times[math.ceil(0.95 * len(times)) - 1], times[-1])


def inference_latency(models: Mapping[str, nn.Module], x: torch.Tensor, rounds: int = 30) -> dict[str, Latency]:
    """Time the inference of several models on the same input; each must be in evaluation mode.

    x: one batch, first dimension the batch.
    """
    with torch.inference_mode():
        return interleaved({name: lambda model=model: model(x) for name, model in models.items()}, rounds)  # type: ignore[misc]
