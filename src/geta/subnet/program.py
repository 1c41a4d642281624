"""A captured graph that reads its tensors by name: what a compact model runs and what is saved."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from geta.graph.capture import Capture
from geta.subnet.structure import describe


@dataclass(frozen=True)
class Program:
    """graph: placeholders (user inputs, in flattened order), get_attr (tensor names), call_function, output.

    in_spec, out_spec: JSON structures (see geta.subnet.structure) of (args, kwargs) and of the result.
    """

    graph: fx.Graph
    in_spec: str
    out_spec: str

    def compile(self) -> Callable[..., Any]:
        """The graph as a Python function of (*tensors in the order of `tensor_names()`, *inputs)."""
        code = _with_tensors_as_inputs(self.graph, self.tensor_names()).python_code("self")
        namespace = dict(code.globals)
        exec(builtins.compile(code.src, "<geta program>", "exec"), namespace)  # noqa: S102 - torch.fx wrote it from a checked graph
        return partial(namespace["forward"], None)

    def tensor_names(self) -> list[str]:
        """Names of the tensors that the program reads, in the order of first use."""
        return list(dict.fromkeys(str(node.target) for node in self.graph.nodes if node.op == "get_attr"))


def _with_tensors_as_inputs(graph: fx.Graph, names: list[str]) -> fx.Graph:
    """The same graph with tensors passed in: attribute access can't spell every name (a module called `in`)."""
    copied = fx.Graph()
    reads = {name: copied.placeholder(f"tensor_{place}") for place, name in enumerate(names)}
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = reads[str(node.target)] if node.op == "get_attr" else copied.node_copy(node, lambda n: mapping[n])
    return copied


def from_capture(capture: Capture, canonical: Mapping[str, str]) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """Turn a capture into a program whose tensors are read by name; also returns old node -> new node.

    canonical: placeholder name -> tensor name (tied tensors share one).
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in capture.graph.nodes:
        if node.op == "placeholder" and node.name in canonical:
            continue
        if node.op == "placeholder":
            mapping[node] = graph.placeholder(node.name)
    reads: dict[str, fx.Node] = {}
    for node in capture.graph.nodes:
        if node.op == "placeholder" and node.name in canonical:
            name = canonical[node.name]
            if name not in reads:
                reads[name] = graph.create_node("get_attr", name)
            mapping[node] = reads[name]
        elif node.op == "output":
            graph.output(torch.utils._pytree.tree_map_only(fx.Node, lambda n: mapping[n], node.args[0]))
        elif node.op == "call_function":
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = {"module_path": capture.module_path(node)}  # shapes of before the cut would mislead
            if node.meta.get("example") is not None:  # a size that only a run can tell
                mapping[node].meta["example"] = node.meta["example"]
    return Program(graph, describe(capture.in_spec), describe(capture.out_spec)), mapping
