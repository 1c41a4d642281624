"""How long `geta.analyze` takes, and how much of that is the capture."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from unittest import mock

from torch import nn

import geta
from geta.graph import DependencyGraph
from geta.graph.capture import capture


def timed_analysis(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[DependencyGraph, float, float]:
    """(graph, seconds of the capture, seconds of everything else) of one call of `geta.analyze`."""
    spent = 0.0

    def timed(*inputs: Any, **options: Any) -> Any:
        nonlocal spent
        started = time.perf_counter()
        try:
            return capture(*inputs, **options)
        finally:
            spent += time.perf_counter() - started

    started = time.perf_counter()
    with mock.patch("geta.graph.dependency.capture", timed):
        graph = geta.analyze(model, args, kwargs)
    return graph, spent, time.perf_counter() - started - spent
