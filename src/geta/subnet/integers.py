"""Replace a fake-quantized parameter by its integers: bitwise the same values, stored as codes and one scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from geta.graph.names import canonical_name
from geta.graph.propagate import bind_arguments
from geta.quant.fixed_ops import effective_scale, lsq_codes
from geta.quant.ops import bit_width, quantize_codes


@dataclass
class Quantized:
    """Bits and signs by tensor name, as found in a graph."""

    bits: dict[str, int] = field(default_factory=dict)
    signed: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """Integers that replace a weight: `codes_name` is cut like tensor `weight`, `scale_name` like tensor `step`, its scale before."""

    weight: str
    step: str
    codes_name: str
    scale_name: str
    codes: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class _Found:
    """One quantizer of a graph. step: the tensor that holds its scale; scale: its values; codes: from an uncut tensor."""

    step: str
    scale: torch.Tensor
    bits: int
    signed: bool
    codes: Callable[[torch.Tensor], torch.Tensor]
    blocks: tuple[int, ...] = ()


def code_dtype(bits: int, signed: bool) -> torch.dtype:
    """The narrowest torch integer type that holds the codes."""
    if bits <= 8:
        return torch.int8 if signed else torch.uint8
    return torch.int16 if bits <= 16 and signed else torch.int32


def whole_bits(width: torch.Tensor) -> int:
    """Bits that hold every code of a tensor, rounded up only by more than float noise."""
    return max(1, int(torch.ceil(width.max() - 1e-4)))


def store_integers(graph: fx.Graph, read: Callable[[str], torch.Tensor], names: Mapping[str, str]) -> tuple[Quantized, list[Stored]]:
    """Swap every quantizer of a parameter, learned or fixed, for `dequantize(codes, scale)`, in place.

    read:  the uncut value of a tensor; codes are computed before cutting, since a power may round differently in another
           memory layout.
    names: the tensor that holds a quantizer's step size or scale -> the quantizer's name.
    """
    stored: dict[str, Stored] = {}
    found = Quantized()
    for node in list(graph.nodes):
        if node.target not in _READERS:
            continue
        bound = bind_arguments(node, lambda arg: arg)
        quantizer = _READERS[node.target](bound, read)
        name = names.get(quantizer.step, quantizer.step)
        found.bits[name], found.signed[name] = quantizer.bits, quantizer.signed
        source = bound["x"]
        if not (isinstance(source, fx.Node) and source.op == "get_attr"):
            continue
        weight = read(str(source.target))
        base = canonical_name(str(source.target))
        codes = quantizer.codes(weight).to(code_dtype(quantizer.bits, quantizer.signed))
        stored[base] = Stored(str(source.target), quantizer.step, f"{base}_codes", f"{base}_scale", codes, quantizer.scale)
        with graph.inserting_before(node):
            reads = [graph.create_node("get_attr", f"{base}_{part}") for part in ("codes", "scale")]
            blocks: dict[str, Any] = {"blocks": [*quantizer.blocks]} if quantizer.blocks else {}
            new = graph.call_function(torch.ops.geta.dequantize.default, (*reads, quantizer.bits), blocks)
            new.meta = dict(node.meta)
            if weight.dtype != quantizer.scale.dtype:  # scales stay float32 in a half-precision model
                new = graph.call_function(torch.ops.aten.to.dtype, (new, weight.dtype))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return found, list(stored.values())


def _learned(bound: Mapping[str, Any], read: Callable[[str], torch.Tensor]) -> _Found:
    step, signed, linear = str(bound["d"].target), bool(bound["signed"]), bool(bound["linear"])
    d, q_m, t = (read(str(bound[name].target)) for name in ("d", "q_m", "t"))
    bits, blocks = whole_bits(bit_width(d, q_m, t, signed)), tuple(bound["blocks"])
    return _Found(step, d, bits, signed, lambda weight: quantize_codes(weight, d, q_m, t, signed, linear=linear, blocks=blocks), blocks)


def _fixed(bound: Mapping[str, Any], read: Callable[[str], torch.Tensor]) -> _Found:
    """The integer model multiplies with the scale inside its domain, which training may have left."""
    step = str(bound["scale"].target)
    scale = read(step)
    levels = (bound["bits"], bound["quant_min"], bound["quant_max"])
    signed, blocks = bound["quant_min"] < 0, tuple(bound["blocks"])
    effective = effective_scale(scale, scale.dtype)
    return _Found(step, effective, bound["bits"], signed, lambda weight: lsq_codes(weight, scale, *levels, blocks=blocks), blocks)


_READERS: dict[Any, Callable[[Mapping[str, Any], Callable[[str], torch.Tensor]], _Found]] = {
    torch.ops.geta.fake_quantize.default: _learned,
    torch.ops.geta.lsq_quantize.default: _fixed,
}


def drop_unused(graph: fx.Graph) -> None:
    """Remove tensors that nobody reads and operators without a use or an effect."""
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
