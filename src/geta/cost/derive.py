"""Derive the cost model of everything that can be cut from a network: which size of which operator shrinks with which family."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from geta.cost.bits import BitWidths
from geta.cost.count import captured_tensors, flat_inputs, graph_products
from geta.cost.latency import LatencyModel, LatencyTable, LatencyTerm
from geta.cost.layers import Layers, resized
from geta.cost.macs import Product
from geta.cost.model import LATENCY, CostModel, ProductTerm, TensorTerm, Width
from geta.cost.record import UNQUANTIZED
from geta.cost.shrink import Shrinkage, Slopes
from geta.errors import BadModelError
from geta.graph.capture import Capture
from geta.graph.dependency import Analysis, DependencyGraph, analysed
from geta.graph.depth import branch_of, dead_without
from geta.graph.families import layer_sets
from geta.graph.names import canonical_name
from geta.graph.propagate import bind_arguments
from geta.quant.blocks import Cutting
from geta.quant.fixed import FixedQuantizer
from geta.quant.quantizer import Quantizer

_FAKE_QUANTIZE = "geta.fake_quantize.default"
_STEPS = {_FAKE_QUANTIZE: "d", "geta.lsq_quantize.default": "scale"}
"""The argument of each fake quantizer that its integers are multiplied with."""


INPUTS = "all inputs"
"""Name of the quantizer that stands for all assumed ones of activations."""


@dataclass(frozen=True)
class Assumed:
    """Quantizers that a float model doesn't have yet: one bit width for all inputs, one for all weights of a dtype.

    weights: id of each weight that would get one -> name of its quantizer. inputs: ids of those whose other operand would get `INPUTS`.
    scale_bytes: of the quantizers' numbers that a compact model keeps.
    """

    weights: Mapping[int, str]
    inputs: AbstractSet[int]
    scale_bytes: int


def cost_model(graph: DependencyGraph, latency: LatencyTable | None = None, assumed: Assumed | None = None) -> CostModel:
    """The costs that `geta.compact(graph.model, graph, ...)` will have, as a function of removed groups and bits.

    The model is captured again if quantizers were attached since `analyze`. Costs are for the example inputs of the graph.
    latency: measured times, for a prediction of the latency as well (at the table's batch size).
    assumed: count a float model as if it had these quantizers, and don't capture a model for training that an evaluation reads all of
        (`geta.cost.outlook`).
    Raises BadModelError when the model, as it is now, no longer fits the graph, ConfigError when a layer isn't in the table.
    """
    return _Derivation(graph, latency, assumed).run()


def network_layers(graph: DependencyGraph, batch: int | None = None) -> Layers:
    """The layers of the graph's model as it is now, at a batch size (None: that of the example inputs), and what else it computes."""
    one = _Graph(graph, analysed(graph.model, graph, train=False))
    return one.layers(graph, BitWidths(one.tensors, one.names), batch)


class _Graph:
    """One capture: its tensors by name, its live operators, and how its sizes shrink."""

    def __init__(self, graph: DependencyGraph, analysis: Analysis) -> None:
        self.capture: Capture = analysis.capture
        self.tensors, lifted = captured_tensors(graph.model, self.capture)
        placeholders = self.capture.graph.find_nodes(op="placeholder")
        self.names: dict[fx.Node, str] = {node: lifted[node.name] for node in placeholders if node.name in lifted}
        self.free = [node for node in placeholders if node not in self.names]
        self.first = {name: node for node, name in reversed(self.names.items())}
        self.live = _live(self.capture.graph)
        self.shrinkage = Shrinkage(graph, analysis)
        self.coded = {self.names[x]: (node, d) for node, x, d in _quantized(self.live) if x in self.names}
        """Parameters that `geta.compact` stores as integers: name -> (quantizing node, its step size)."""
        codes = {node for node, x, _ in _quantized(self.live) if x in self.names}
        inputs = [source for node in self.live if node not in codes for source in node.all_input_nodes]
        self.read = sorted({self.names[source] for source in inputs if source in self.names})
        self.layers_of = self._layers_of(graph, analysis)
        """Node -> the residual branches (numbers of prunable families) that it goes with, for what goes with any."""
        self.together = self._together(graph)

    def _layers_of(self, graph: DependencyGraph, analysis: Analysis) -> dict[fx.Node, tuple[int, ...]]:
        found: dict[fx.Node, tuple[int, ...]] = {}
        self._branches = [
            (number, branch_of(analysis.branches, family)) for number, family in enumerate(graph.prunable_families) if family.is_layer
        ]
        for number, branch in self._branches:
            if branch is None:
                name = graph.prunable_families[number].name
                raise BadModelError(f"'{name}' can't be removed from the model as it is now; analyze it again as it is now")
            for node in dead_without(self.capture, [branch]):
                found[node] = (*found.get(node, ()), number)
        return found

    def _together(self, graph: DependencyGraph) -> bool:
        """Whether something goes only if several branches do, such as the norm that two of them share."""
        stays = {together[0].name for together in layer_sets(graph.families)}
        families = graph.prunable_families
        branches = [branch for number, branch in self._branches if branch is not None and families[number].name not in stays]
        return bool(branches) and bool(dead_without(self.capture, branches) - set(self.layers_of))

    def layers_of_tensor(self, name: str) -> tuple[int, ...]:
        """The branches with any of which a tensor goes."""
        readers = [self.layers_of.get(node, ()) for node, other in self.names.items() if other == name and node.users]
        return tuple(number for number in readers[0] if all(number in others for others in readers)) if readers else ()

    def given(self, graph: DependencyGraph, batch: int | None = None) -> dict[fx.Node, Any]:
        """The value of every placeholder; with a batch size, inputs have shapes alone."""
        inputs = [resized(leaf, batch) for leaf in flat_inputs(self.capture, graph.example.args, graph.example.kwargs)]
        return {**{node: self.tensors[name] for node, name in self.names.items()}, **dict(zip(self.free, inputs, strict=True))}

    def layers(self, graph: DependencyGraph, widths: BitWidths, batch: int | None) -> Layers:
        """Its layers at a batch size."""
        given = self.given(graph, batch)
        return Layers(self.capture.graph, self.live, given, shrinkage=self.shrinkage, widths=widths, path=self.capture.module_path)

    def where(self, node: fx.Node) -> str:
        return (self.capture.module_path(node) if node.op == "call_function" else self.names.get(node, "")) or "the model itself"


class _Derivation:
    def __init__(self, graph: DependencyGraph, table: LatencyTable | None, assumed: Assumed | None) -> None:
        self._graph = graph
        self._table = table
        self._quick = assumed is not None
        self._assumed = assumed or Assumed({}, frozenset(), 0)
        self._eval = _Graph(graph, analysed(graph.model, graph, train=False))
        self._widths = BitWidths(self._eval.tensors, self._eval.names)
        steps = {canonical_name(f"{path}.d"): m.name for path, m in graph.model.named_modules() if isinstance(m, Quantizer)}
        self._quantizers = steps
        self._number: dict[str, int] = {}
        self._sizes: dict[tuple[int, Slopes], int] = {}
        self._notes: dict[str, None] = {}

    def run(self) -> CostModel:
        one = self._eval
        given = one.given(self._graph)
        found = graph_products(one.capture.graph, given, self._widths, one.capture.module_path)
        counted = [(node, product) for node, product in found if product.macs and node in one.live]
        products = tuple(self._product(node, product) for node, product in counted)
        tensors = (*self._stored(), *self._only_trained(), *self._assumed_scales())
        latency = None if self._table is None else self._latency(self._table)
        if one.together:
            self._notes["what only several residual branches share (a norm in front of both) counts as if it stayed"] = None
        if latency is not None and one.layers_of:
            self._notes["the predicted latency counts residual branches as if they stayed"] = None
        families = self._graph.prunable_families
        slope = np.zeros((len(self._sizes), len(families)), dtype=np.int64)
        for row, (_, slopes) in enumerate(self._sizes):
            for family, entries in slopes:
                slope[row, family] = entries
        base = np.array([size for size, _ in self._sizes], dtype=np.int64)
        dense = self._dense(sum(product.macs for _, product in counted), base, tensors)
        if latency is not None:
            dense[LATENCY] = float(latency.milliseconds(base.astype(np.float64)[:, None])[0])
        return CostModel(
            families=tuple(family.name for family in families),
            family_sizes=tuple(family.size for family in families),
            quantizers=tuple(self._number),
            base=base,
            slope=slope,
            products=products,
            tensors=tensors,
            dense=dense,
            notes=tuple(self._notes),
            latency=latency,
        )

    def _latency(self, table: LatencyTable) -> LatencyModel:
        """The latency in terms of the distinct sizes."""
        found = self._eval.layers(self._graph, self._widths, table.batch)
        terms: dict[tuple[str, tuple[int, ...]], LatencyTerm] = {}
        for layer in found.layers:
            grid = table.grid(layer.path, layer.shape)
            sizes = tuple(self._sizes.setdefault(one, len(self._sizes)) for one in layer.variables)
            before = terms.get((grid.key, sizes))
            terms[grid.key, sizes] = LatencyTerm(grid, sizes, 1 if before is None else before.count + 1)
        elements: dict[tuple[int, ...], int] = {}
        for one in found.others(constants=table.runtime == "eager"):
            sizes = tuple(sorted(self._sizes.setdefault(size, len(self._sizes)) for size in one.sizes))
            elements[sizes] = elements.get(sizes, 0) + one.factor
        self._notes.update(found.notes)
        return LatencyModel(table, tuple(terms.values()), tuple((factor, sizes) for sizes, factor in elements.items()))

    def _size(self, graph: _Graph, node: fx.Node, dim: int, size: int) -> int:
        """The number of one size among the distinct sizes."""
        slopes, exact = graph.shrinkage.slopes(node, dim)
        if not exact:
            self._notes[f"dimension {dim} of {node.target} at {graph.where(node)} is bounded from above"] = None
        return self._sizes.setdefault((size, slopes), len(self._sizes))

    def _product(self, node: fx.Node, product: Product) -> ProductTerm:
        left, right = self._operands(product)
        if product.sizes is None:
            self._notes[f"{product.op} at {self._eval.where(node)} counts as uncut: it has no formula for its products"] = None
            return ProductTerm(product.macs, self._alive(self._eval.layers_of.get(node, ())), left, right)
        sizes = [size for size in product.sizes if size.size > 1]
        alive = self._alive(self._eval.layers_of.get(node, ()))
        return ProductTerm(1, (*(self._size(self._eval, *size) for size in sizes), *alive), left, right)

    def _alive(self, layers: Sequence[int]) -> tuple[int, ...]:
        """A factor for each residual branch that something goes with: 1 as long as it is there, then 0."""
        return tuple(self._sizes.setdefault((1, ((number, 1),)), len(self._sizes)) for number in layers)

    def _operands(self, product: Product) -> tuple[Width, Width]:
        sides = product.left, product.right
        widths = [self._width(side) for side in sides]
        for place, side in enumerate(sides if self._assumed.weights else ()):
            name = None if side is None else self._widths.stored(side)
            weight = None if name is None else id(self._eval.tensors[name])
            if weight is not None and weight in self._assumed.weights:
                widths[place] = self._numbered(self._assumed.weights[weight])
                if weight in self._assumed.inputs:
                    widths[1 - place] = self._numbered(INPUTS)
        return widths[0], widths[1]

    def _numbered(self, quantizer: str) -> Width:
        return Width(0.0, (self._number.setdefault(quantizer, len(self._number)),))

    def _width(self, node: fx.Node | None) -> Width:
        fixed, quantizers = 0.0, []
        for source in self._widths.sources(node):
            number = None if source is None else self._quantizer(source)
            if number is not None:
                quantizers.append(number)
            else:
                fixed = max(fixed, UNQUANTIZED if source is None else self._widths.of(source))
        return Width(fixed, tuple(quantizers))

    def _quantizer(self, node: fx.Node) -> int | None:
        """The number of the quantizer that a `fake_quantize` belongs to; None for what is not one of the model's quantizers."""
        step = bind_arguments(node, lambda arg: arg).get("d") if str(node.target) == _FAKE_QUANTIZE else None
        name = self._quantizers.get(self._eval.names[step]) if step in self._eval.names else None
        return None if name is None else self._number.setdefault(name, len(self._number))

    def _stored(self) -> Iterator[TensorTerm]:
        """What the evaluation graph of the compact model reads; the rules are those of `geta.cost`."""
        one = self._eval
        for name, (node, step) in one.coded.items():
            yield self._tensor(one, one.first[name], parameter=True, width=self._width(node))
            yield self._tensor(one, step, parameter=False)
            if self._loses_columns(one, node, step):
                note = f"the scales of '{name}' are bounded from above: those of a block stay until the last of its columns goes"
                self._notes[note] = None
        widths: dict[str, list[Width]] = {}
        quantizer: dict[str, bool] = {}  # tensor of a quantizer -> whether the compact model counts it
        for node, x, _ in _quantized(one.live):
            if x in one.names:
                continue
            stored = self._widths.stored(x)
            if stored is not None:
                widths.setdefault(stored, []).append(self._width(node))
            for position, argument in enumerate(node.args[1:4]):
                for name in self._widths.read_by(argument) if isinstance(argument, fx.Node) else ():
                    quantizer[name] = quantizer.get(name, False) or stored is None or position == 0
        for name in one.read:
            if not quantizer.get(name, True):
                continue
            width = _widest(widths[name]) if name in widths else None
            quantized = self._assumed.weights.get(id(one.tensors[name]))
            width = width if quantized is None else self._numbered(quantized)
            parameter = (isinstance(one.tensors[name], nn.Parameter) or width is not None) and name not in quantizer
            yield self._tensor(one, one.first[name], parameter=parameter, width=width)

    @staticmethod
    def _loses_columns(graph: _Graph, node: fx.Node, step: fx.Node) -> bool:
        """Whether columns of a weight with one scale per block of them can go; its scales don't follow one by one."""
        bound = bind_arguments(node, lambda arg: arg)
        if not bound["blocks"]:
            return False
        weight, scale = (graph.tensors[graph.names[one]] for one in (bound["x"], step))
        return bool(graph.shrinkage.slopes(bound["x"], Cutting.of(weight.shape, scale.shape, bound["blocks"]).axis)[0])

    def _only_trained(self) -> Iterator[TensorTerm]:
        """Tensors that only the training graph of the compact model reads: counters, auxiliary heads."""
        if self._quick and self._nothing_unread():
            return
        try:
            trained = _Graph(self._graph, analysed(self._graph.model, self._graph, train=True))
        except BadModelError:
            return  # `compact` makes no training graph either, and says so
        for name in trained.read:
            if name not in self._eval.read:
                parameter = isinstance(trained.tensors[name], nn.Parameter) and name not in self._steps(trained)
                yield self._tensor(trained, trained.first[name], parameter=parameter)
        for name, (_, step) in trained.coded.items():
            if name not in self._eval.coded:
                self._notes[f"the codes of '{name}', which only training reads, count 4 bytes each"] = None
                yield self._tensor(trained, trained.first[name], parameter=False, width=Width(UNQUANTIZED))
                yield self._tensor(trained, step, parameter=False)

    def _nothing_unread(self) -> bool:
        """Whether the evaluation graph reads all that the model has and brings no constants, so that training will hardly add any."""
        model, known = self._graph.model, {id(self._eval.tensors[name]) for name in self._eval.read}
        saved = model.state_dict(keep_vars=True)
        stored = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in saved)]
        return not self._eval.capture.constants and all(id(tensor) in known for tensor in stored)

    def _assumed_scales(self) -> Iterator[TensorTerm]:
        if self._assumed.scale_bytes:
            yield TensorTerm((), parameter=False, width=Width(8.0 * self._assumed.scale_bytes))

    @staticmethod
    def _steps(graph: _Graph) -> set[str]:
        """Tensors of the quantizers of codes: buffers in a compact model."""
        return {graph.names[step] for _, step in graph.coded.values()}

    def _tensor(self, graph: _Graph, node: fx.Node, *, parameter: bool, width: Width | None = None) -> TensorTerm:
        tensor = graph.tensors[graph.names[node]]
        sizes = tuple(self._size(graph, node, dim, size) for dim, size in enumerate(tensor.shape) if size != 1)
        alive = self._alive(graph.layers_of_tensor(graph.names[node]))
        return TensorTerm((*sizes, *alive), parameter, width or Width(8.0 * tensor.element_size()))

    def _dense(self, macs: int, base: np.ndarray, tensors: Sequence[TensorTerm]) -> dict[str, float]:
        """As `CompactInfo.dense_cost` has it: lifted constants and quantizers are not the float network's own."""
        params = sum(math.prod(int(base[u]) for u in term.sizes) for term in tensors if term.parameter)
        mine = self._quantizer_tensors()
        own = [t for name, t in self._eval.tensors.items() if name not in mine and name not in self._eval.capture.constants]
        stored = sum(tensor.numel() * tensor.element_size() for tensor in own)
        return {"macs": macs, "bops": macs * UNQUANTIZED * UNQUANTIZED, "params": params, "bytes": stored}

    def _quantizer_tensors(self) -> set[str]:
        found = set()
        for path, module in self._graph.model.named_modules():
            if isinstance(module, Quantizer | FixedQuantizer):
                tensors: Mapping[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
                found |= {canonical_name(f"{path}.{leaf}") for leaf in tensors}
        return found


def _live(graph: fx.Graph) -> dict[fx.Node, None]:
    """The operators that stay when dead code is removed, in graph order."""
    live: dict[fx.Node, None] = {}
    for node in reversed(graph.nodes):
        if node.op == "output" or (node.op == "call_function" and (node.is_impure() or any(user in live for user in node.users))):
            live[node] = None
    return dict(reversed(live.items()))


def _quantized(nodes: Mapping[fx.Node, None]) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """(node, what it quantizes, its step size) of every fake quantizer."""
    for node in nodes:
        step = _STEPS.get(str(node.target))
        if step is not None:
            bound = bind_arguments(node, lambda arg: arg)
            yield node, bound["x"], bound[step]


def _widest(widths: Sequence[Width]) -> Width:
    return Width(max(width.fixed for width in widths), tuple(dict.fromkeys(q for width in widths for q in width.quantizers)))
