"""Linear layers over torchao's tensors, which bring their own kernels: the codes and scales that were trained, not quantized again.

    8 bits or fewer   Int8Tensor: int8 codes [O, I], one scale per output channel or group of columns; the product is floating point
    inputs=True       the same with int8 inputs: the product is of integers, y = (codes_x codes_w) s_x s_w; one scale per channel
    int4=True         Int4OpaqueTensor, weights of up to 4 bits packed for the CPU kernel: O a multiple of 16, I of 32; groups of 32, 64
                      or 128 columns

Groups are equally long: blocks of columns that became uneven are groups of a smaller size where all of them are multiples of one.

A quantizer of activations stays in front of its layer. What it lets through are already multiples of its step size, so int8 inputs of the
same step are the same numbers, whatever the quantizer's range or exponent.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from geta.errors import BadModelError, ConfigError
from geta.export.between import arguments
from geta.export.cleanup import copied
from geta.export.linears import input_of, integer_linears
from geta.export.onnx_quant import BYTE, HALF_A_BYTE, Weight, even_groups
from geta.graph.names import canonical_name
from geta.quant.fixed import FixedQuantizer
from geta.quant.fixed_ops import effective_scale
from geta.quant.ops import prepared
from geta.quant.quantizer import Quantizer
from geta.quant.targets import INPUT_QUANTIZER
from geta.subnet.integers import drop_unused
from geta.subnet.model import CompactModel

_GROUPS = (128, 64, 32)  # columns that share a scale in the 4-bit kernel
_ROWS = 16
_TOLERANCE = 1e-4
_HALF = 1 << (BYTE - 1)
_INPUTS = "int8 with int8 inputs"
_aten = torch.ops.aten


@dataclass(frozen=True)
class TorchaoProduct:
    """A network over torchao tensors and what became of its quantized weights.

    model:     runs in evaluation mode, called as before.
    converted: {module path of a linear layer: "int8", "int4" or "int8 with int8 inputs"}.
    floating:  {module path or tensor name: why this quantized weight is no torchao tensor}; it computes what it computed.
    notes:     {module path: why a converted layer has less than what was asked for}.
    """

    model: nn.Module
    converted: dict[str, str]
    floating: dict[str, str]
    notes: dict[str, str]


@dataclass(frozen=True)
class _Codes:
    """One layer's integers.

    codes: int8 [O, I]; scale: [O, 1] or [O, I / group]; group: columns that share a scale; dtype: of its products; step, levels: of its
    input's quantizer, None where there is none.
    """

    codes: Tensor
    scale: Tensor
    group: int
    dtype: torch.dtype
    step: Tensor | None
    levels: tuple[int, int]


@dataclass(frozen=True)
class _Wishes:
    int4: bool
    inputs: bool


@torch.no_grad()
def to_torchao(model: nn.Module, *, int4: bool = False, inputs: bool = False) -> TorchaoProduct:
    """A copy of a quantized network whose linear layers hold torchao tensors.

    model:  `geta.compact`'s eager product (or any model with this library's quantizers), which keeps its own classes; or its graph product.
    int4:   pack weights of up to 4 bits for the CPU's 4-bit kernel where their sizes allow; the rest is int8.
    inputs: multiply integers where a layer's input is quantized to up to 8 bits. On every layer this is checked with the largest inputs
            there can be: some CPUs' kernels overflow, such a layer keeps floating-point products.

    `model` is not changed. Raises ConfigError when torchao is not installed, BadModelError when no linear layer can be converted.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("torchao is not installed: pip install 'geta[torchao]'")
    wishes = _Wishes(int4, inputs)
    product = _from_graph(model, wishes) if isinstance(model, CompactModel) else _from_modules(model, wishes)
    if not product.converted:
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in product.floating.items())
        raise BadModelError(f"no linear layer can be converted: {reasons or 'there is no quantized weight'}")
    return product


class IntegerLinear(nn.Linear):
    """`nn.Linear` whose weight quantizes its input with one scale, given as a matrix of rows."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of its base class
        return rows_linear(input, self.weight, self.bias)


class GraphOverTensors(nn.Module):
    """A compact model's evaluation graph over torchao tensors; called as the compact model."""

    def __init__(self, graph: CompactModel) -> None:
        super().__init__()
        self.graph = graph
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph(*args, **kwargs)


def rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with x [..., I] as rows [N, I]: a scale of torchao's has as many dimensions as what it scales."""
    return F.linear(x.reshape(-1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def _from_graph(model: CompactModel, wishes: _Wishes) -> TorchaoProduct:
    network = copied(model.programs["eval"].graph, model.tensors())
    linears, floating = integer_linears(network)
    converted, notes = {}, {}
    for path, linear in linears.items():
        if not linear.weight.codes.numel():
            floating[path] = "it is empty"
            continue
        scales = _scales(linear.weight)
        if isinstance(scales, str):
            floating[path] = scales
            continue
        inputs = [input_of(network, call) for call in linear.calls]
        step, levels = None, (0, 0)
        first = inputs[0]
        if first is not None and first.quantizer is not None and len({one and one.parameters for one in inputs}) == 1:
            step, levels = first.quantizer.scale, first.quantizer.levels
        codes = _Codes(linear.weight.codes.to(torch.int8), *scales, linear.dtype, step, levels)
        tensor, converted[path], notes[path] = _tensor(codes, wishes)
        name = f"{path}.weight".strip(".")
        network.tensors[name] = nn.Parameter(tensor, requires_grad=False)
        for call in linear.calls:
            bound = arguments(call)
            with network.graph.inserting_before(call):
                read = network.graph.create_node("get_attr", name)
                function = rows_linear if converted[path] == _INPUTS else F.linear
                new = network.graph.call_function(function, (bound["input"], read, bound.get("bias")))
            new.meta = dict(call.meta)
            call.replace_all_uses_with(new)
            network.graph.erase_node(call)
    drop_unused(network.graph)
    used = {str(node.target) for node in network.graph.find_nodes(op="get_attr")}
    tensors = {name: tensor for name, tensor in network.tensors.items() if name in used}
    product = GraphOverTensors(model.rebuilt({"eval": network.graph}, tensors))
    return TorchaoProduct(product, converted, floating, {path: note for path, note in notes.items() if note})


def _from_modules(model: nn.Module, wishes: _Wishes) -> TorchaoProduct:
    product = copy.deepcopy(model).eval()
    owners: dict[int, list[str]] = {}
    for name, parameter in product.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(canonical_name(name))
    converted, floating, notes = {}, {}, {}
    for path, module in list(product.named_modules()):
        parametrized = module.parametrizations if parametrize.is_parametrized(module) else {}
        for leaf, stages in list(parametrized.items()):
            if not any(isinstance(stage, Quantizer | FixedQuantizer) for stage in stages):
                continue
            found = _codes_of(module, leaf, stages, owners)
            if isinstance(found, str):
                floating[path if leaf == "weight" else f"{path}.{leaf}"] = found
                continue
            tensor, converted[path], notes[path] = _tensor(found, wishes)
            del module.parametrizations  # torch's own removal would change the class, which copies of a module share
            module.__class__ = IntegerLinear if converted[path] == _INPUTS else nn.Linear
            module.weight = nn.Parameter(tensor, requires_grad=False)
    return TorchaoProduct(product, converted, floating, {path: note for path, note in notes.items() if note})


def _codes_of(module: nn.Module, leaf: str, stages: parametrize.ParametrizationList, owners: Mapping[int, list[str]]) -> _Codes | str:
    """A linear layer's integers, or why there are none."""
    kind = parametrize.type_before_parametrizations(module)
    if kind is not nn.Linear or leaf != "weight":
        return f"it is the {leaf} of a {kind.__name__}, not the weight of a torch.nn.Linear"
    (quantizer, *others), original = list(stages), stages.original
    parametrized = module.parametrizations
    assert isinstance(original, Tensor)
    assert isinstance(parametrized, nn.ModuleDict)
    if others or not isinstance(quantizer, Quantizer | FixedQuantizer) or len(parametrized) > 1:
        return "it has other parametrizations besides its quantizer"
    if not quantizer.enabled:
        return "its quantizer is switched off"
    shared = owners[id(original)]
    if len(shared) > 1:
        return f"it is shared by {' and '.join(shared)}"
    codes, scale = quantizer.codes(original), _scale(quantizer)
    if not codes.numel():
        return "it is empty"
    if not -_HALF <= int(codes.min()) <= int(codes.max()) < _HALF:
        return f"its codes go from {int(codes.min())} to {int(codes.max())}, more than {BYTE} bits with a sign"
    scales = _scales(Weight(leaf, codes, scale, BYTE, quantizer.blocks))
    if isinstance(scales, str):
        return scales
    source = getattr(module, INPUT_QUANTIZER, None)
    step, levels = (_scale(source), _levels(source)) if source is not None and source.enabled else (None, (0, 0))
    return _Codes(codes.to(torch.int8), *scales, original.dtype, step, levels)


def _scales(weight: Weight) -> tuple[Tensor, int] | str:
    """(scale [O, 1] or [O, I / group], group), or why torchao has no such scales."""
    rows, columns = weight.codes.shape
    if not weight.blocks:
        return weight.scale.reshape(-1, 1).expand(rows, 1).contiguous(), columns
    found = even_groups(weight)
    return found if isinstance(found, str) else (found[0].contiguous(), found[1])


def _scale(quantizer: Quantizer | FixedQuantizer) -> Tensor:
    if isinstance(quantizer, FixedQuantizer):
        return effective_scale(quantizer.scale, quantizer.scale.dtype)
    return prepared(quantizer.d, quantizer.d, quantizer.q_m, quantizer.t, quantizer.linear).d


def _levels(quantizer: Quantizer | FixedQuantizer) -> tuple[int, int]:
    if isinstance(quantizer, FixedQuantizer):
        return quantizer.levels[1:]
    inside = prepared(quantizer.d, quantizer.d, quantizer.q_m, quantizer.t, quantizer.linear)
    highest = int(torch.round(inside.top / inside.d).max())
    return -highest if quantizer.signed else 0, highest


def _tensor(codes: _Codes, wishes: _Wishes) -> tuple[Tensor, str, str]:
    """(torchao tensor, what it is, why it is not what was asked for)."""
    note = ""
    if wishes.int4:
        note = _not_int4(codes)
        if not note:
            return _int4(codes), "int4", ""
    if wishes.inputs:
        reason = _not_integer_inputs(codes)
        if not reason:
            return _int8(codes, with_inputs=True), _INPUTS, note
        note = "; ".join(part for part in (note, reason) if part)
    return _int8(codes, with_inputs=False), "int8", note


def _int8(codes: _Codes, *, with_inputs: bool) -> Tensor:
    int8_tensor, settings, per_tensor, mapping = _int8_parts()
    columns = [1, codes.group]
    if not with_inputs or codes.step is None:
        plain: Tensor = int8_tensor(codes.codes, codes.scale, columns, codes.dtype)
        return plain
    symmetric = codes.levels[1] < _HALF
    point = None if symmetric else torch.full((1, 1), -_HALF, dtype=torch.int8, device=codes.codes.device)
    kind = settings(granularity=per_tensor(), mapping_type=mapping.SYMMETRIC if symmetric else mapping.ASYMMETRIC)
    tensor: Tensor = int8_tensor(
        *(codes.codes, codes.scale, columns, codes.dtype),
        act_quant_kwargs=kind,
        act_quant_scale=codes.step.detach().reshape(1, 1),
        act_quant_zero_point=point,
    )
    return tensor


def _not_int4(codes: _Codes) -> str:
    """Why a weight can't be packed for the 4-bit kernel, or nothing."""
    rows, columns = codes.codes.shape
    half = 1 << (HALF_A_BYTE - 1)
    if not -half <= int(codes.codes.min()) <= int(codes.codes.max()) < half:
        return f"no int4: its weight has more than {HALF_A_BYTE} bits"
    if codes.codes.device.type != "cpu" or codes.dtype != torch.float32:
        return f"no int4: the kernel is used on the CPU and in float32, and the layer is {codes.dtype} on {codes.codes.device.type}"
    if rows % _ROWS or columns % _GROUPS[-1]:
        return f"no int4: {rows} x {columns} is no multiple of {_ROWS} x {_GROUPS[-1]}"
    if codes.group % _GROUPS[-1]:
        return f"no int4: its groups have {codes.group} columns, no multiple of {_GROUPS[-1]}"
    return ""


def _int4(codes: _Codes) -> Tensor:
    """The kernel computes (q - 8) scale + zero, here with q = codes + 8 and zero = 0; its groups repeat scales of wider ones."""
    rows, columns = codes.codes.shape
    group = next(size for size in _GROUPS if codes.group % size == 0)
    packed = _aten._convert_weight_to_int4pack_for_cpu(codes.codes.to(torch.int32) + (1 << (HALF_A_BYTE - 1)), 1)
    scale = codes.scale.repeat_interleave(codes.group // group, 1)
    both = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()
    tensor: Tensor = _int4_class()(packed, both, [1, group], torch.Size((rows, columns)))
    return tensor


def _not_integer_inputs(codes: _Codes) -> str:
    """Why a layer's product can't be one of integers, or nothing."""
    if codes.step is None:
        return "no int8 inputs: its input isn't quantized"
    if codes.group != codes.codes.shape[1]:
        return "no int8 inputs: its weight has one scale per group of columns, and the kernel sums over all of them"
    lowest, highest = codes.levels
    if codes.step.numel() > 1 or codes.dtype != torch.float32 or lowest < -_HALF or highest >= (_HALF if lowest < 0 else 2 * _HALF):
        return f"no int8 inputs: its input has {codes.step.numel()} scales, integers from {lowest} to {highest} and {codes.dtype} values"
    order = codes.codes.abs().sum(1, dtype=torch.int64).argsort(descending=True)[:_ROWS]
    positive = codes.codes[order] > 0
    extremes = torch.cat([torch.where(positive, highest, lowest), torch.where(positive, lowest, highest)]).double()
    inputs = extremes * codes.step.double()
    expected = inputs @ (codes.codes.double() * codes.scale.double()).t()
    found = rows_linear(inputs.to(codes.dtype), _int8(codes, with_inputs=True)).double()
    if float((found - expected).abs().max()) > _TOLERANCE * float(expected.abs().max()):
        return "no int8 inputs: torchao's kernel overflows on this processor with the layer's largest inputs"
    return ""


def _int8_parts() -> tuple[Any, Any, Any, Any]:
    try:
        from torchao.quantization import Int8Tensor, MappingType, PerTensor
        from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs
    except ImportError as error:
        raise ConfigError(f"this torchao has no Int8Tensor ({error}): pip install 'geta[torchao]'") from error
    return Int8Tensor, QuantizeTensorToInt8Kwargs, PerTensor, MappingType


def _int4_class() -> Any:
    try:
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    except ImportError as error:
        raise ConfigError(f"this torchao has no 4-bit tensor for the CPU ({error}): pip install 'geta[torchao]', or int4=False") from error
    return Int4OpaqueTensor
