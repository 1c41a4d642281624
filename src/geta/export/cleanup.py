"""Make a compact model's evaluation graph ordinary before it leaves the library: batch norms and padding folded into layers, operators
without an effect dropped.

A batch normalization in evaluation mode behind a convolution or linear layer is one multiplication and one addition per output channel:

    g = gamma / sqrt(running_var + eps)        W' = g W        b' = beta + (b - running_mean) g

An integer weight keeps its codes: only its scale becomes one per channel, |g| times what it was, and the codes of a channel change their
sign where g is below zero. So the folded network has the weights that were trained, to the last code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from geta.export.between import ACTIVATIONS, arguments, fold_padding, zero_padding
from geta.quant.results import CONVOLUTIONS
from geta.subnet.integers import drop_unused

_aten = torch.ops.aten

_TRANSPOSED = (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)
_LAYERS = (*CONVOLUTIONS, *_TRANSPOSED, _aten.linear.default)
_WITHOUT_EFFECT = (_aten.detach.default, _aten.detach_.default, _aten.alias.default, _aten.lift_fresh_copy.default)


@dataclass
class Network:
    """A graph and the tensors that it reads by name; both belong to whoever holds this.

    narrow: names of codes of up to 4 bits. spelled: names of codes that are multiplied out where a file is loaded. columns: for some of
    these, which of the scales along the axis belongs to each entry.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    narrow: list[str] = field(default_factory=list)
    spelled: list[str] = field(default_factory=list)
    columns: dict[str, Tensor] = field(default_factory=dict)

    def read(self, node: fx.Node) -> Tensor:
        return self.tensors[str(node.target)]

    def add(self, name: str, tensor: Tensor) -> fx.Node:
        """Store a tensor under the name, or one like it, and insert a node that reads it."""
        free, count = name, 1
        while free in self.tensors:
            free, count = f"{name}_{count}", count + 1
        self.tensors[free] = tensor
        return self.graph.create_node("get_attr", free)


def copied(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> Network:
    """A network of its own, without gradients, that may be changed."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = new.node_copy(node, lambda n: mapping[n])
    return Network(new, {name: tensor.detach() for name, tensor in tensors.items()})


def clean_up(network: Network) -> list[str]:
    """Fold and drop in place; returns the module paths of the batch norms that were folded."""
    for node in [*network.graph.nodes]:
        if node.op == "call_function" and (_has_no_effect(node) or _repeats(network, node)):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
    for pad in reversed([node for node in network.graph.nodes if zero_padding(node) is not None]):
        fold_padding(pad)
    folded = [str(node.meta.get("module_path", "")) for node in [*network.graph.nodes] if _fold(network, node)]
    drop_unused(network.graph)
    used = {str(node.target) for node in network.graph.nodes if node.op == "get_attr"}
    for name in [*network.tensors]:
        if name not in used:
            del network.tensors[name]
    return folded


def _has_no_effect(node: fx.Node) -> bool:
    if node.target is _aten.dropout.default or node.target is _aten.feature_dropout.default:
        return bool(node.args[2] is False or node.args[1] == 0)
    padding = zero_padding(node)
    return node.target in _WITHOUT_EFFECT or (padding is not None and not any(padding))


def _repeats(network: Network, node: fx.Node) -> bool:
    """Whether a quantizer reads what another one with the same numbers made: its values are on the grid already."""
    source = node.args[0] if node.target in ACTIVATIONS else None
    if not isinstance(source, fx.Node) or source.target is not node.target:
        return False
    mine, others = arguments(node), arguments(source)
    if not mine.get("linear", True):
        return False  # a power of a power is another number
    return all(_same(network, mine[name], others[name]) for name in mine if name != "x")


def _same(network: Network, one: Any, other: Any) -> bool:
    """Whether two arguments are the same number or tensor."""
    if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
        return bool(one == other)
    return one.op == other.op == "get_attr" and torch.equal(network.read(one), network.read(other))


def _fold(network: Network, norm: fx.Node) -> bool:
    """Fold one batch norm into the layer before it, if it can be."""
    if norm.target is not _aten.batch_norm.default:
        return False
    bound = arguments(norm)
    layer = bound["input"]
    if bound["training"] or not isinstance(layer, fx.Node) or layer.target not in _LAYERS or len(layer.users) > 1:
        return False
    statistics = [bound[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if any(tensor is not None and (not isinstance(tensor, fx.Node) or tensor.op != "get_attr") for tensor in statistics):
        return False
    place = _place(layer)
    if place is None:
        return False
    weight, bias, axis = place
    if bound["running_mean"] is None or not (_is_own(weight) or _integers(weight) is not None):
        return False
    gamma, beta, mean, var = (None if tensor is None else network.read(tensor).double() for tensor in statistics)
    assert mean is not None and var is not None
    gain = torch.rsqrt(var + bound["eps"]) * (1.0 if gamma is None else gamma)
    before = 0.0 if bias is None else network.read(bias).double()
    shift = (0.0 if beta is None else beta) + (before - mean) * gain
    with network.graph.inserting_before(layer):
        new = _scaled(network, weight, gain, axis)
        base = str(statistics[2].target).rpartition(".")[0]
        moved = network.add(f"{base}.folded_bias", shift.to(network.read(statistics[2]).dtype))
    layer.update_arg(1, new)
    set_bias(layer, moved)
    norm.replace_all_uses_with(layer)
    network.graph.erase_node(norm)
    return True


def _place(layer: fx.Node) -> tuple[fx.Node, fx.Node | None, int] | None:
    """(weight, bias, the weight's axis of output channels), or None where they aren't tensors of the model or the layout is another."""
    bound = arguments(layer)
    weight, bias = bound["weight"], bound.get("bias")
    transposed = layer.target in _TRANSPOSED or bool(bound.get("transposed", False))
    if transposed and bound.get("groups", 1) != 1:
        return None
    if not isinstance(weight, fx.Node) or not (bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")):
        return None
    return weight, bias, 1 if transposed else 0


def _is_own(weight: fx.Node) -> bool:
    return weight.op == "get_attr" and len(weight.users) == 1


def _integers(weight: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    """(codes, scale, bits) of an integer weight that nobody else reads."""
    if weight.target is not torch.ops.geta.dequantize.default or len(weight.users) != 1:
        return None
    codes, scale, bits = weight.args
    own = isinstance(codes, fx.Node) and isinstance(scale, fx.Node) and codes.op == scale.op == "get_attr"
    return (codes, scale, int(str(bits))) if own else None  # type: ignore[return-value]


def _scaled(network: Network, weight: fx.Node, gain: Tensor, axis: int) -> fx.Node:
    """A node for the weight times one number per output channel."""
    found = _integers(weight)
    if found is None:
        value = network.read(weight)
        return network.add(f"{weight.target}_folded", (value.double() * _along(gain, value.dim(), axis)).to(value.dtype))
    codes, scale = network.read(found[0]), network.read(found[1])
    gain = _along(gain, codes.dim(), axis)
    wide = scale.double() * gain.abs()
    silent = (gain == 0).expand_as(wide)  # a scale of zero is no scale: such a channel has zeros as codes instead
    sign = gain.sign().to(codes.dtype) if codes.dtype.is_signed else (gain != 0).to(codes.dtype)
    if not codes.dtype.is_signed and bool((gain < 0).any()):
        return _floats(network, weight, codes, scale, gain)
    reads = (
        network.add(f"{found[0].target}_folded", codes * sign),
        network.add(f"{found[1].target}_folded", torch.where(silent, 1.0, wide).to(scale.dtype)),
    )
    new = network.graph.call_function(torch.ops.geta.dequantize.default, (*reads, found[2]), dict(weight.kwargs))
    new.meta = dict(weight.meta)
    return new


def _floats(network: Network, weight: fx.Node, codes: Tensor, scale: Tensor, gain: Tensor) -> fx.Node:
    """Codes without a sign can't change it: such a weight (nothing here makes one) is folded as floats."""
    value = codes.double() * scale.double() * gain
    return network.add(f"{weight.name}_folded", value.to(scale.dtype))


def _along(values: Tensor, rank: int, axis: int) -> Tensor:
    """One number per index of the axis, in a shape that broadcasts."""
    shape = [1] * rank
    shape[axis] = math.prod(values.shape)
    return values.reshape(shape)


def set_bias(layer: fx.Node, bias: fx.Node) -> None:
    """Give a layer another bias, or its first one."""
    if len(layer.args) > 2:
        layer.update_arg(2, bias)
    else:
        layer.update_kwarg("bias", bias)
