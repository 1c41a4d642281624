"""A dense and a compact network in every runtime that is installed here, ready to be timed side by side."""

from __future__ import annotations

import functools
import importlib.util
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from geta.errors import ConfigError
from geta.export.modules import example_inputs, first_cause
from geta.export.parity import runner
from geta.report.latency import Latency, interleaved
from geta.subnet.model import CompactModel

RUNTIMES = ("eager", "compile", "onnx", "openvino")
"""PyTorch as it is, `torch.compile`, ONNX Runtime, OpenVINO."""

_SETTLE = 0.002
"""Seconds that a candidate has to itself before each timed call, if a call is shorter."""

_Build = Callable[["_Network"], Callable[[Sequence[Any]], object]]


@dataclass(frozen=True)
class Measured:
    """latency: batch size -> name of a candidate, such as "compact, ONNX Runtime, integers" -> its times. missing: candidate -> why not."""

    latency: dict[int, dict[str, Latency]]
    missing: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data for result files."""
        times = {str(batch): {name: one.to_json() for name, one in found.items()} for batch, found in self.latency.items()}
        return {"latency_ms": times, "missing": self.missing}


@dataclass(frozen=True)
class _Network:
    """A module that takes flattened inputs, and where its files may lie."""

    name: str
    module: nn.Module
    compact: CompactModel | None
    inputs: Sequence[Any]
    folder: Path
    threads: int


def measure(
    compact: CompactModel,
    dense: nn.Module | None = None,
    *,
    folder: Path,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    batches: Sequence[int] = (1, 8),
    threads: int = 1,
    rounds: int = 30,
    runtimes: Sequence[str] = RUNTIMES,
    others: Mapping[str, CompactModel] | None = None,
) -> Measured:
    """Time a compact network, and the dense one it came from if it is given, in turn within every round.

    args, kwargs: the dense model's example inputs; None = random ones of the sizes that the compact model was captured with.
    batches:      batch sizes; inputs are repeated along their first dimension. threads: of every runtime.
    folder:       where the exported files go. rounds: timed ones, after three others; calls of under 2 ms are repeated before.
    others:       further compact networks that take the same inputs, by name, such as one that nothing was removed from.
    Raises ConfigError for an unknown runtime or impossible numbers.
    """
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown or min((*batches, threads, rounds, 1)) < 1 or not batches:
        raise ConfigError(
            f"unknown runtime '{unknown[0]}'; known are {', '.join(RUNTIMES)}" if unknown else "batches, threads and rounds start at 1"
        )
    given = compact.flattened(args, kwargs or {}) if args or kwargs else example_inputs(compact.programs["eval"].graph)
    made = {"compact": compact, **(others or {})}
    networks = {name: _Network(name, _Flat(one.eval(), one), one, given, folder, threads) for name, one in made.items()}
    if dense is not None:
        networks["dense"] = _Network("dense", _Flat(dense.eval(), compact), None, given, folder, threads)
    calls: dict[str, Callable[[Sequence[Any]], object]] = {}
    missing: dict[str, str] = {}
    with torch_threads(threads):
        for side, network in networks.items():
            for words, build in _candidates(network.compact, runtimes).items():
                name = f"{side}, {words}"
                try:
                    calls[name] = build(network)
                    calls[name](at_batch(given, batches[0]))
                except Exception as error:  # noqa: BLE001 - whatever a runtime raises: the others are measured, and this one is named
                    calls.pop(name, None)
                    missing[name] = first_cause(error)
        found = {}
        for batch in batches:
            inputs = at_batch(given, batch)
            turns: dict[str, Callable[[], object]] = {name: functools.partial(call, inputs) for name, call in calls.items()}
            found[batch] = interleaved(turns, rounds, settle=_SETTLE)
    return Measured(found, missing)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """PyTorch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Flat(nn.Module):
    """A model as a function of flattened inputs, with a tuple of tensors as its result."""

    def __init__(self, model: nn.Module, compact: CompactModel) -> None:
        super().__init__()
        self.model = model
        self.spec = compact.input_spec

    def forward(self, *leaves: Any) -> tuple[Tensor, ...]:
        """Put the inputs together and take the results apart."""
        args, kwargs = pytree.tree_unflatten([*leaves], self.spec)
        results = pytree.tree_leaves(self.model(*args, **kwargs))
        return tuple(result for result in results if isinstance(result, Tensor))


def has_dot_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies and adds 8-bit numbers in one instruction without overflow, as far as its own description says."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    return cpuinfo.is_file() and any(flag in cpuinfo.read_text() for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


def at_batch(leaves: Sequence[Any], size: int) -> list[Any]:
    """The inputs with every tensor's rows repeated or cut to `size` of them."""

    def rows(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        return torch.cat([leaf] * -(-size // leaf.shape[0]))[:size].contiguous()

    return [rows(leaf) for leaf in leaves]


def _candidates(compact: CompactModel | None, runtimes: Sequence[str]) -> dict[str, _Build]:
    """compact: the network to run, None = the dense one. Integers are timed where there are some."""
    builds: dict[str, tuple[str, _Build]] = {"PyTorch": ("eager", _eager), "torch.compile": ("compile", _compiled)}
    quantized = compact is not None and bool(compact.bits)
    if quantized:
        builds["ONNX Runtime, integers"] = ("onnx", lambda network: _onnx(network, integers=True))
        builds["OpenVINO, integers"] = ("openvino", lambda network: _openvino(network, integers=True))
    else:
        builds["OpenVINO, floats"] = ("openvino", lambda network: _openvino(network, integers=False))
    builds["ONNX Runtime, floats"] = ("onnx", lambda network: _onnx(network, integers=False))
    here = importlib.util.find_spec("openvino") is not None
    return {words: build for words, (runtime, build) in builds.items() if runtime in runtimes and (runtime != "openvino" or here)}


def _eager(network: _Network) -> Callable[[Sequence[Any]], object]:
    module = network.module

    def call(leaves: Sequence[Any]) -> object:
        with torch.inference_mode():
            return module(*leaves)

    return call


def _compiled(network: _Network) -> Callable[[Sequence[Any]], object]:
    module = torch.compile(network.module)

    def call(leaves: Sequence[Any]) -> object:
        with torch.no_grad():
            return module(*leaves)

    return call


def _file(network: _Network, *, integers: bool) -> Path:
    """The network as an ONNX file, with the batch size open."""
    from geta.export.onnx import export_onnx, exported

    if network.compact is not None:
        path = network.folder / f"{network.name}-{'integers' if integers else 'floats'}.onnx"
        return export_onnx(network.compact, path, integers=integers, uint8_weights=not has_dot_products()).path
    path = network.folder / "dense.onnx"
    names = [f"input_{place}" for place in range(len(network.inputs))]
    program, _ = exported(network.module, network.inputs, names, None, "batch")
    program.save(path)
    return path


def _onnx(network: _Network, *, integers: bool) -> Callable[[Sequence[Any]], object]:
    return runner(_file(network, integers=integers), network.threads)


def _openvino(network: _Network, *, integers: bool) -> Callable[[Sequence[Any]], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import openvino

    model = openvino.Core().compile_model(str(_file(network, integers=integers)), "CPU", {"INFERENCE_NUM_THREADS": network.threads})
    return lambda leaves: model([leaf.numpy() for leaf in leaves if isinstance(leaf, Tensor)])
