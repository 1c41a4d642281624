"""Predicted latency of a compact network: times of layers by shape, interpolated, and a share for everything else.

    milliseconds = scale * sum over layers l of  time_l(v)  +  fixed  +  per_element * (numbers that other operators write)

`time_l` is interpolated linearly in the layer's variables v (channels in, channels out, heads: `geta.cost.layers`) between measured points.
`geta.report.latency_table.measure_layers` measures; here are the numbers as plain data, and their sum for some number of removed groups.

Legend: `V` variables of a layer, `U` distinct sizes of a cost model, `C` candidates.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geta.cost.layers import LayerShape
from geta.errors import CheckpointError, ConfigError

KERNELS = ("floats", "integers")
_VERSION = 1
_NUMBERS = ("batch", "threads", "scale", "fixed_ms", "per_element_ms")
_WORDS = ("runtime", "precision")
_FIELDS = ("machine", "integer_layers", "times", "networks", "notes")


@dataclass(frozen=True, eq=False)
class LatencyGrid:
    """Times of one layer shape. axes: ascending values of each variable [V]; times: milliseconds, one dimension per variable.

    Beyond the axes the nearest point counts. Times never fall with a variable: what was measured is made so (see `of`).
    """

    shape: LayerShape
    kernel: str
    axes: tuple[tuple[int, ...], ...]
    times: np.ndarray

    @classmethod
    def of(cls, shape: LayerShape, kernel: str, axes: Sequence[Sequence[int]], times: np.ndarray) -> LatencyGrid:
        """A grid of measured times.

        Noise and badly fitting sizes may make a smaller layer slower. The middle between the smallest rising table above the measured one
        and the largest below it counts, so that removing groups never costs time and a budget can be planned.
        """
        above, below = np.asarray(times, dtype=np.float64), np.asarray(times, dtype=np.float64)
        for axis in range(above.ndim):
            above = np.maximum.accumulate(above, axis)
            below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
        return cls(shape, kernel, tuple(tuple(int(point) for point in axis) for axis in axes), (above + below) / 2)

    @property
    def key(self) -> str:
        """Tells layers apart that take different times."""
        return f"{self.kernel} {self.shape.key}"

    def at(self, values: np.ndarray) -> np.ndarray:
        """Milliseconds [C] for values [V, C] of the variables."""
        ends: list[tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = []
        for axis, wanted in zip(self.axes, values, strict=True):
            points = np.array(axis, dtype=np.float64)
            low = np.clip(np.searchsorted(points, wanted, side="right") - 1, 0, len(points) - 1)
            high = np.minimum(low + 1, len(points) - 1)
            share = np.clip((wanted - points[low]) / np.maximum(points[high] - points[low], 1.0), 0.0, 1.0)
            ends.append(((low, 1.0 - share), (high, share)))
        found = np.zeros(values.shape[1:])
        for corner in itertools.product(*ends):
            weight: np.ndarray | float = math.prod((part for _, part in corner), start=np.ones(values.shape[1:]))
            found = found + weight * self.times[tuple(place for place, _ in corner)]
        return found


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """What `measure_layers` found out about a network on a machine; plain data.

    machine: facts about it, in words. runtime: "onnx" or "eager"; precision: "floats" or "integers"; batch, threads: as measured.
    grids: times by layer shape. integer_layers: module paths of the layers that integer kernels run.
    scale, fixed_ms, per_element_ms: see above; chosen so that whole networks come out as measured.
    networks: name -> {"measured": ms, "predicted": ms} of the whole networks that were measured.
    """

    runtime: str
    precision: str
    batch: int
    threads: int
    grids: tuple[LatencyGrid, ...]
    integer_layers: tuple[str, ...] = ()
    scale: float = 1.0
    fixed_ms: float = 0.0
    per_element_ms: float = 0.0
    networks: dict[str, dict[str, float]] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """How it was measured, in a few words."""
        names = {"onnx": f"ONNX Runtime, {self.precision}", "eager": "PyTorch"}
        return f"{names.get(self.runtime, self.runtime)}, batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def fingerprint(self) -> str:
        """Differs between tables that predict different times."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LatencyTable) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def grid(self, path: str, shape: LayerShape) -> LatencyGrid:
        """The times of the layer at module path `path`. Raises ConfigError when no such layer was measured."""
        kernel = "integers" if path in self.integer_layers else "floats"
        found = {grid.key: grid for grid in self.grids}.get(f"{kernel} {shape.key}")
        if found is None:
            raise ConfigError(
                f"the latency table has no times for '{path or 'the model itself'}' ({kernel} {shape.key}): it was measured for another "
                "network, other input sizes or other prunable families; measure again with geta.measure_layers(graph)"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        times = [
            {"shape": grid.shape.to_json(), "kernel": grid.kernel, "axes": [list(axis) for axis in grid.axes], "ms": grid.times.tolist()}
            for grid in self.grids
        ]
        plain = {name: getattr(self, name) for name in (*_NUMBERS, *_WORDS, "machine", "networks")}
        return {"latency_table": _VERSION, **plain, "integer_layers": [*self.integer_layers], "times": times, "notes": [*self.notes]}

    @classmethod
    def from_json(cls, data: Any) -> LatencyTable:
        """What `to_json` wrote. Raises CheckpointError for an unknown version and for anything else."""
        if not isinstance(data, Mapping) or "latency_table" not in data:
            raise CheckpointError("this is no latency table: write one with LatencyTable.save")
        if data["latency_table"] != _VERSION:
            raise CheckpointError(f"this latency table has version {data['latency_table']!r}, this geta reads {_VERSION}: measure again")
        missing = [name for name in (*_NUMBERS, *_WORDS, *_FIELDS) if name not in data]
        if missing:
            raise CheckpointError(f"this latency table is damaged: it lacks {', '.join(missing)}")
        try:
            _check_numbers(data)
            return cls(
                **{name: data[name] for name in (*_NUMBERS, *_WORDS)},
                grids=tuple(_grid(one) for one in data["times"]),
                integer_layers=tuple(str(path) for path in data["integer_layers"]),
                networks={str(name): {str(k): float(v) for k, v in times.items()} for name, times in data["networks"].items()},
                machine={str(name): str(value) for name, value in data["machine"].items()},
                notes=tuple(str(note) for note in data["notes"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"this latency table is damaged: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, atomically."""
        from geta.report.files import write_json

        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what `save` wrote. Raises CheckpointError when the file can't be read, or is something else."""
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"the latency table '{path}' can't be read: {error}") from error
        return cls.from_json(data)

    def __str__(self) -> str:
        """One line per layer shape: uncut, and with all variables at their middle point."""
        lines = [f"{self.words}; {len(self.grids)} layer shapes"]
        for grid in self.grids:
            middle = tuple((len(axis) - 1) // 2 for axis in grid.axes)
            small = ", ".join(f"{chr(97 + place)}={grid.axes[place][at]}" for place, at in enumerate(middle))
            shown = f", {grid.times[middle]:.4f} at {small}" if small else ""
            lines.append(f"  {float(grid.times.max()):.4f} ms{shown}  {grid.key}")
        whole = self.networks.items()
        lines += [f"  {name} network: measured {each['measured']:.4f} ms, predicted {each['predicted']:.4f} ms" for name, each in whole]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class LatencyTerm:
    """`count` layers of one grid; its variables are sizes (numbers in [0, U))."""

    grid: LatencyGrid
    sizes: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class LatencyModel:
    """The prediction as a function of the sizes of a cost model. elements: (factor, sizes) of what other operators write."""

    table: LatencyTable
    terms: tuple[LatencyTerm, ...]
    elements: tuple[tuple[int, tuple[int, ...]], ...]

    def milliseconds(self, sizes: np.ndarray) -> np.ndarray:
        """Latency [C] for sizes [U, C]."""
        layers, written = self.parts(sizes)
        table = self.table
        return table.scale * layers + table.per_element_ms * written + table.fixed_ms

    def parts(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Times of the layers alone, as measured, and numbers that the other operators write [C]."""
        layers = np.zeros(sizes.shape[1:])
        for term in self.terms:
            layers = layers + term.count * term.grid.at(sizes[list(term.sizes)])
        written = np.zeros(sizes.shape[1:])
        for factor, used in self.elements:
            written = written + factor * sizes[list(used)].prod(axis=0)
        return layers, written

    def touched(self, chosen_U: np.ndarray) -> LatencyModel:
        """The part that depends on some of the sizes, without what is fixed."""
        terms = tuple(term for term in self.terms if any(chosen_U[u] for u in term.sizes))
        elements = tuple(one for one in self.elements if any(chosen_U[u] for u in one[1]))
        return LatencyModel(self.table, terms, elements)


def _check_numbers(data: Mapping[str, Any]) -> None:
    for name in _NUMBERS:
        value = data[name]
        whole = name in ("batch", "threads")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value) or value < whole:
            raise ValueError(f"{name} is {value!r}")
    for name in _WORDS:
        if not isinstance(data[name], str):
            raise TypeError(f"{name} is {data[name]!r}")


def _grid(data: Mapping[str, Any]) -> LatencyGrid:
    times = np.array(data["ms"], dtype=np.float64)
    axes = [tuple(int(point) for point in axis) for axis in data["axes"]]
    shape = LayerShape.from_json(data["shape"])
    rising = all(axis and all(a < b for a, b in itertools.pairwise(axis)) for axis in axes)
    if times.shape != tuple(len(axis) for axis in axes) or len(axes) != len(shape.extents) or not rising:
        raise ValueError(f"the times of {shape.key} don't fit their axes")
    if data["kernel"] not in KERNELS or not np.isfinite(times).all() or (times < 0).any():
        raise ValueError(f"the times of {shape.key} are no times")
    return LatencyGrid.of(shape, str(data["kernel"]), axes, times)
