"""What pruning and quantizing a model would leave of its costs, before either is done: on the meta device too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree

from geta.cost.derive import Assumed, cost_model
from geta.cost.model import KINDS
from geta.cost.record import UNQUANTIZED
from geta.errors import ConfigError
from geta.graph.dependency import DependencyGraph
from geta.quant import Bits, quantizers
from geta.quant.attach import DEFAULT_EXCLUDE
from geta.quant.targets import find_layers, find_weights

ACTIVATION_BITS = 8
_STORED = {f"weights of {size} bytes": 8.0 * size for size in (1, 2, 4, 8)}
_UNITS = {"macs": "MACs", "bops": "BOPs", "params": "parameters", "bytes": "bytes of weights"}


@dataclass(frozen=True)
class Outlook:
    """Costs of one forward pass of the example inputs, now and after removing groups and narrowing bits.

    input_shapes: of the example inputs that all this is counted for.
    sparsity:     share of every prunable family that is removed.
    rows:         {what: {macs, bops, params, bytes}}, the dense float network first; 32 bits where nothing is quantized.
    notes:        what is bounded from above instead of being exact.
    """

    input_shapes: tuple[tuple[int, ...], ...]
    sparsity: float
    rows: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A table with the share of the dense network beside each number."""
        dense = next(iter(self.rows.values()))
        cells = [["one forward pass", *(_UNITS[kind] for kind in KINDS)]]
        for name, costs in self.rows.items():
            shares = ["" if costs is dense or not dense[kind] else f" ({costs[kind] / dense[kind]:.2%})" for kind in KINDS]
            cells.append([name, *(f"{costs[kind]:,.0f}{share}" for kind, share in zip(KINDS, shares, strict=True))])
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
        shapes = ", ".join(str(list(shape)) for shape in self.input_shapes)
        return "\n".join([f"costs for inputs {shapes}:", *lines, *(f"note: {note}" for note in self.notes)])


def outlook(graph: DependencyGraph, sparsity: float = 0.5, weight_bits: tuple[int, ...] = (8, 4)) -> Outlook:
    """Count what the graph's model costs, and what is left with `sparsity` of every family removed and so many bits per weight.

    Each count is that of `geta.cost` for the compact model (`geta.cost.derive.cost_model`). A model without quantizers is counted as
    `geta.quantize(model, weights=bits, activations=8)` would quantize it; one that has some, with these bits for its own quantizers.

    Raises ConfigError for an impossible sparsity or bit width, BadModelError and UnsupportedOpError when costs can't be counted.
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is {sparsity}; it must be at least 0 and below 1")
    removed = [family.size - family.kept(sparsity, 1) for family in graph.prunable_families]
    own = {name: found.kind for name, found in quantizers(graph.model).items()}
    assumed = Assumed({}, frozenset(), 0) if own else _assumed(graph)
    model = cost_model(graph, assumed=assumed)
    weights = {name for name, kind in own.items() if kind == "weight"} | set(assumed.weights.values())
    share = f"{sparsity:.0%} of the groups removed"
    rows: dict[str, Mapping[str, float]] = {"dense": model.dense}
    if not own:
        stored = model.evaluate(removed, [_STORED.get(name, UNQUANTIZED) for name in model.quantizers])["bytes"] - assumed.scale_bytes
        rows[share] = {**model.evaluate(removed, [UNQUANTIZED] * len(model.quantizers)), "bytes": stored}
    for bits in weight_bits:
        Bits.of(bits)
        widths = [bits if name in weights else ACTIVATION_BITS for name in model.quantizers]
        rows[f"{share}, weights {bits} bits, activations {ACTIVATION_BITS}"] = model.evaluate(removed, widths)
    shapes = tuple(tuple(leaf.shape) for leaf in _tensors(graph))
    stay = ["whole residual branches count as if they stayed"] if any(family.is_layer for family in graph.prunable_families) else []
    return Outlook(shapes, sparsity, rows, (*model.notes, *stay))


def _assumed(graph: DependencyGraph) -> Assumed:
    """What `geta.quantize` would quantize."""
    layers = find_layers(graph.model, DEFAULT_EXCLUDE, strict=False)
    weights = find_weights(graph.model, layers)
    read = {id(layer.module): layer for layer in layers if layer.quantize_input}
    inputs = {id(weight.tensor) for weight in weights if any(id(module) in read for module, _ in weight.places)}
    sizes = [_number_bytes(weight.tensor) for weight in weights]
    # Of a weight's quantizer the step size stays; that of an activation goes on quantizing with d, q_m and t.
    sizes += [3 * _number_bytes(layer.module._parameters[layer.weights[0]]) for layer in read.values()]
    names = {id(weight.tensor): f"weights of {weight.tensor.itemsize} bytes" for weight in weights}
    return Assumed(names, inputs, sum(sizes))


def _number_bytes(tensor: torch.Tensor | None) -> int:
    assert tensor is not None
    return torch.promote_types(tensor.dtype, torch.float32).itemsize


def _tensors(graph: DependencyGraph) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves((graph.example.args, graph.example.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
