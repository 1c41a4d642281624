"""Measure a latency table: what the layers of a network take on this machine as a function of how many channels they keep.

    table = geta.measure_layers(graph, precision="integers", batch=1)
    table.save("latency.json")                                   # geta.LatencyTable.load reads it, in another process too
    geta.QASSO(base, graph, target=geta.Budget(latency_ms=2.0, latency=table), ...)

Every distinct layer shape is timed alone, at up to 4 x 4 combinations of channels in and out; so is the whole network, uncut and with
half of every family removed. Isolated layers don't quite add up to a network, so three numbers are fitted to these two: a factor of all
layers, a time per number that other operators write, and a constant. All candidates take turns in every round, for 5 milliseconds each,
of which the fastest run counts: the first ones find the caches full of other candidates' numbers.
"""

from __future__ import annotations

import itertools
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from geta.cost.derive import cost_model, network_layers
from geta.cost.latency import LatencyGrid, LatencyTable
from geta.cost.layers import Layer, LayerShape
from geta.cost.model import LATENCY
from geta.errors import ConfigError
from geta.export.parity import runner
from geta.graph.dependency import DependencyGraph
from geta.quant import quantizers
from geta.quant.ops import step_size
from geta.report.latency import interleaved
from geta.report.layer_calls import Call, eager_call, empty_call, onnx_call
from geta.report.runtimes import at_batch, has_dot_products, torch_threads
from geta.subnet.compact import compact
from geta.subnet.model import CompactModel

_FRACTIONS = {1: (0.125, 0.375, 0.6875, 1.0), 2: (0.125, 0.375, 0.6875, 1.0), 3: (0.25, 1.0)}
"""How many variables a layer has -> shares of their uncut values that are timed."""
_FEW = 4
_STEPS = (8, 4, 2)
_ROUNDS = 50
_BURST = 5e-3
_LARGEST = 5
_TRUST = 1e-2
"""How much the fit minds a factor other than 1, relative to missing a whole network's time."""


def measure_layers(
    graph: DependencyGraph,
    *,
    runtime: str = "onnx",
    precision: str = "floats",
    batch: int | None = None,
    threads: int = 1,
    seconds: float = 15.0,
) -> LatencyTable:
    """Time the layers of the graph's model, as it is now, by shape. Values don't matter, so training may come later.

    runtime:   "onnx" (ONNX Runtime on the CPU, needs `geta[onnx]`) or "eager" (PyTorch on the CPU).
    precision: "integers" = layers that `export_onnx` gives to integer kernels run there: needs a quantized model. "floats" = float32.
    batch:     batch size; None = that of the example inputs. threads: of the runtime.
    seconds:   for timing; every candidate is timed at least three times, however long that takes.

    Layers are convolutions, linear layers, matrix products and attention; recurrent layers, embeddings, normalisations and the like
    count by the numbers that they write. The model is as before afterwards.
    Raises ConfigError for settings that can't be had.
    """
    _check_settings((runtime, precision), batch, threads, seconds)
    _check_model(graph.model, precision)
    size = _example_batch(graph) if batch is None else batch
    found = network_layers(graph, size)
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads):
        networks = _networks(graph, runtime, precision, size, threads=threads, folder=Path(folder))
        points = _points(found.layers, networks.integer)
        calls = {**networks.calls, "empty": _empty_call(runtime, threads)}
        for name, point in points.items():
            calls[name] = _layer_call(*point, runtime, threads)
        times = {name: one.median for name, one in interleaved(calls, _ROUNDS, warmup=1, seconds=seconds, burst=_BURST).items()}
    grids = _grids(points, {name: max(0.0, times[name] - times["empty"]) for name in points})
    table = LatencyTable(
        runtime,
        precision,
        size,
        threads,
        grids,
        integer_layers=tuple(networks.integer),
        machine=_machine(runtime),
        notes=tuple(found.notes),
    )
    return _fitted(graph, table, networks.removed, {name: times[name] for name in networks.calls})


@dataclass(frozen=True)
class Prediction:
    """Latency of a whole network as a table predicts it, and as it was measured just now, in milliseconds.

    pace: how long the table's largest layers take now, beside the network, as a multiple of what the table says: machines change their
          speed from minute to minute, and other work slows them down.
    """

    predicted: float
    measured: float
    words: str
    pace: float = 1.0

    @property
    def ratio(self) -> float:
        """Measured over predicted, at the machine's present pace."""
        return self.measured / (self.predicted * self.pace)

    def __str__(self) -> str:
        """One line."""
        pace = f"layers alone take {self.pace:.2f} times as long as when the table was made"
        times = f"predicted {self.predicted:.4f} ms, measured {self.measured:.4f} ms"
        return f"{self.words}: {times}; {pace}, so that is {self.ratio:.2f} times the prediction"


def check_prediction(small: CompactModel, graph: DependencyGraph, table: LatencyTable, *, rounds: int = 30) -> Prediction:
    """Measure a compact model as the table's layers were measured, and say what the table predicts for it.

    Its largest layers take turns with the network, so that a machine that is faster or slower than then is told apart from a wrong table.
    graph: what the model was cut with. Raises ConfigError when the model isn't cut from it.
    """
    sizes = {family.name: family.size for family in graph.prunable_families}
    if {name: len(kept) <= sizes.get(name, 0) for name, kept in small.info.kept.items()} != dict.fromkeys(sizes, True):
        raise ConfigError("this compact model has other families than the graph: give the graph that it was cut with")
    costs = cost_model(graph, table)
    removed = [sizes[name] - len(small.info.kept[name]) for name in costs.families]
    predicted = costs.evaluate(removed, np.zeros(len(costs.quantizers)))[LATENCY]
    with tempfile.TemporaryDirectory() as folder, torch_threads(table.threads):
        inputs = at_batch(small.flattened(graph.example.args, graph.example.kwargs), table.batch)
        call, _ = _whole(small, table.runtime, table.precision, inputs, threads=table.threads, path=Path(folder) / "small.onnx")
        largest = sorted(table.grids, key=lambda grid: -grid.times.max())[:_LARGEST]
        calls = {
            grid.key: _layer_call(grid.shape, grid.kernel, tuple(axis[-1] for axis in grid.axes), table.runtime, table.threads)
            for grid in largest
        }
        calls |= {"network": call, "empty": _empty_call(table.runtime, table.threads)}
        times = {name: one.median for name, one in interleaved(calls, rounds, burst=_BURST).items()}
    then = sum(float(grid.times.flat[-1]) for grid in largest)
    now = sum(max(0.0, times[grid.key] - times["empty"]) for grid in largest)
    return Prediction(predicted, times["network"], table.words, now / then if then else 1.0)


@dataclass(frozen=True)
class _Networks:
    """Whole networks to time. removed: how many groups of each prunable family they lack. integer: the layers that integer kernels run."""

    calls: dict[str, Call]
    removed: dict[str, list[int]]
    integer: list[str]


def _check_settings(how: tuple[str, str], batch: int | None, threads: int, seconds: float) -> None:
    if how not in (("onnx", "floats"), ("onnx", "integers"), ("eager", "floats")):
        raise ConfigError(
            f"runtime={how[0]!r} with precision={how[1]!r}: known are 'onnx' with 'floats' or 'integers', and 'eager', which computes in "
            "'floats'"
        )
    if threads < 1 or (batch is not None and batch < 1) or not seconds > 0:
        raise ConfigError(f"threads={threads}, batch={batch}, seconds={seconds}: threads and batch start at 1, seconds are above 0")


def _check_model(model: nn.Module, precision: str) -> None:
    if precision == "integers" and not quantizers(model):
        raise ConfigError("precision='integers', but nothing is quantized: call geta.quantize(model, ...) first, or use precision='floats'")
    for name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.device.type != "cpu" or (parameter.is_floating_point() and parameter.dtype is not torch.float32):
            raise ConfigError(
                f"latency is measured on the CPU in float32, but '{name}' is {parameter.dtype} on {parameter.device}: measure with "
                "a copy of the model there; a table fits every copy"
            )


def _example_batch(graph: DependencyGraph) -> int:
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves((graph.example.args, graph.example.kwargs)) if isinstance(leaf, Tensor)]
    return next((int(leaf.shape[0]) for leaf in leaves if leaf.dim()), 1)


def _networks(graph: DependencyGraph, runtime: str, precision: str, batch: int, *, threads: int, folder: Path) -> _Networks:
    counts = {"uncut": [0] * len(graph.prunable_families), "half": [_half(family.size) for family in graph.prunable_families]}
    calls: dict[str, Call] = {}
    integer: list[str] = []
    with _final_widths(graph.model):
        for name, removed in counts.items():
            selection = {
                family.name: torch.arange(family.size) < count for family, count in zip(graph.prunable_families, removed, strict=True)
            }
            small = compact(graph.model, graph, selection, verify=False)
            inputs = at_batch(small.flattened(graph.example.args, graph.example.kwargs), batch)
            calls[name], paths = _whole(small, runtime, precision, inputs, threads=threads, path=folder / f"{name}.onnx")
            integer = integer or paths
    return _Networks(calls, counts, integer)


def _half(size: int) -> int:
    """About half, so that a well-aligned number stays."""
    step = 8 if size >= 16 else 1
    return size - max(size // 2 // step * step, 1)


def _whole(small: CompactModel, runtime: str, precision: str, inputs: Sequence[Any], *, threads: int, path: Path) -> tuple[Call, list[str]]:
    """A compact model as a function to time, and the layers that integer kernels run."""
    if runtime == "eager":
        args, kwargs = torch.utils._pytree.tree_unflatten(list(inputs), small.input_spec)

        def call() -> object:
            with torch.inference_mode():
                return small(*args, **kwargs)

        return call, []
    from geta.export.onnx import export_onnx

    report = export_onnx(small, path, integers=precision == "integers", uint8_weights=not has_dot_products())
    run = runner(path, threads)
    return lambda: run(inputs), report.integer


def _layer_call(shape: LayerShape, kernel: str, values: tuple[int, ...], runtime: str, threads: int) -> Call:
    """One layer of these sizes as a function to time."""
    return eager_call(shape, values) if runtime == "eager" else onnx_call(shape, values, integers=kernel == "integers", threads=threads)


def _points(layers: Sequence[Layer], integer: Sequence[str]) -> dict[str, tuple[LayerShape, str, tuple[int, ...]]]:
    """Name -> (layer shape, kernel, values of its variables) of everything to time."""
    kernels = frozenset(integer)
    found: dict[str, tuple[LayerShape, str, tuple[int, ...]]] = {}
    for layer in layers:
        kernel = "integers" if layer.path in kernels and _has_integers(layer.shape) else "floats"
        for values in itertools.product(*_axes(layer.shape)):
            found[f"{kernel} {layer.shape.key} at {values}"] = (layer.shape, kernel, values)
    return found


def _has_integers(shape: LayerShape) -> bool:
    return shape.op.startswith("conv") or shape.op == "linear"


def _axes(shape: LayerShape) -> list[tuple[int, ...]]:
    return [_axis(shape, place, extent) for place, extent in enumerate(shape.extents)]


def _axis(shape: LayerShape, place: int, extent: int) -> tuple[int, ...]:
    """Values of one variable to time: well-aligned ones where it counts channels."""
    if extent <= _FEW:
        return tuple(range(1, extent + 1)) if len(shape.extents) < 3 else tuple(sorted({1, extent}))
    single = min(factor for _, _, dims in shape.tensors for factor, variable in dims if variable == place) == 1
    step = next((step for step in _STEPS if single and extent % step == 0 and extent > step), 1)
    shares = _FRACTIONS[len(shape.extents)]
    return tuple(sorted({min(extent, max(step, round(share * extent / step) * step)) for share in shares}))


def _grids(points: Mapping[str, tuple[LayerShape, str, tuple[int, ...]]], times: Mapping[str, float]) -> tuple[LatencyGrid, ...]:
    tables: dict[tuple[LayerShape, str], np.ndarray] = {}
    for name, (shape, kernel, values) in points.items():
        axes = _axes(shape)
        table = tables.setdefault((shape, kernel), np.zeros([len(axis) for axis in axes]))
        table[tuple(axis.index(value) for axis, value in zip(axes, values, strict=True))] = times[name]
    return tuple(LatencyGrid.of(shape, kernel, _axes(shape), table) for (shape, kernel), table in tables.items())


def _fitted(graph: DependencyGraph, table: LatencyTable, removed: Mapping[str, list[int]], measured: Mapping[str, float]) -> LatencyTable:
    """The table with factor, time per number written and constant, none negative, such that the whole networks come out as measured."""
    costs = cost_model(graph, table)
    assert costs.latency is not None
    sizes = [(costs.base - costs.slope @ np.array(removed[name], dtype=np.int64)).astype(np.float64) for name in measured]
    parts = [costs.latency.parts(one[:, None]) for one in sizes]
    most = max(1.0, float(parts[0][1][0]))
    wanted = np.array(list(measured.values()))
    rows = np.array([[float(layers[0]), float(written[0]) / most, 1.0] for layers, written in parts]) / wanted[:, None]
    trust = np.diag([_TRUST, _TRUST / 100, _TRUST / 100])
    factors, _ = nnls(np.vstack([rows, trust]), np.concatenate([np.ones(len(wanted)), [_TRUST, 0.0, 0.0]]))
    table = replace(table, scale=float(factors[0]), per_element_ms=float(factors[1]) / most, fixed_ms=float(factors[2]))
    predicted = [float(replace(costs.latency, table=table).milliseconds(one[:, None])[0]) for one in sizes]
    networks = {name: {"measured": measured[name], "predicted": ms} for name, ms in zip(measured, predicted, strict=True)}
    return replace(table, networks=networks)


@contextmanager
def _final_widths(model: nn.Module) -> Iterator[None]:
    """Quantizers begin with more bits than they will end with; measured is what they end with at most."""
    before = [(quantizer, quantizer.d.detach().clone()) for quantizer in quantizers(model).values()]
    try:
        with torch.no_grad():
            for quantizer, _ in before:
                quantizer.d.copy_(step_size(quantizer.bits.upper, quantizer.q_m, quantizer.t, quantizer.signed))
        yield
    finally:
        with torch.no_grad():
            for quantizer, d in before:
                quantizer.d.copy_(d)


def _machine(runtime: str) -> dict[str, str]:
    facts = {"machine": platform.machine(), "system": platform.system(), "cpus": str(os.cpu_count()), "torch": torch.__version__}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    facts["processor"] = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    facts["dot products"] = str(has_dot_products())
    if runtime == "onnx":
        import onnxruntime

        facts["onnxruntime"] = onnxruntime.__version__
    return facts


def _empty_call(runtime: str, threads: int) -> Call:
    """Takes the time that a call takes."""
    return empty_call(threads) if runtime == "onnx" else _nothing


def _nothing() -> None:
    """A call of nothing."""
