"""The first and the last layers of a network, which lose most when their bits are few."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import fx

from geta.quant.attach import DEFAULT_EXCLUDE
from geta.quant.targets import find_layers

if TYPE_CHECKING:
    from geta.graph.dependency import DependencyGraph


def end_layers(graph: DependencyGraph, *, exclude: Sequence[str] = DEFAULT_EXCLUDE) -> list[str]:
    """Module paths of the layers with weights that no other such layer comes before, and of those that none comes after.

        geta.quantize(model, weights=(4, 8), bits_of=dict.fromkeys(geta.end_layers(graph), 8), ...)

    graph: of `geta.analyze`, before `geta.quantize`. It says what flows where, so that this holds for parallel stems, several heads and
    layers whose order in the model isn't that in which they run. exclude: as given to `geta.quantize`; what it matches gets no quantizers
    and is left out here too, but still is the first or last layer.
    """
    capture = graph.analysis.capture
    known = {layer.path for layer in find_layers(graph.model, (), strict=False)}
    nodes = [node for node in capture.graph.nodes if node.op == "call_function"]
    owner = {node: path for node in nodes if (path := capture.module_path(node)) in known}
    before = _others(nodes, owner, lambda node: node.all_input_nodes)
    after = _others(nodes[::-1], owner, lambda node: node.users)
    ends = {path for node, path in owner.items() if before[node] <= {path} or after[node] <= {path}}
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    return [layer.path for layer in find_layers(graph.model, patterns, strict=False) if layer.path in ends]


def _others(
    nodes: Sequence[fx.Node], owner: Mapping[fx.Node, str], neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> dict[fx.Node, frozenset[str]]:
    """The layers that each node can be reached from, itself left out; two of them are enough to know that there is another one."""
    found: dict[fx.Node, frozenset[str]] = {}
    for node in nodes:
        seen: set[str] = set()
        for near in neighbours(node):
            seen |= found.get(near, frozenset())
            if near in owner:
                seen.add(owner[near])
        found[node] = frozenset(sorted(seen)[:2])
    return found
