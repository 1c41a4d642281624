"""Latency: candidates take turns, warm-up rounds are not counted, the statistics are those of the timed rounds."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from geta.report import latency
from geta.report.latency import Latency, inference_latency, interleaved


def test_calls_take_turns_and_warmup_is_not_counted(monkeypatch):
    order: list[str] = []
    readings = iter([0.0, 0.001, 0.0, 0.004, 0.0, 0.003, 0.0, 0.004, 0.0, 0.002, 0.0, 0.010])
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    found = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert found == {"a": Latency(1.0, 2.0, 3.0, 3.0), "b": Latency(4.0, 4.0, 10.0, 10.0)}


def test_each_model_is_called_with_the_input_and_without_gradients():
    seen: list[tuple[str, bool]] = []

    class Probe(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.name, torch.is_inference_mode_enabled()))
            return x

    found = inference_latency({"one": Probe("one"), "two": Probe("two")}, torch.zeros(1), rounds=2)
    assert seen == [("one", True), ("two", True)] * 5
    assert list(found) == ["one", "two"]
    assert 0 <= found["one"].minimum <= found["one"].median <= found["one"].maximum
    assert list(found["two"].to_json()) == ["minimum", "median", "p95", "maximum"]


def test_in_bursts_the_fastest_call_counts_and_the_time_limit_leaves_three_rounds(monkeypatch):
    steps = iter([5.0] + [4.0, 1.0, 3.0] * 3)  # a burst of 6 seconds takes three calls; the warm-up call takes 5
    now = [0.0]

    def call() -> None:
        now[0] += next(steps)

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = interleaved({"a": call}, rounds=50, warmup=1, seconds=1.0, burst=6.0)
    assert found["a"] == latency.Latency(1e3, 1e3, 1e3, 1e3)
    assert now[0] == 5.0 + 3 * 8.0


def test_short_calls_are_repeated_before_they_are_timed_and_long_ones_are_not(monkeypatch):
    now, called = [0.0], {"short": 0, "long": 0}

    def call(name: str, takes: float) -> None:
        called[name] += 1
        now[0] += takes

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    turns = {"short": lambda: call("short", 0.25), "long": lambda: call("long", 4.0)}
    found = interleaved(turns, rounds=3, warmup=1, settle=1.0)
    assert called == {"short": 1 + 1 + 5 + 5, "long": 4}  # the first timed call says how long the short one takes
    assert found["short"].maximum == 250.0
