"""A compact model as an ONNX file with integer weights, written by PyTorch's own exporter.

    report = small.export_onnx("model.onnx")

The graph is cleaned up (`geta.export.cleanup`), its quantizers and integer weights become QuantizeLinear and DequantizeLinear around
ordinary operators (`geta.export.onnx_quant`), and the file needs nothing of this library: any runtime that reads opset 21 runs it.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from geta.errors import BadModelError, ConfigError
from geta.export.cleanup import Network, clean_up, copied
from geta.export.modules import Dynamic, Exportable, check_wishes, example_inputs, flat, named_outputs, with_open_sizes
from geta.export.onnx_file import multiply_out, pack_int4, simplify, strip, write
from geta.export.onnx_lower import Lowered, lower
from geta.export.onnx_quant import EXACT_BLOCKS, OPSET, dequantize_blocks
from geta.export.plain import lower_plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geta.subnet.model import CompactModel

_NEEDED = ("onnx", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class OnnxReport:
    """What was written.

    bytes: size of the file(s). inputs, outputs: their names. dynamic: name -> the dimensions that stayed open.
    folded: module paths of the batch norms that went into the layer before them.
    integer: module paths of the layers that integer kernels can run. floating: module path -> why a layer can't be.
    notes: where runtimes may compute something else, in words.
    """

    path: Path
    bytes: int
    inputs: list[str]
    outputs: list[str]
    dynamic: dict[str, list[int]] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    integer: list[str] = field(default_factory=list)
    floating: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def export_onnx(
    model: CompactModel, path: str | Path, *, integers: bool = True, dynamic: Dynamic = "batch", uint8_weights: bool = True
) -> OnnxReport:
    """Write the evaluation half of a compact model as one ONNX file (opset 21), atomically.

    integers:      weights and quantized activations as integers; otherwise everything in float32, with the same rounding spelled out: the
                   same numbers, for runtimes without integers.
    dynamic:       sizes that stay open: the first dimension of every input, all of them (as far as the model allows), or none.
    uint8_weights: weights of 8 bits as uint8 with zero point 128, which no kernel of an x86 CPU overflows; False: int8, which is faster
                   where there are dot-product instructions (AVX512-VNNI, AVX-VNNI, ARM).
    Raises ConfigError when the packages of `geta[onnx]` are missing or the path can't be written, BadModelError when the model isn't
    float32 or PyTorch's exporter can't write it. Either way nothing on disk has changed.
    """
    target = Path(path)
    _check(model, target, dynamic)
    network = copied(model.programs["eval"].graph, model.tensors())
    folded = clean_up(network)
    lowered = _lowered(network, integers=integers, uint8_weights=uint8_weights)
    shown = named_outputs(model, network)
    size, opened = write_network(network, shown, example_inputs(network.graph), target, dynamic=dynamic)
    inputs = [node.name for node in network.graph.find_nodes(op="placeholder")]
    names, notes = [name for _, name in shown], _notes(network, lowered)
    return OnnxReport(target, size, inputs, names, opened, folded, lowered.integer, lowered.floating, notes)


def _notes(network: Network, lowered: Lowered) -> list[str]:
    notes = []
    if lowered.unsigned:
        notes.append(
            f"{lowered.unsigned} layers have 8-bit weights as uint8, which overflow on no CPU; on those with integer dot products "
            "(AVX512-VNNI, AVX-VNNI, ARM) int8 is up to twice as fast: uint8_weights=False, --int8-weights"
        )
    blocks = sum(node.target is dequantize_blocks for node in network.graph.nodes) - len(network.columns)
    if blocks:
        key, value = EXACT_BLOCKS
        notes.append(
            f"{blocks} weights have one scale per block of columns: ONNX Runtime's kernels for them round what they are multiplied with "
            f"to 8 bits, unless its session option '{key}' is '{value}'"
        )
    return notes


def write_network(
    network: Network, shown: Sequence[tuple[int, str]], leaves: Sequence[Any], target: Path, *, dynamic: Dynamic
) -> tuple[int, dict[str, list[int]]]:
    """Write a lowered graph; returns the bytes and the sizes that stayed open."""
    inputs = [node.name for node in network.graph.find_nodes(op="placeholder")]
    program, opened = exported(Exportable(network, shown), leaves, inputs, [name for _, name in shown], dynamic)
    strip(program)
    columns = {f"run.{flat(name)}": numbers.numpy() for name, numbers in network.columns.items()}
    multiply_out(program, [f"run.{flat(name)}" for name in network.spelled], columns)
    pack_int4(program, [f"run.{flat(name)}" for name in network.narrow])
    return write(program, target), opened


def _check(model: Any, target: Path, dynamic: str) -> None:
    from geta.subnet.model import CompactModel

    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"writing ONNX needs {' and '.join(missing)}: pip install 'geta[onnx]'")
    if not isinstance(model, CompactModel):
        raise BadModelError(f"only compact models are exported, got {type(model).__name__}: make one with geta.compact(model, graph)")
    check_wishes(target, dynamic)
    for name, tensor in model.tensors().items():
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            raise BadModelError(f"ONNX files are written in float32 and '{name}' is {tensor.dtype}: convert the model with .float() first")
        if tensor.is_meta:
            raise BadModelError(f"'{name}' has no values (it is on the meta device): load weights before exporting")


def _lowered(network: Network, *, integers: bool, uint8_weights: bool) -> Lowered:
    if integers:
        return lower(network, uint8_weights=uint8_weights)
    lower_plain(network, packed=False)
    return Lowered()


def exported(
    module: torch.nn.Module, leaves: Sequence[Any], inputs: Sequence[str], outputs: Sequence[str] | None, dynamic: Dynamic
) -> tuple[Any, dict[str, list[int]]]:
    """PyTorch's ONNX program of a module that takes `*leaves`, with as many open sizes as were asked for and can be had.

    outputs: names of the results; None = PyTorch's. Returns the sizes that stayed open too. Raises BadModelError.
    """

    def export(shapes: Any) -> Any:
        with _quiet():
            program = torch.onnx.export(
                module,
                tuple(leaves),
                input_names=list(inputs),
                output_names=None if outputs is None else list(outputs),
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=shapes,
                optimize=False,
                verbose=False,
            )
            simplify(program)
            return program

    program = with_open_sizes("PyTorch's ONNX exporter can't write", leaves, dynamic, export)
    return program, _opened(program, inputs)


def _opened(program: Any, inputs: Sequence[str]) -> dict[str, list[int]]:
    found = {}
    for value, name in zip(program.model.graph.inputs, inputs, strict=False):
        sizes = [] if value.shape is None else list(value.shape)
        dims = [dim for dim, size in enumerate(sizes) if not isinstance(size, int)]
        if dims:
            found[name] = dims
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks to the console about its own affairs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
