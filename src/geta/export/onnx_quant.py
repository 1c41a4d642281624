"""Quantizers and integer weights in the words of ONNX: QuantizeLinear and DequantizeLinear around ordinary operators (QDQ).

An activation quantizer of b bits with step size d and range q_m becomes

    DequantizeLinear(Clip(QuantizeLinear(x, d, z), z - n, z + n), d, z)        n = round(q_m / d), signed: z = 128
    DequantizeLinear(Clip(QuantizeLinear(x, d, 0), 0, n), d, 0)                unsigned

on uint8. The clip acts on integers, so it doesn't stand between a convolution and the quantizer behind it, which runtimes take together;
where it would change nothing (unsigned, n = 255) it is left out. Signed activations are uint8 with a zero point as well, which is what the
integer kernels of x86 want.

A matrix with one scale per block of columns stands behind a DequantizeLinear with a `block_size`; where its blocks are uneven there
is none, and the file multiplies integers with `Gather(scale, block of each column)`, which runtimes do once, at loading.

A weight of b bits is its codes, as int8 (uint8 without a sign, int16 and int32 above 8 bits), behind a DequantizeLinear. `Form.uint8`:
8-bit codes are stored as uint8 with zero point 128. On x86 CPUs without dot-product instructions kernels add two products of uint8 and int8
numbers in 16 bits, which may overflow with weights of 8 bits (not with 7 or fewer); with two uint8 numbers they don't.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.onnx.ops
from torch import Tensor, fx

from geta.export.between import ACTIVATIONS, Path, arguments, path_to
from geta.export.cleanup import Network
from geta.quant.blocks import SHORTEST, Blocks, Cutting, block_of_column, expanded
from geta.quant.fixed_ops import effective_scale, has_no_zero
from geta.quant.ops import bit_width, prepared
from geta.subnet.integers import whole_bits

OPSET = 21
_MIDDLE, _TOP = 128, 255
_SATURATING_BITS = 8
HALF_A_BYTE, BYTE = 4, 8
EXACT_BLOCKS = ("session.qdq_matmulnbits_accuracy_level", "1")
"""The session option with which ONNX Runtime multiplies weights of one scale per block with the numbers that it is given."""


def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """saturate(round(x / scale) + zero_point), in the zero point's type."""
    return torch.onnx.ops.symbolic(
        "QuantizeLinear", (x, scale, zero_point), {"axis": axis}, dtype=zero_point.dtype, shape=x.shape, version=OPSET
    )


def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """(codes - zero_point) * scale."""
    inputs = (codes, scale) if zero_point is None else (codes, scale, zero_point)
    return torch.onnx.ops.symbolic("DequantizeLinear", inputs, {"axis": axis}, dtype=scale.dtype, shape=codes.shape, version=OPSET)


def dequantize_blocks(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int) -> Tensor:
    """(codes - zero_point) * scale with one scale for `block_size` entries along the axis."""
    inputs = (codes, scale) if zero_point is None else (codes, scale, zero_point)
    attributes: dict[str, Any] = {"axis": axis, "block_size": block_size}
    return torch.onnx.ops.symbolic("DequantizeLinear", inputs, attributes, dtype=scale.dtype, shape=codes.shape, version=OPSET)


def clip_codes(codes: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Clip integers."""
    return torch.onnx.ops.symbolic("Clip", (codes, lowest, highest), dtype=codes.dtype, shape=codes.shape, version=OPSET)


def pad_codes(codes: Tensor, zero_point: Tensor, ends: Tensor, pad: list[int]) -> Tensor:
    """Add zeros, which as codes are the zero point. pad: as in `torch.nn.functional.pad`; ends: the same in ONNX's order."""
    shape = [*codes.shape]
    for place, (before, after) in enumerate(zip(pad[0::2], pad[1::2], strict=True)):
        shape[-1 - place] += before + after
    return torch.onnx.ops.symbolic("Pad", (codes, ends, zero_point), dtype=codes.dtype, shape=shape, version=OPSET)


def gather_rows(codes: Tensor, places: Tensor) -> Tensor:
    """Rows of a table of integers."""
    shape = (*places.shape, *codes.shape[1:])
    return torch.onnx.ops.symbolic("Gather", (codes, places), {"axis": 0}, dtype=codes.dtype, shape=shape, version=OPSET)


@dataclass(frozen=True)
class Activation:
    """A quantizer of activations. scale: [] or [C] along `axis`; exponent: t, None for 1; levels: the lowest and highest code."""

    scale: Tensor
    exponent: Tensor | None
    levels: tuple[int, int]
    bits: int
    axis: int
    has_zero: bool = True
    """Whether zero is one of its values; not so with one bit that is a sign."""

    @property
    def signed(self) -> bool:
        return self.levels[0] < 0

    @property
    def as_bytes(self) -> bool:
        """Whether QuantizeLinear makes its codes, as uint8 of one scale, which is what integer kernels read."""
        return self.bits <= BYTE and self.has_zero and not self.scale.dim()


def activation_of(network: Network, node: fx.Node) -> Activation | None:
    """The quantizer that a node applies, or None where it isn't one or its parameters are computed in the graph."""
    bound = arguments(node) if node.target in ACTIVATIONS else {}
    names = [name for name in ("d", "q_m", "t", "scale") if name in bound]
    if not names or any(bound[name].op != "get_attr" for name in names):
        return None
    if node.target is torch.ops.geta.lsq_quantize.default:
        scale = network.read(bound["scale"])
        levels = (bound["quant_min"], bound["quant_max"])
        scale = effective_scale(scale, scale.dtype)
        return Activation(_line(scale), None, levels, bound["bits"], _axis(scale), not has_no_zero(bound["bits"], levels[0]))
    d, q_m, t = (network.read(bound[name]) for name in ("d", "q_m", "t"))
    signed, linear = bool(bound["signed"]), bool(bound["linear"])
    inside = prepared(d, d, q_m, t, linear)
    highest = int(torch.round(inside.top / inside.d).max())
    bits = whole_bits(bit_width(d, q_m, t, signed))
    levels = (-highest if signed else 0, highest)
    return Activation(_line(inside.d), None if linear else inside.t, levels, bits, _axis(inside.d))


def _axis(scale: Tensor) -> int:
    """The axis along which a scale such as [O, 1, 1, 1] has its numbers; 0 where it has one."""
    long = [axis for axis, size in enumerate(scale.shape) if size > 1]
    return long[0] if long else 0


def _line(scale: Tensor) -> Tensor:
    return scale.reshape(-1) if scale.numel() > 1 else scale.reshape(())


def lower_activation(network: Network, node: fx.Node, found: Activation, rank: int = 0) -> fx.Node:
    """Replace a quantizer of up to 8 bits, and what stands before it and may act on codes; returns the node that has its values now.

    rank: number of dimensions of its values, as far as known; 0 = unknown, then padding stays where it is.
    """
    name = node.name
    zero = _MIDDLE if found.signed else 0
    path = way_to(node, found, rank)
    lowest, highest = (code + zero for code in _levels(path, found))
    graph, x = network.graph, path.source
    with graph.inserting_before(node):
        if found.exponent is not None:
            x = signed_power(network, name, x, found.exponent)
        scale = network.add(f"{name}.scale", found.scale)
        point = network.add(f"{name}.zero_point", torch.full(found.scale.shape, zero, dtype=torch.uint8))
        codes = graph.call_function(quantize_linear, (x, scale, point, found.axis))
        if (lowest, highest) != (0, _TOP):
            bounds = [network.add(f"{name}.bound", torch.tensor(value, dtype=torch.uint8)) for value in (lowest, highest)]
            codes = graph.call_function(clip_codes, (codes, *bounds))
        for pad in path.pads:
            ends = [[0] * (rank - len(half)) + [*reversed(half)] for half in (pad[0::2], pad[1::2])]
            codes = graph.call_function(pad_codes, (codes, point, network.add(f"{name}.padding", torch.tensor(ends).reshape(-1)), pad))
        new = graph.call_function(dequantize_linear, (codes, scale, point, found.axis))
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def way_to(node: fx.Node, found: Activation, rank: int = 0) -> Path:
    """What leads to a quantizer; nothing acts on codes where there are exponents, or scales for every channel."""
    return path_to(node, pads=rank > 0) if found.exponent is None and not found.scale.dim() else Path(node.args[0])


def _levels(path: Path, found: Activation) -> tuple[int, int]:
    """The lowest and highest code that come out: the quantizer's own, or those that clamps before it leave."""
    lowest, highest = found.levels
    if path.low > -torch.inf:
        lowest = max(lowest, int(torch.round(torch.tensor(path.low) / found.scale)))
    if path.high < torch.inf:
        highest = min(highest, int(torch.round(torch.tensor(path.high) / found.scale)))
    return lowest, highest


def signed_power(network: Network, name: str, x: Any, t: Tensor) -> fx.Node:
    """sgn(x) |x|^t."""
    graph, aten = network.graph, torch.ops.aten
    exponent = network.add(f"{name}.exponent", t)
    size = graph.call_function(aten.abs.default, (x,))
    power = graph.call_function(aten.pow.Tensor_Tensor, (size, exponent))
    return graph.call_function(aten.mul.Tensor, (graph.call_function(aten.sign.default, (x,)), power))


@dataclass(frozen=True)
class Weight:
    """An integer weight. codes: as stored; scale: [], a shape that broadcasts against them, or one number per row and block.

    blocks: lengths of the blocks of columns (`geta.quant.blocks`), () where there are none.
    """

    name: str
    codes: Tensor
    scale: Tensor
    bits: int
    blocks: Blocks = ()

    @property
    def values(self) -> Tensor:
        """The weight in floating point, bitwise what the graph computes."""
        return (self.codes.to(self.scale.dtype) * expanded(self.scale, self.codes.shape, self.blocks)).add_(0.0)

    @property
    def turned(self) -> Weight:
        """The matrix with its dimensions exchanged."""
        return replace(self, codes=self.codes.T, scale=self.scale.T if self.scale.dim() == 2 else self.scale)

    @property
    def cutting(self) -> Cutting:
        """How the matrix is cut into blocks."""
        return Cutting.of(self.codes.shape, self.scale.shape, self.blocks)


def weight_of(network: Network, node: object) -> Weight | None:
    """The integer weight that a node dequantizes, or None."""
    if not isinstance(node, fx.Node) or node.target is not torch.ops.geta.dequantize.default:
        return None
    codes, scale, bits = node.args
    if not isinstance(codes, fx.Node) or not isinstance(scale, fx.Node) or codes.op != "get_attr" or scale.op != "get_attr":
        return None
    blocks = tuple(int(str(width)) for width in node.kwargs.get("blocks", ()))  # type: ignore[union-attr]
    return Weight(str(codes.target), network.read(codes), network.read(scale), int(str(bits)), blocks)


def may_overflow(weight: Weight) -> bool:
    """Whether sums of two products with such codes, as int8, are too large for the 16 bits of some x86 kernels."""
    return weight.codes.dtype is torch.int8 and weight.bits >= _SATURATING_BITS


def stored(weight: Weight, *, uint8: bool) -> tuple[Tensor, int | None]:
    """The codes in the type that a file gets, and their zero point (None: the type has none)."""
    if uint8 and may_overflow(weight):
        return (weight.codes.to(torch.int16) + 128).to(torch.uint8), 128
    return weight.codes, None if weight.codes.dtype is torch.int32 else 0


@dataclass(frozen=True)
class Form:
    """How a weight is written. order: of its axes, None = as it is. integer: whether integer kernels will read it. uint8: see above."""

    uint8: bool
    integer: bool = True
    order: tuple[int, ...] | None = None


def lower_weight(network: Network, weight: Weight, before: fx.Node, form: Form) -> fx.Node:
    """A node for the weight's values."""
    if weight.blocks:
        return _lower_blocks(network, weight, before, form)
    codes, zero = stored(weight, uint8=form.uint8 and form.integer)
    scale = weight.scale.expand([1] * (codes.dim() - weight.scale.dim()) + list(weight.scale.shape)) if weight.scale.dim() else weight.scale
    if form.order is not None:
        codes = codes.permute(*form.order).contiguous()
        scale = scale.permute(*form.order) if scale.dim() else scale
    with network.graph.inserting_before(before):
        reads = [network.add(f"{weight.name}.stored", codes), network.add(f"{weight.name}.scale", _line(scale))]
        if weight.bits <= HALF_A_BYTE and codes.dtype.itemsize == 1:
            network.narrow.append(str(reads[0].target))
        if not form.integer:
            network.spelled.append(str(reads[0].target))
        point = None if zero is None else network.add(f"{weight.name}.zero_point", torch.full_like(_line(scale), zero, dtype=codes.dtype))
        new = network.graph.call_function(dequantize_linear, (*reads, point, _axis(scale)))
        new.meta = dict(before.meta)
    return new


def _lower_blocks(network: Network, weight: Weight, before: fx.Node, form: Form) -> fx.Node:
    """The same for a matrix with a scale per block; runtimes read blocks of one length, without a shorter one at the end."""
    if form.order == (1, 0):
        weight = weight.turned
    cut, groups = weight.cutting, even_groups(weight)
    scale, size = (weight.scale, 1) if isinstance(groups, str) else groups
    with network.graph.inserting_before(before):
        reads = [network.add(f"{weight.name}.stored", weight.codes.contiguous()), network.add(f"{weight.name}.scale", scale.contiguous())]
        stored_name = str(reads[0].target)
        if weight.bits <= HALF_A_BYTE and weight.codes.dtype.itemsize == 1:
            network.narrow.append(stored_name)
        if isinstance(groups, str):
            network.spelled.append(stored_name)
            network.columns[stored_name] = torch.from_numpy(block_of_column(cut.widths, cut.shape[cut.axis]))
        zeros = torch.zeros_like(scale, dtype=weight.codes.dtype)
        point = None if weight.codes.dtype is torch.int32 else network.add(f"{weight.name}.zero_point", zeros)
        new = network.graph.call_function(dequantize_blocks, (*reads, point, cut.axis, size))
        new.meta = dict(before.meta)
    return new


def even_groups(weight: Weight) -> tuple[Tensor, int] | str:
    """Scales of groups of columns of one size, without a shorter one at the end: (scale [O, I / size], size); or why there are none.

    Blocks that became uneven are such groups if all of them begin at a multiple of some size, of at least 8 columns; each scale is
    repeated then.
    """
    axis, widths = weight.cutting.axis, weight.cutting.widths
    size = math.gcd(*widths)
    if size < SHORTEST:
        return (
            f"its {len(widths)} blocks have {min(widths)} to {max(widths)} columns, which are no groups of one size of at least {SHORTEST} "
            "columns, and others can't be written: granularity='channel' has no such blocks"
        )
    times = torch.tensor([width // size for width in widths], device=weight.scale.device)
    return weight.scale.repeat_interleave(times, axis), size


def bias_is_fine(network: Network, bias: fx.Node, input_scale: Tensor, weight: Weight) -> bool:
    """Whether rounding a bias to units of input scale times weight scale changes it by less than a thousandth of its largest entry."""
    unit = float(input_scale.double().max() * weight.scale.double().max())
    return unit / 2 < 1e-3 * float(network.read(bias).abs().max())


def integer_bias(network: Network, bias: fx.Node, input_scale: Tensor, weight: Weight, before: fx.Node) -> fx.Node:
    """A bias as int32 in units of input scale times weight scale, as integer kernels add it; the node itself if it won't fit."""
    unit = (input_scale.double() * _line(weight.scale).double()).float()
    codes = torch.round(network.read(bias).double() / unit.double())
    if float(codes.abs().max()) >= 2**31:
        return bias
    with network.graph.inserting_before(before):
        reads = (
            network.add(f"{bias.target}.integers", codes.to(torch.int32)),
            network.add(f"{bias.target}.scale", unit.expand(codes.shape).contiguous() if unit.dim() else unit),
        )
        new = network.graph.call_function(dequantize_linear, (*reads, None, 0))
        new.meta = dict(before.meta)
    return new
