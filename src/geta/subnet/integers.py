"""Replace a fake-quantized parameter by its integers: bitwise the same values, stored as codes and one scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from geta.graph.names import canonical_name
from geta.graph.propagate import bind_arguments
from geta.quant.ops import bit_width, quantize_codes


@dataclass
class Quantized:
    """Bits and signs by tensor name, as found in a graph."""

    bits: dict[str, int] = field(default_factory=dict)
    signed: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """Integers that replace a weight: `codes_name` is cut like tensor `weight`, `scale_name` is tensor `step`, cut likewise."""

    weight: str
    step: str
    codes_name: str
    scale_name: str
    codes: torch.Tensor


def code_dtype(bits: int, signed: bool) -> torch.dtype:
    """The narrowest torch integer type that holds the codes."""
    if bits <= 8:
        return torch.int8 if signed else torch.uint8
    return torch.int16 if bits <= 16 and signed else torch.int32


def whole_bits(width: torch.Tensor) -> int:
    """Bits that hold every code of a tensor, rounded up only by more than float noise."""
    return max(1, int(torch.ceil(width.max() - 1e-4)))


def store_integers(graph: fx.Graph, read: Callable[[str], torch.Tensor], names: Mapping[str, str]) -> tuple[Quantized, list[Stored]]:
    """Swap every `fake_quantize(parameter, ...)` for `dequantize(codes, scale)`, in place.

    read:  the uncut value of a tensor; codes are computed before cutting, since a power may round differently in another
           memory layout.
    names: the tensor that holds a quantizer's step size -> the quantizer's name.
    """
    stored: dict[str, Stored] = {}
    found = Quantized()
    for node in list(graph.nodes):
        if node.target is not torch.ops.geta.fake_quantize.default:
            continue
        bound = bind_arguments(node, lambda arg: arg)
        source = bound["x"]
        step = str(bound["d"].target)
        d, q_m, t = (read(str(bound[name].target)) for name in ("d", "q_m", "t"))
        bits = whole_bits(bit_width(d, q_m, t, bound["signed"]))
        name = names.get(step, step)
        found.bits[name], found.signed[name] = bits, bool(bound["signed"])
        if not (isinstance(source, fx.Node) and source.op == "get_attr"):
            continue
        weight = read(str(source.target))
        codes = quantize_codes(weight, d, q_m, t, bound["signed"], linear=bound["linear"])
        base = canonical_name(str(source.target))
        stored[base] = Stored(str(source.target), step, f"{base}_codes", f"{base}_scale", codes.to(code_dtype(bits, bound["signed"])))
        with graph.inserting_before(node):
            reads = [graph.create_node("get_attr", f"{base}_{part}") for part in ("codes", "scale")]
            new = graph.call_function(torch.ops.geta.dequantize.default, (*reads, bits))
            new.meta = dict(node.meta)
            if weight.dtype != d.dtype:  # scales stay float32 in a half-precision model
                new = graph.call_function(torch.ops.aten.to.dtype, (new, weight.dtype))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return found, list(stored.values())


def drop_unused(graph: fx.Graph) -> None:
    """Remove tensors that nobody reads and operators without a use or an effect."""
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
