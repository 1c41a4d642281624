"""The last steps before an ONNX program becomes a file: nothing in it about how it was made, and weights of up to 4 bits in half a byte."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geta.errors import ConfigError

_LARGEST_FILE = 1 << 31  # a protocol buffer holds less than 2 GiB; above that tensors go into a second file


def simplify(program: Any) -> None:
    """Compute constants, and remove what does nothing.

    The exporter's own `optimize` also merges equal initializers, which here are weights and scales of their own, and joins clips, which
    gives invalid files where two of them follow one ReLU.
    """
    import onnxscript.optimizer
    from onnx_ir.passes import Sequential, common

    onnxscript.optimizer.fold_constants(program.model)
    Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    )(program.model)


def strip(program: Any) -> None:
    """Remove stack traces and the like: they are longer than a small network, and name the author's folders."""
    for function in (program.model, program.model.graph):
        function.metadata_props.clear()
    for node in program.model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in program.model.graph.initializers.values():
        value.metadata_props.clear()


def pack_int4(program: Any, names: Iterable[str]) -> None:
    """Store int8 and uint8 initializers whose values fit as INT4 and UINT4, behind a Cast that runtimes do once, at loading."""
    import ml_dtypes
    import onnx_ir as ir

    graph = program.model.graph
    for name in names:
        value = graph.initializers[name]
        codes = value.const_value.numpy()
        narrow = (ir.DataType.INT4, ml_dtypes.int4) if codes.dtype == np.int8 else (ir.DataType.UINT4, ml_dtypes.uint4)
        users = [*value.uses()]
        cast = ir.node("Cast", [value], attributes={"to": value.dtype})
        cast.outputs[0].name = f"{name}_bytes"
        cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, value.dtype
        for user, place in users:
            user.replace_input_with(place, cast.outputs[0])
        value.const_value = ir.Tensor(codes.astype(narrow[1]), dtype=narrow[0], name=name)
        value.dtype = narrow[0]
        graph.insert_before(graph[0], cast)


def multiply_out(program: Any, names: Iterable[str], columns: Mapping[str, np.ndarray]) -> None:
    """Write `codes * scale` where a DequantizeLinear would stay at run time: runtimes compute constants once, when they load the file.

    They would dequantize such a weight in every run, and ONNX Runtime would round the floating-point numbers that it is multiplied with.
    What nothing reads any more is removed.
    columns: name -> which of the scales along the axis belongs to each entry, where they are neither one for each nor one for all.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    graph = program.model.graph
    for name in names:
        for user, _ in [*graph.initializers[name].uses()]:
            codes, scale, *_ = user.inputs
            axis = user.attributes["axis"].as_int() if "axis" in user.attributes else 0
            numbers = scale.const_value.numpy()
            before: list[Any] = []
            if name in columns:
                scale, before = _picked(graph, name, scale, columns[name], axis)
            elif numbers.ndim:
                shape = [1] * len(codes.shape)
                shape[axis] = -1
                scale = ir.Value(name=f"{name}_scales", const_value=ir.tensor(numbers.reshape(shape), name=f"{name}_scales"))
                graph.initializers[scale.name] = scale
            cast = ir.node("Cast", [codes], attributes={"to": ir.DataType.FLOAT})
            cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = f"{name}_floats", ir.DataType.FLOAT, codes.shape
            product = ir.node("Mul", [cast.outputs[0], scale])
            product.outputs[0].name, product.outputs[0].dtype = f"{name}_values", ir.DataType.FLOAT
            product.outputs[0].shape = codes.shape
            graph.insert_before(user, [*before, cast, product])
            for reader, place in [*user.outputs[0].uses()]:
                reader.replace_input_with(place, product.outputs[0])
            graph.remove(user, safe=True)
    common.RemoveUnusedNodesPass()(program.model)  # scales and zero points of what was a DequantizeLinear


def _picked(graph: Any, name: str, scale: Any, columns: np.ndarray, axis: int) -> tuple[Any, list[Any]]:
    """Scales of the entries' own number along the axis, and the node that makes them."""
    import onnx_ir as ir

    index = ir.Value(name=f"{name}_columns", const_value=ir.tensor(columns.astype(np.int32), name=f"{name}_columns"))
    graph.initializers[index.name] = index
    gather = ir.node("Gather", [scale, index], attributes={"axis": axis})
    gather.outputs[0].name, gather.outputs[0].dtype = f"{name}_scales", ir.DataType.FLOAT
    return gather.outputs[0], [gather]


def write(program: Any, target: Path) -> int:
    """Into a folder beside the target, then renamed; returns the bytes written. Raises ConfigError when that fails."""
    tensors = sum(value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value is not None)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            made = Path(folder) / target.name
            program.save(made, external_data=tensors >= _LARGEST_FILE)
            files = sorted(Path(folder).iterdir(), key=lambda file: file == made)  # the model last: it names the others
            size = sum(file.stat().st_size for file in files)
            for file in files:
                os.replace(file, target.parent / file.name)
    except OSError as error:
        raise ConfigError(f"'{target}' can't be written: {error}") from error
    return size
