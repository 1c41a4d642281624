"""Rewrite a cleaned-up graph so that PyTorch's ONNX exporter writes integers: `geta.export.onnx_quant` has the words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from geta.export.between import arguments
from geta.export.cleanup import Network, set_bias
from geta.export.linears import Product, product_of
from geta.export.onnx_quant import (
    BYTE,
    HALF_A_BYTE,
    Form,
    Weight,
    activation_of,
    bias_is_fine,
    even_groups,
    gather_rows,
    integer_bias,
    lower_activation,
    lower_weight,
    may_overflow,
    way_to,
    weight_of,
)
from geta.export.plain import lower_plain_activation
from geta.quant.blocks import block_of_column
from geta.quant.results import CONVOLUTIONS, RELUS
from geta.subnet.integers import drop_unused

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.flatten.using_ints, _aten.unsqueeze.default)


@dataclass
class Lowered:
    """integer: module paths of the layers that integer kernels can run; floating: module path -> why another layer is computed in floats.

    activations: name of a quantizer's node -> the node that took its place. unsigned: how many integer layers have their signed 8-bit
    weights as uint8.
    """

    integer: list[str] = field(default_factory=list)
    floating: dict[str, str] = field(default_factory=dict)
    activations: dict[str, fx.Node] = field(default_factory=dict)
    unsigned: int = 0


def lower(network: Network, *, uint8_weights: bool) -> Lowered:
    """Replace all quantizers and integer weights, in place.

    Only quantizers around integer layers become QuantizeLinear: where one stands before a layer with floating-point weights, ONNX Runtime
    rounds these weights to 8 bits. The others are written as ordinary arithmetic.
    """
    return _Lowering(network, uint8_weights).run()


class _Lowering:
    """One graph being rewritten. around: quantizers that stand before or behind integer layers."""

    def __init__(self, network: Network, uint8_weights: bool) -> None:
        self._network = network
        self._uint8 = uint8_weights
        self._done = Lowered()
        self._quantizers = {node: found for node in network.graph.nodes if (found := activation_of(network, node)) is not None}
        self._around: set[fx.Node] = set()
        self._ranks = {node: self._rank(node) for node in self._quantizers}
        ways = {node: way_to(node, found, self._ranks[node]) for node, found in self._quantizers.items() if found.as_bytes}
        self._behind = {node: quantizer for quantizer, way in ways.items() for node in (quantizer, *way.nodes)}

    def run(self) -> Lowered:
        network = self._network
        for node in [*network.graph.nodes]:
            product = product_of(network, node)
            if product is not None:
                self._product(node, product)
            elif node.target in CONVOLUTIONS:
                self._convolution(node)
            elif node.target is _aten.embedding.default:
                _lower_embedding(network, node)
        for node, found in self._quantizers.items():
            name = node.name
            new = (
                lower_activation(network, node, found, self._ranks[node]) if node in self._around else lower_plain_activation(network, node)
            )
            self._done.activations[name] = new
        drop_unused(network.graph)  # transpositions of weights that are stored transposed now
        for node in [*network.graph.nodes]:
            weight = weight_of(network, node)
            if weight is not None and node.users:
                reader = next(iter(node.users))
                path = str(reader.meta.get("module_path", "")) or reader.name
                why = f"; {_blocks_in_words(weight)}" if weight.blocks else ""
                self._done.floating.setdefault(path, f"its weight is read by {reader.target}, which isn't written in integers{why}")
                node.replace_all_uses_with(lower_weight(network, weight, node, Form(self._uint8, integer=False)))
        drop_unused(network.graph)
        return self._done

    def _rank(self, quantizer: fx.Node) -> int:
        """How many dimensions a quantizer's values have, if an integer convolution reads them; else 0."""
        for reader in quantizer.users:
            weight = weight_of(self._network, arguments(reader)["weight"]) if reader.target in CONVOLUTIONS else None
            if weight is not None:
                return weight.codes.dim()
        return 0

    def _product(self, node: fx.Node, product: Product) -> None:
        """x W^T + b as a product with W^T stored, so that no transposition stands between the integers and the product."""
        weight, source, graph = product.weight, self._source(product.input), self._network.graph
        integer = self._judged(node, weight, source, "")
        if weight is None:
            return
        values = lower_weight(self._network, weight, node, Form(self._uint8, integer, order=(1, 0)))
        with graph.inserting_before(node):
            new = graph.call_function(_aten.matmul.default, (product.input, values))
        if product.bias is not None and integer:
            new = self._plus_bias(new, product.bias, weight, source, node)
        elif product.bias is not None:
            new = self._before(node, _aten.add.Tensor, new, product.bias)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)

    def _convolution(self, node: fx.Node) -> None:
        bound = arguments(node)
        weight, bias = weight_of(self._network, bound["weight"]), bound["bias"]
        ends = self._ends(node)
        integer = self._judged(node, weight, bound["input"], "" if ends else "its result isn't quantized, which integer convolutions need")
        if weight is None:
            return
        node.update_arg(1, lower_weight(self._network, weight, node, Form(self._uint8, integer)))
        if not integer:
            return
        self._around.update(ends)
        if bias is not None:
            set_bias(node, self._integer_bias(bias, weight, bound["input"], node))

    def _source(self, node: fx.Node) -> fx.Node:
        """Where the entries of a layer's input come from: runtimes move a quantizer of one scale behind a view by themselves."""
        while node.target in _VIEWS:
            node = arguments(node)["self"]
        return node

    def _judged(self, node: fx.Node, weight: Weight | None, source: fx.Node, ends: str) -> bool:
        """Whether integer kernels can run a layer; noted, with the reason if they can't."""
        path = str(node.meta.get("module_path", "")) or node.name
        reasons = []
        if weight is None or weight.bits > BYTE:
            reasons.append("its weight isn't quantized" if weight is None else f"its weight has {weight.bits} bits")
        elif weight.blocks:
            reasons.append(_blocks_in_words(weight))
        elif weight.scale.numel() > 1 and weight.scale.shape[0] == 1:
            reasons.append("its weight has one scale per input channel")
        found = self._quantizers.get(source)
        if found is None or not found.as_bytes:
            reasons.append(
                "its input isn't quantized" if found is None else f"its input isn't of up to {BYTE} bits with a zero and one scale"
            )
        if ends and not reasons:
            reasons.append(ends)
        if reasons:
            self._done.floating[path] = "; ".join(reasons)
            return False
        self._done.integer.append(path)
        self._done.unsigned += self._uint8 and weight is not None and may_overflow(weight)
        self._around.add(source)
        return True

    def _ends(self, node: fx.Node) -> list[fx.Node]:
        """The quantizers that read a convolution's result, if nothing else does."""
        readers = [*node.users]
        while len(readers) == 1 and readers[0].target in RELUS:
            readers = [*readers[0].users]
        return [self._behind[reader] for reader in readers] if all(reader in self._behind for reader in readers) else []

    def _plus_bias(self, product: fx.Node, bias: fx.Node, weight: Weight, source: fx.Node, node: fx.Node) -> fx.Node:
        """Integer kernels add a bias in units of the product's integers; where those are coarse, an exact one is added afterwards.

        It is subtracted with the other sign, since runtimes take an addition behind a product as a part of it, and then compute in floats.
        """
        if bias.op != "get_attr" or self._network.read(bias).dim() != 1:
            return self._before(node, _aten.add.Tensor, product, bias)
        if bias_is_fine(self._network, bias, self._quantizers[source].scale, weight):
            return self._before(node, _aten.add.Tensor, product, self._integer_bias(bias, weight, source, node))
        with self._network.graph.inserting_before(node):
            minus = self._network.add(f"{bias.target}.minus", -self._network.read(bias))
        return self._before(node, _aten.sub.Tensor, product, minus)

    def _integer_bias(self, bias: fx.Node, weight: Weight, source: fx.Node, node: fx.Node) -> fx.Node:
        per_output = weight.scale.numel() == 1 or weight.scale.shape[0] == weight.scale.numel()
        if bias.op != "get_attr" or not per_output:
            return bias
        return integer_bias(self._network, bias, self._quantizers[source].scale, weight, node)

    def _before(self, node: fx.Node, operator: Any, *args: fx.Node) -> fx.Node:
        with self._network.graph.inserting_before(node):
            return self._network.graph.call_function(operator, args)


def _blocks_in_words(weight: Weight) -> str:
    """Why integer products don't read a weight with a scale per block, and how it is written."""
    if not isinstance(even_groups(weight), str):
        return "its weight has one scale per block of columns: it is dequantized, in blocks, in front of a product of floats"
    return "its weight's blocks of columns are uneven, which runtimes have no kernels for: it is multiplied out when the file is loaded"


def _lower_embedding(network: Network, node: fx.Node) -> None:
    """Look rows up among the integers and multiply these alone by their scales, which with blocks are looked up as well.

    Not by DequantizeLinear: ONNX Runtime 1.31 moves one behind transpositions, and refuses what it has made of it.
    """
    graph, places = network.graph, arguments(node)["indices"]
    weight = weight_of(network, arguments(node)["weight"])
    if weight is None or weight.codes.dtype.itemsize > 1:
        return
    in_blocks = bool(weight.blocks) and weight.cutting.axis == 1
    if not in_blocks and weight.scale.numel() != 1:
        return
    with graph.inserting_before(node):
        scale = weight.scale if in_blocks else weight.scale.reshape(())
        reads = (network.add(f"{weight.name}.rows", weight.codes), network.add(f"{weight.name}.scale", scale))
        if weight.bits <= HALF_A_BYTE:
            network.narrow.append(str(reads[0].target))
        factors = reads[1]
        if in_blocks:
            columns = torch.from_numpy(block_of_column(weight.cutting.widths, weight.cutting.shape[1]))
            scales = graph.call_function(gather_rows, (factors, places))
            factors = graph.call_function(_aten.index_select.default, (scales, -1, network.add(f"{weight.name}.block_of_column", columns)))
        floats = graph.call_function(_aten.to.dtype, (graph.call_function(gather_rows, (reads[0], places)), weight.scale.dtype))
        new = graph.call_function(_aten.mul.Tensor, (floats, factors))
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
