"""A compact model's tensors in the `compressed-tensors` layout `pack-quantized`, which inference servers of language models read.

For every linear layer with integer weights of b bits, codes [O, I]:

    <path>.weight_packed  int32 [O, ceil(I b / 32)]: each row's codes + 2^(b-1), b bits each, lowest bits first, without gaps
    <path>.weight_scale   [O, 1], one per output channel (a scale per tensor is repeated); [O, I / g] with a scale per g columns
    <path>.weight_shape   int64 [2] = O, I
    <path>.input_scale, .input_zero_point   [1], where the layer's input is quantized in a way that the format can say

Groups of columns all have g columns: the format's index of columns, `weight_g_idx`, is no longer read by its package. Blocks that became
uneven are groups of a smaller size where there is one that all of them are multiples of, and floating-point values otherwise.

All other tensors keep their name and values. `weight_packed` times `weight_scale` is bitwise the compact model's weight.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from geta.errors import BadModelError, ConfigError
from geta.export.between import ACTIVATIONS, arguments
from geta.export.cleanup import Network, copied
from geta.export.linears import Input, Linear, input_of, integer_linears, quantizer_name
from geta.export.onnx_quant import BYTE, even_groups, weight_of
from geta.export.pack import pack_bits
from geta.quant.blocks import SHORTEST

if TYPE_CHECKING:
    from geta.subnet.model import CompactModel

TENSORS, CONFIG = "model.safetensors", "config.json"
FORMAT = "pack-quantized"
_WORD = 32
_aten = torch.ops.aten


@dataclass(frozen=True)
class CompressedTensorsReport:
    """What was written.

    packed:   {module path of a linear layer: bits of its weights in the file}.
    floating: {tensor name: why this integer weight is in the file as floating-point values}.
    inputs:   {module path: bits of its quantized input, as the configuration says}.
    lost:     {quantizer name: why this quantizer of activations is not in the file, so that readers compute without it}.
    notes:    where readers may compute something else, in words.
    bytes:    size of the tensor file.
    groups:   {module path: how many columns share a scale}, for packed layers with several per row.
    """

    packed: dict[str, int]
    floating: dict[str, str]
    inputs: dict[str, int]
    lost: dict[str, str]
    notes: list[str]
    bytes: int
    groups: dict[str, int] = field(default_factory=dict)


@dataclass
class PackedFile:
    """What goes into the folder, as it is put together; the fields of `CompressedTensorsReport`, and `config`: `quantization_config`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    packed: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    floating: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    def rename(self, name: Callable[[str], str | None]) -> None:
        """Call tensors, layers and quantizers as `name` says, in place; what it calls None must not be there."""

        def new(old: str) -> str:
            found = name(old)
            assert found is not None, old
            return found

        def keys(table: dict[str, Any]) -> dict[str, Any]:
            return {new(key): value for key, value in table.items()}

        def words(text: str) -> str:
            return re.sub(r"'([\w.]+)'", lambda quoted: f"'{name(quoted[1]) or quoted[1]}'", text)

        self.tensors, self.packed, self.groups, self.inputs = keys(self.tensors), keys(self.packed), keys(self.groups), keys(self.inputs)
        self.floating, self.lost = ({key: words(why) for key, why in keys(table).items()} for table in (self.floating, self.lost))
        self.notes = [words(note) for note in self.notes]
        self.config["ignore"] = [new(path) for path in self.config["ignore"]]
        for group in self.config["config_groups"].values():
            group["targets"] = [new(path) for path in group["targets"]]

    @property
    def input_bits(self) -> dict[str, int]:
        """Bits of every quantized input that the configuration says."""
        return {path: int(words["num_bits"]) for path, words in self.inputs.items()}


@torch.no_grad()
def save_compressed_tensors(model: CompactModel, folder: str | Path, *, widths: Sequence[int] = (4, 8)) -> CompressedTensorsReport:
    """Write `model.safetensors` and `config.json` into `folder`; each is written whole or not at all.

    widths: bits that packed weights may have, from 2 to 8; a weight of another width takes the next wider one, with the same codes and
        scale. The usual kernels read 4 and 8. Widths of 3, 5, 6 and 7 are read rightly by the package compressed-tensors from 0.18 on;
        before, it left gaps between such numbers.
    A `config.json` that is there already (of `model.config.save_pretrained(folder)`, say) keeps its entries and gets
    `quantization_config`.

    Raises ConfigError when the folder can't be written, its config.json is no JSON object or widths are impossible; BadModelError when no
    linear layer has integer weights or a weight's quantizer is not yet integers.
    """
    chosen = checked_widths(widths)
    target = Path(folder)
    settings = _settings_in(target)
    file = packed_file(model, chosen)
    if not file.packed:
        raise BadModelError(
            "no linear layer of this model has integer weights that can be packed, so there is nothing to write: "
            + ("; ".join(f"'{name}': {reason}" for name, reason in file.floating.items()) or "quantize the model before geta.compact")
        )
    settings["quantization_config"] = file.config
    size = _write(target, file.tensors, settings)
    return CompressedTensorsReport(file.packed, file.floating, file.input_bits, file.lost, file.notes, size, file.groups)


@torch.no_grad()
def packed_file(model: CompactModel, widths: Sequence[int], *, no_inputs: str = "", alike: bool = False) -> PackedFile:
    """The tensors and the `quantization_config` that `save_compressed_tensors` writes, and what it reports; `packed` may be empty.

    widths: as `checked_widths` returns them. no_inputs: why quantizers of inputs are left out as well; "" = they are not.
    alike:  where any layer has groups of columns, all get groups of one size, for readers that know one only; scales are repeated, and
            layers that don't fit are floating-point values.
    Raises BadModelError when a weight's quantizer is not yet integers.
    """
    file = PackedFile()
    networks = [copied(model.programs[mode].graph, model.tensors()) for mode in sorted(model.programs)]
    linears = _add_weights(file, networks, widths)
    if alike and file.groups:
        size = _common_size({path: (linear, file.groups.get(path)) for path, linear in linears.items()})
        file = PackedFile()
        linears = _add_weights(file, networks, widths, size)
    _add_inputs(file, networks[0], {} if no_inputs else linears, no_inputs or "it is not the input of a packed linear layer")
    _add_others(file, networks, model.tensors())
    file.config = _quantization_config(file, networks[0])
    return file


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [O, I] of `bits` bits as int32 [O, ceil(I bits / 32)].

    Code i of a row, plus 2^(bits-1), takes bits i * bits and following of the row; a row's last word ends in zeros.
    """
    rows, columns = codes.shape
    line = torch.zeros(rows, -(-columns // _WORD) * _WORD, dtype=torch.int16)
    line[:, :columns] = codes.cpu().to(torch.int16) + (1 << (bits - 1))
    words = pack_bits(line, bits, signed=False).view(torch.int32).reshape(rows, -1)
    return words[:, : -(-columns * bits // _WORD)].contiguous()


def _add_weights(file: PackedFile, networks: Sequence[Network], widths: Sequence[int], size: int | None = None) -> dict[str, Linear]:
    """Put in all integer weights; returns the packed layers. size: how many columns each scale is for; None = as each layer has it."""
    packed: dict[str, Linear] = {}
    for network in networks:
        _refuse_unfinished(network)
        linears, others = integer_linears(network)
        for path, linear in linears.items():
            name = linear.weight.name.removesuffix("_codes")
            width = next((bits for bits in widths if bits >= linear.width), None)
            if name in others or name in file.floating or path in packed:
                continue
            scale = _scale(linear, size)
            if not path or width is None or isinstance(scale, str):
                bits = f"it has {linear.width} bits and widths are {list(widths)}"
                none = "the model itself is the layer: it has no path"
                file.floating[name] = none if not path else scale if isinstance(scale, str) else bits
                continue
            packed[path], file.packed[path] = linear, width
            file.tensors[f"{path}.weight_packed"] = pack_rows(linear.weight.codes, width)
            file.tensors[f"{path}.weight_scale"] = scale
            if linear.weight.blocks or size is not None:
                file.groups[path] = linear.weight.codes.shape[1] // scale.shape[1]
            file.tensors[f"{path}.weight_shape"] = torch.tensor(linear.weight.codes.shape)
            if linear.dtype != linear.weight.scale.dtype:
                file.notes.append(
                    f"'{name}' is {linear.dtype} in the model and its scale {linear.weight.scale.dtype} in the file: "
                    f"readers that round the scale to {linear.dtype} get other values"
                )
        done = {linear.weight.name.removesuffix("_codes") for linear in packed.values()}
        for node in network.graph.nodes:
            weight = weight_of(network, node)
            name = "" if weight is None else weight.name.removesuffix("_codes")
            if weight is not None and name not in done and name not in file.tensors:
                cast = next((user for user in node.users if user.target is _aten.to.dtype), None)
                file.tensors[name] = weight.values.to(weight.scale.dtype if cast is None else arguments(cast)["dtype"])
                file.floating.setdefault(name, others.get(name, ""))
    return packed


def _scale(linear: Linear, size: int | None) -> Tensor | str:
    """A layer's scales as the format has them, or why there are none."""
    found = even_groups(linear.weight) if linear.weight.blocks else (linear.row_scale, linear.weight.codes.shape[1])
    if isinstance(found, str):
        return found
    scale, own = found
    if size is None:
        return scale.contiguous()
    if own % size:
        return f"its groups of {own} columns are none of {size}, the size of all other layers, and readers of this model know one size only"
    return scale.repeat_interleave(own // size, 1)


def _common_size(layers: Mapping[str, tuple[Linear, int | None]]) -> int:
    """The number of columns per scale with which most weights can be packed; a row with one scale is one group."""
    sizes = [(linear.weight.codes.numel(), size or int(linear.weight.codes.shape[1])) for linear, size in layers.values()]
    least = math.gcd(*(size for _, size in sizes))
    fitting = {one: sum(count for count, size in sizes if size % one == 0) for one in {least, *(size for _, size in sizes)}}
    return max((one for one in fitting if one >= SHORTEST), key=lambda one: (fitting[one], one))


def _refuse_unfinished(network: Network) -> None:
    """A quantizer that reads a parameter: its float values are not what the network computes with."""
    for node in network.graph.nodes:
        source = arguments(node)["x"] if node.target in ACTIVATIONS else None
        if isinstance(source, torch.fx.Node) and source.op == "get_attr":
            raise BadModelError(
                f"'{source.target}' is quantized but not stored as integers: make the model with geta.compact(integers=True)"
            )


def _add_inputs(file: PackedFile, network: Network, linears: Mapping[str, Linear], other: str) -> None:
    """Put in the quantizers of packed layers' inputs, and name all other quantizers of activations, for the reason `other`."""
    said: set[str] = set()
    narrow: list[str] = []
    for path, linear in linears.items():
        inputs = [found for found in (input_of(network, call) for call in linear.calls) if found is not None]
        if not inputs:
            continue
        if len(inputs) < len(linear.calls) or len({one.parameters for one in inputs}) > 1:
            file.lost[inputs[0].name] = "not every call of the layer has the same quantizer"
            continue
        words, reason = _input_words(inputs[0])
        if words is None:
            file.lost[inputs[0].name] = reason
            continue
        said.add(inputs[0].name)
        quantizer = inputs[0].quantizer
        assert quantizer is not None
        lowest = -(1 << (quantizer.bits - 1))
        file.inputs[path] = words
        file.tensors[f"{path}.input_scale"] = quantizer.scale.reshape(1)
        if not words["symmetric"]:
            file.tensors[f"{path}.input_zero_point"] = torch.tensor([lowest], dtype=torch.int8)
        elif quantizer.levels[0] > lowest:
            narrow.append(inputs[0].name)
    if narrow:
        file.notes.append(
            f"{len(narrow)} quantizers of inputs (first: '{narrow[0]}') have as many negative as positive integers, the format's have "
            "one more: readers give inputs below the lowest one step less"
        )
    for node in network.graph.nodes:
        if node.target in ACTIVATIONS and quantizer_name(node) not in said:
            file.lost.setdefault(quantizer_name(node), other)


def _input_words(found: Input) -> tuple[dict[str, Any] | None, str]:
    """The format's words for a quantizer of activations, or None and why there are none."""
    quantizer = found.quantizer
    if quantizer is None:
        return None, "its parameters are computed in the graph"
    if quantizer.exponent is not None and bool((quantizer.exponent != 1).any()):
        return None, "it has an exponent (nonlinear=True)"
    if quantizer.scale.dim():
        return None, "it has one scale per channel"
    bits, (lowest, highest) = quantizer.bits, quantizer.levels
    half = 1 << (bits - 1) if bits else 0
    if not 2 <= bits <= BYTE or (lowest, highest) not in ((-half, half - 1), (1 - half, half - 1), (0, 2 * half - 1)):
        return None, f"its integers go from {lowest} to {highest}, which are not those of {bits} bits"
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": lowest < 0,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
    }, ""


def _add_others(file: PackedFile, networks: Sequence[Network], tensors: Mapping[str, Tensor]) -> None:
    """All tensors that belong to no quantizer, as they are."""
    quantizers: set[str] = set()
    for network in networks:
        for node in network.graph.nodes:
            weight = weight_of(network, node)
            if node.target in ACTIVATIONS or weight is not None:
                quantizers.update(str(read.target) for read in node.all_input_nodes if read.op == "get_attr")
    for name, tensor in tensors.items():
        if name not in quantizers:
            file.tensors[name] = tensor


def _quantization_config(file: PackedFile, network: Network) -> dict[str, Any]:
    """Config groups: one per bit width of weights and kind of input, targets are exact module paths."""
    groups: dict[str, dict[str, Any]] = {}
    for path, bits in file.packed.items():
        inputs = file.inputs.get(path)
        size = file.groups.get(path)
        strategy = "channel" if size is None else "group"
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": size, "dynamic": False}
        scheme = {"weights": weights, "input_activations": inputs, "output_activations": None, "format": FORMAT}
        group = groups.setdefault(json.dumps(scheme), {"targets": [], **scheme})
        group["targets"].append(path)
    others = [str(node.meta.get("module_path", "")) for node in network.graph.nodes if node.target is _aten.linear.default]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups.values())},
        "ignore": [path for path in dict.fromkeys(others) if path and path not in file.packed],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def checked_widths(widths: Sequence[int]) -> list[int]:
    """Ascending widths, each once. Raises ConfigError for impossible ones."""
    if not widths or any(type(bits) is not int or not 2 <= bits <= BYTE for bits in widths):
        raise ConfigError(f"widths is {widths!r}: it must name at least one whole number of bits from 2 to {BYTE}, such as (4, 8)")
    return sorted(set(widths))


def _settings_in(folder: Path) -> dict[str, Any]:
    """What the folder's config.json says, without its quantization_config."""
    try:
        settings = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"'{folder / CONFIG}' can't be read: {error.strerror or error}; choose another folder") from error
    except ValueError as error:
        raise ConfigError(f"'{folder / CONFIG}' is no JSON ({error}): correct or remove it") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"'{folder / CONFIG}' holds no JSON object: correct or remove it")
    return settings


def _write(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> int:
    """Returns the bytes of the tensor file. The configuration comes last: what it says fits the tensors, or readers find other shapes."""
    stored = {name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(tensors)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
            made = {name: Path(staging) / name for name in (TENSORS, CONFIG)}
            try:
                safetensors.torch.save_file(stored, made[TENSORS], metadata={"format": "pt"})
            except safetensors.SafetensorError as error:
                raise OSError(errno.EIO, str(error)) from error  # what the system refused, in safetensors' words
            made[CONFIG].write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            size = made[TENSORS].stat().st_size
            for name, path in made.items():
                os.replace(path, folder / name)
    except OSError as error:
        raise ConfigError(f"the tensors can't be written to '{folder}': {error}; choose a writable folder") from error
    return size
