"""Quantizers and integer weights in PyTorch's own operators, for files that are to run without this library.

The same numbers as the operators of `geta.quant.ops` and `geta.quant.fixed_ops`, bit for bit in float32: clip, divide, round, multiply, and
an added zero, since integers know only one zero. Weights of up to 4 bits are packed into bytes, 2 or 4 bits each, and unpacked where they
are used; wider ones are int8, int16 or int32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from geta.export.between import ACTIVATIONS, arguments
from geta.export.cleanup import Network
from geta.export.onnx_quant import BYTE, HALF_A_BYTE, Weight, signed_power, weight_of
from geta.quant.blocks import block_of_column
from geta.quant.fixed_ops import effective_scale, has_no_zero
from geta.quant.ops import prepared
from geta.subnet.integers import drop_unused

_aten = torch.ops.aten


def lower_plain(network: Network, *, packed: bool) -> None:
    """Replace every operator of this library, in place. packed: keep weights as integers; otherwise they become floats."""
    for node in [*network.graph.nodes]:
        if node.target in ACTIVATIONS:
            lower_plain_activation(network, node)
        elif weight_of(network, node) is not None:
            _swap(network, node, _weight(network, node, packed=packed))
    drop_unused(network.graph)


def lower_plain_activation(network: Network, node: fx.Node) -> fx.Node:
    """Replace one quantizer of activations; returns the node that has its values now."""
    return _swap(network, node, (_learned if node.target is ACTIVATIONS[0] else _fixed)(network, node))


def _swap(network: Network, node: fx.Node, new: fx.Node) -> fx.Node:
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    network.graph.erase_node(node)
    return new


def _learned(network: Network, node: fx.Node) -> fx.Node:
    """x_Q = d round(c(x) / d) with c(x) = sgn(x) min(|x|, q_m)^t, or min(max(x, 0), q_m)^t."""
    bound, graph = arguments(node), network.graph
    d, q_m, t = (network.read(bound[name]) for name in ("d", "q_m", "t"))
    linear, signed = bool(bound["linear"]), bool(bound["signed"])
    found = prepared(d, d, q_m, t, linear)
    with graph.inserting_before(node):
        lowest = network.add(f"{node.name}.low", -found.q_m if signed else torch.zeros_like(found.q_m))
        highest, step = network.add(f"{node.name}.high", found.q_m), network.add(f"{node.name}.step", found.d)
        value = graph.call_function(_aten.clamp.Tensor, (bound["x"], lowest, highest))
        if not linear:
            value = signed_power(network, node.name, value, found.t)
        rounded = graph.call_function(_aten.round.default, (graph.call_function(_aten.div.Tensor, (value, step)),))
        return _times(graph, rounded, step)


def _fixed(network: Network, node: fx.Node) -> fx.Node:
    """x_Q = s round(clip(x / s)), and for one bit with a sign s sgn(x)."""
    bound, graph = arguments(node), network.graph
    scale = network.read(bound["scale"])
    bits, lowest, highest = (int(bound[name]) for name in ("bits", "quant_min", "quant_max"))
    with graph.inserting_before(node):
        step = network.add(f"{node.name}.step", effective_scale(scale, scale.dtype))
        codes = graph.call_function(_aten.div.Tensor, (bound["x"], step))
        if has_no_zero(bits, lowest):
            signs = [network.add(f"{node.name}.{name}", torch.tensor(value)) for name, value in (("minus", -1.0), ("plus", 1.0))]
            below = graph.call_function(_aten.lt.Scalar, (codes, 0))
            codes = graph.call_function(_aten.where.self, (below, *signs))
        else:
            codes = graph.call_function(_aten.round.default, (graph.call_function(_aten.clamp.default, (codes, lowest, highest)),))
        return _times(graph, codes, step)


def _times(graph: fx.Graph, codes: fx.Node, step: fx.Node) -> fx.Node:
    return graph.call_function(_aten.add.Tensor, (graph.call_function(_aten.mul.Tensor, (codes, step)), 0.0))


def _weight(network: Network, node: fx.Node, *, packed: bool) -> fx.Node:
    weight = weight_of(network, node)
    assert weight is not None
    graph = network.graph
    with graph.inserting_before(node):
        if not packed:
            return network.add(f"{weight.name}.float", weight.values)
        scale = _spread(network, weight)
        if weight.bits > HALF_A_BYTE or weight.codes.dtype.itemsize > 1:
            codes = graph.call_function(_aten.to.dtype, (network.add(f"{weight.name}.codes", weight.codes), weight.scale.dtype))
            return _times(graph, codes, scale)
        return _times(graph, _unpacked(network, weight.name, weight.codes, weight.bits, weight.scale.dtype), scale)


def _spread(network: Network, weight: Weight) -> fx.Node:
    """A node for scales that broadcast against the codes."""
    scale = network.add(f"{weight.name}.scale", weight.scale)
    if not weight.blocks:
        return scale
    cut, graph = weight.cutting, network.graph
    if len(weight.blocks) > 1:
        columns = torch.from_numpy(block_of_column(cut.widths, cut.shape[cut.axis])).to(torch.int32)
        return graph.call_function(_aten.index_select.default, (scale, cut.axis, network.add(f"{weight.name}.block_of_column", columns)))
    repeated = graph.call_function(_aten.repeat_interleave.self_int, (scale, weight.blocks[0], cut.axis))
    return graph.call_function(_aten.slice.Tensor, (repeated, cut.axis, 0, cut.shape[cut.axis]))


def _unpacked(network: Network, name: str, codes: Tensor, bits: int, dtype: torch.dtype) -> fx.Node:
    """Codes out of bytes: shift, mask, put in order, subtract the offset."""
    width = 2 if bits <= 2 else 4
    offset = 1 << (width - 1) if codes.dtype.is_signed else 0
    graph, mask = network.graph, (1 << width) - 1
    read = network.add(f"{name}.packed", pack(codes, width, offset))
    parts = []
    for place in range(BYTE // width):
        part = graph.call_function(_aten.bitwise_right_shift.Tensor_Scalar, (read, place * width)) if place else read
        parts.append(graph.call_function(_aten.bitwise_and.Scalar, (part, mask)))
    line = graph.call_function(_aten.reshape.default, (graph.call_function(_aten.stack.default, (parts, 1)), [-1]))
    line = graph.call_function(_aten.slice.Tensor, (line, 0, 0, codes.numel()))
    shaped = graph.call_function(_aten.reshape.default, (line, list(codes.shape)))
    values = graph.call_function(_aten.to.dtype, (shaped, dtype))
    return graph.call_function(_aten.sub.Tensor, (values, float(offset))) if offset else values


def pack(codes: Tensor, width: int, offset: int) -> Tensor:
    """Codes of `width` bits after adding `offset`, the first in a byte's lowest bits; uint8 [ceil(numel * width / 8)]."""
    each = BYTE // width
    line = torch.zeros(math.ceil(codes.numel() / each) * each, dtype=torch.uint8)
    line[: codes.numel()] = (codes.reshape(-1).to(torch.int16) + offset).to(torch.uint8)
    shifts = torch.arange(each, dtype=torch.uint8) * width
    return (line.reshape(-1, each) << shifts).sum(1).to(torch.uint8)
