"""A light record of the captured graph for people to look at: its operators and the families that run through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import fx

from geta.graph.branches import quantizer_nodes
from geta.graph.families import Family
from geta.graph.labels import Value, squeezed
from geta.graph.rules.registry import operator_name

if TYPE_CHECKING:
    from geta.graph.dependency import Analysis

Branch = Literal["", "attached", "inserted"]
INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class NodeView:
    """One operator call, model input or model output.

    name:       its name in the captured graph.
    op:         "aten::conv2d", or "input" / "output".
    module:     the user's module path that called it; "" for the model itself.
    shapes:     one shape per tensor that it returns; a size left open is the exporter's symbol, e.g. "s77".
    dtype:      of the first of them, without "torch.".
    inputs:     places in `GraphView.nodes` that it reads.
    parameters: parameters, buffers and constants that it reads directly.
    families:   names of the families whose units its result is made of, prunable ones first.
    branch:     "attached" = a quantizer of a parameter, "inserted" = a quantizer between two operators, "" = no quantizer.
    fed:        whether it depends on a model input; the others are computed from parameters and constants alone.
    """

    name: str
    op: str
    module: str
    shapes: tuple[tuple[int | str, ...], ...]
    dtype: str
    inputs: tuple[int, ...]
    parameters: tuple[str, ...]
    families: tuple[str, ...]
    branch: Branch
    fed: bool


@dataclass(frozen=True)
class GraphView:
    """Operators in the order in which they run."""

    nodes: tuple[NodeView, ...]


def build_view(analysis: Analysis, families: Sequence[Family]) -> GraphView:
    """Record every operator that returns a tensor; arithmetic on sizes is left out."""
    family_of = _family_of_root(analysis, families)
    order = sorted(range(len(families)), key=lambda number: (not families[number].prunable, number))
    rank = {number: place for place, number in enumerate(order)}
    quantizers = quantizer_nodes(analysis.capture)
    places: dict[fx.Node, int] = {}
    nodes: list[NodeView] = []
    for node in analysis.capture.graph.nodes:
        tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
        if node.name in analysis.capture.tensor_names or (node.op != "output" and not tensors):
            continue
        inputs = tuple(places[source] for source in node.all_input_nodes if source in places)
        parameters = tuple(analysis.capture.tensor_names[n.name] for n in node.all_input_nodes if n.name in analysis.capture.tensor_names)
        through = sorted(_families_through(analysis, node, family_of), key=lambda number: rank[number])
        fed = node.op == "placeholder" or any(nodes[place].fed for place in inputs)
        op = {"placeholder": INPUT, "output": OUTPUT}.get(node.op) or operator_name(node.target)
        places[node] = len(nodes)
        nodes.append(
            NodeView(
                name=node.name,
                op=op,
                module=analysis.capture.module_path(node),
                shapes=tuple(_shape(tensor) for tensor in tensors),
                dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
                inputs=inputs,
                parameters=parameters,
                families=tuple(families[number].name for number in through),
                branch=("inserted" if fed else "attached") if node in quantizers else "",
                fed=fed,
            )
        )
    return GraphView(tuple(nodes))


def _family_of_root(analysis: Analysis, families: Sequence[Family]) -> np.ndarray:
    """Group id of the partition -> number of its family, -1 where it belongs to none."""
    starts = {(owner.tensor, owner.dim): owner.start for owner in analysis.propagation.space.owners if owner.tensor}
    found = np.full(len(analysis.partition.root), -1, dtype=np.int64)
    for number, family in enumerate(families):
        for member in family.members if not family.is_layer else ():
            labels = starts[member.param, member.dim] + member.index.reshape(-1).numpy()
            found[analysis.partition.root[labels]] = number
    return found


def _families_through(analysis: Analysis, node: fx.Node, family_of: np.ndarray) -> list[int]:
    found: dict[int, None] = {}
    for value in _values(analysis.propagation.values.get(node)):
        for track in value.tracks:
            numbers = np.unique(family_of[analysis.partition.root[squeezed(track.code).numpy() >> 1]])
            found.update(dict.fromkeys(numbers[numbers >= 0].tolist()))
    return list(found)


def _values(value: Any) -> Iterator[Value]:
    for leaf in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(leaf, Value):
            yield leaf


def _shape(tensor: torch.Tensor) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
