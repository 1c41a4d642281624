"""Latency tables with made-up times: a layer takes a microsecond for each number that its tensors have, and a bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import geta
from geta.cost.derive import network_layers
from geta.cost.latency import LatencyGrid, LatencyTable
from geta.cost.layers import LayerShape


def milliseconds(shape: LayerShape, values: Sequence[int]) -> float:
    """Linear in every variable alone, so that interpolation is exact."""
    return 0.001 + 1e-4 * float(np.prod([float(value) for value in values]))


def made_up(graph: geta.DependencyGraph, batch: int = 2, **numbers: float) -> LatencyTable:
    """A table for the graph's model. numbers: scale, fixed_ms, per_element_ms."""
    grids = {}
    for layer in network_layers(graph, batch).layers:
        axes = [(1, extent) if extent > 1 else (1,) for extent in layer.shape.extents]
        times = np.zeros([len(axis) for axis in axes])
        for place in np.ndindex(*times.shape):
            times[place] = milliseconds(layer.shape, [axis[at] for axis, at in zip(axes, place, strict=True)])
        grids[layer.shape.key] = LatencyGrid.of(layer.shape, "floats", axes, times)
    return LatencyTable("onnx", "floats", batch, 1, tuple(grids.values()), **numbers)
