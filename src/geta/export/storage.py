"""Save and load compact models: three files in a folder, written at once or not at all, and no pickle.

    manifest.json      format version, sizes and SHA-256 of the other two files, and of itself
    model.json.gz      graphs, names and shapes of the tensors, bit widths, what was kept
    model.safetensors  the tensors by name, small ones together; integer weights packed to their bit width, as uint8

Saving the same model gives the same bytes, so save -> load -> save is the identity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from geta.errors import CheckpointError
from geta.export.bundles import Layout, bundled, unbundled
from geta.export.files import read_folder, write_folder
from geta.export.graph_json import check_tensor_name, graph_from_json, graph_to_json
from geta.export.pack import pack_bits, pack_signs, packed_bytes, unpack_bits, unpack_signs
from geta.export.records import DTYPES, SIGN_BITS, TensorRecord, info_from_json, info_to_json
from geta.subnet.model import CompactModel
from geta.subnet.program import Program
from geta.subnet.structure import rebuild

_LARGEST_HEADER = 1 << 26  # bytes of safetensors' own header
_MODES = (["eval"], ["eval", "train"])


def save(model: CompactModel, path: str | Path) -> None:
    """Write a compact model into the folder `path`, replacing a model that was saved there before.

    A quantized weight of b bits takes `ceil(numel * b / 8)` bytes plus its scale (widths outside 1 .. 16 bits are stored
    unpacked); all other tensors are stored in their own dtype.
    Raises ConfigError when the folder can't be written or holds other files, CheckpointError when the model holds
    something that could not be loaded again. Either way nothing on disk has changed.
    """
    if not isinstance(model, CompactModel):
        raise CheckpointError(f"only compact models are saved, got {type(model).__name__}: make one with geta.compact(model, graph)")
    tensors = model.tensors()
    widths = _code_widths(model.programs)
    records = {name: TensorRecord.of(tensor, widths.get(name)) for name, tensor in tensors.items()}
    missing = [name for program in model.programs.values() for name in program.tensor_names() if name not in tensors]
    if missing:
        raise CheckpointError(f"the model's graph reads '{missing[0]}', which the model doesn't have")
    programs = {mode: _program_to_json(model.programs[mode]) for mode in sorted(model.programs)}
    content = {
        "programs": programs,
        "tensors": {name: record.to_json() for name, record in records.items()},
        "info": info_to_json(model.info),
    }
    try:
        document = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the model's info can't be written as JSON: {error}") from error
    stored = {name: _stored(name, tensor, records[name]) for name, tensor in tensors.items()}
    write_folder(path, document, safetensors.torch.save(bundled(stored)))


def load(path: str | Path, *, custom_ops: Sequence[str] = ()) -> CompactModel:
    """Read a compact model from the folder that `save` wrote, on the CPU and in evaluation mode.

    custom_ops: the operators of other libraries that the model may call, such as ["mylib::op"]; import what registers them first.
    Nothing is built before everything is checked, and no code of the file is run: only operators that `geta.export.graph_json`
    knows. Raises CheckpointError when the folder is incomplete, altered or of another version.
    """
    document, blob = read_folder(path)
    content = _parsed(document)
    records = {check_tensor_name(name): TensorRecord.from_json(name, record) for name, record in content["tensors"].items()}
    info = info_from_json(content["info"])
    programs = {mode: _program_from_json(program, records, custom_ops) for mode, program in content["programs"].items()}
    stored = unbundled(_parsed_tensors(blob), {name: _layout(record) for name, record in records.items()})
    tensors = {name: _restored(name, stored[name], record) for name, record in records.items()}
    try:
        return CompactModel(programs, tensors, info)
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError, SyntaxError) as error:
        raise CheckpointError(f"the saved model can't be built from its parts: {error}; the file is damaged") from error


def _code_widths(programs: Mapping[str, Program]) -> dict[str, int]:
    """Bits of the integer tensors that the programs dequantize."""
    widths: dict[str, int] = {}
    for program in programs.values():
        for node in program.graph.nodes:
            if node.target is torch.ops.geta.dequantize.default and node.args[0].op == "get_attr":
                name = str(node.args[0].target)
                widths[name] = max(widths.get(name, 0), int(node.args[2]))
    return widths


def _stored(name: str, tensor: Tensor, record: TensorRecord) -> Tensor:
    if tensor.is_meta:
        raise CheckpointError(f"tensor '{name}' has no values (it is on the meta device): load weights before saving")
    if record.dtype not in DTYPES or tensor.layout != torch.strided:
        raise CheckpointError(f"tensor '{name}' is {tensor.dtype}, {tensor.layout}; only dense {', '.join(DTYPES)} tensors can be saved")
    if record.bits == SIGN_BITS:
        return pack_signs(tensor)
    if record.bits is not None and record.signed is not None:
        return pack_bits(tensor, record.bits, record.signed)
    # A clone: safetensors refuses tensors that share memory.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _layout(record: TensorRecord) -> Layout:
    """Dtype and shape of a tensor in the file."""
    bits = 1 if record.bits == SIGN_BITS else record.bits
    if bits is None or record.signed is None:
        return DTYPES[record.dtype], record.shape
    return torch.uint8, (packed_bytes(math.prod(record.shape), bits),)


def _restored(name: str, stored: Tensor, record: TensorRecord) -> Tensor:
    dtype = DTYPES[record.dtype]
    if record.bits == SIGN_BITS:
        return unpack_signs(stored, record.shape, dtype)
    if record.bits is not None and record.signed is not None:
        if stored.shape != (packed_bytes(math.prod(record.shape), record.bits),):
            raise CheckpointError(f"the packed integers of '{name}' have the wrong size: the file is damaged")
        return unpack_bits(stored, record.bits, record.signed, record.shape, dtype)
    if stored.dtype != dtype or tuple(stored.shape) != record.shape:
        raise CheckpointError(
            f"tensor '{name}' is {stored.dtype} {list(stored.shape)}, not as the saved model describes it: the file is damaged"
        )
    if record.trainable is None:
        return stored
    if record.trainable and not dtype.is_floating_point:
        raise CheckpointError(f"tensor '{name}' is {dtype} and trainable, which can't be: the file is damaged")
    return nn.Parameter(stored, requires_grad=record.trainable)


def _program_to_json(program: Program) -> dict[str, Any]:
    return {"inputs": program.in_spec, "outputs": program.out_spec, **graph_to_json(program.graph)}


def _program_from_json(data: Any, records: Mapping[str, TensorRecord], custom_ops: Sequence[str]) -> Program:
    if not isinstance(data, dict) or list(data) != ["inputs", "outputs", "nodes"]:
        raise CheckpointError("a saved program is not one: the file is damaged")
    inputs, outputs = data["inputs"], data["outputs"]
    if not isinstance(inputs, str) or not isinstance(outputs, str):
        raise CheckpointError("a saved program doesn't describe its inputs and outputs: the file is damaged")
    rebuild(outputs)
    graph = graph_from_json({"nodes": data["nodes"]}, custom_ops)
    program = Program(graph, inputs, outputs)
    if len(graph.find_nodes(op="placeholder")) != rebuild(inputs).num_leaves:
        raise CheckpointError("a saved program doesn't take the inputs that it describes: the file is damaged")
    missing = [name for name in program.tensor_names() if name not in records]
    if missing:
        raise CheckpointError(f"a saved program reads the tensor '{missing[0]}', which was not saved: the file is damaged")
    return program


def _parsed(document: bytes) -> dict[str, Any]:
    damaged = CheckpointError("the description of the saved model makes no sense: the file is damaged")
    try:
        content = json.loads(document, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(content, dict) or list(content) != ["programs", "tensors", "info"]:
        raise damaged
    programs, tensors = content["programs"], content["tensors"]
    if not isinstance(programs, dict) or list(programs) not in _MODES or not isinstance(tensors, dict):
        raise damaged
    return content


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def _parsed_tensors(blob: bytes) -> dict[str, Tensor]:
    header = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or header > min(len(blob) - 8, _LARGEST_HEADER):
        raise CheckpointError(f"the header of the saved tensors claims {header} bytes, which can't be: the file is damaged")
    try:
        return safetensors.torch.load(blob)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the saved tensors can't be read: {error}; the file is damaged") from error
