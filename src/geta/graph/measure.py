"""Sizes that are only known when the model runs (`nonzero`, boolean masks, `.item()`): the analysis takes the example's."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from geta.errors import BadModelError
from geta.graph.places import line_of


def open_sizes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes with a size that no input's size determines."""
    return [node for node in graph.nodes if any(_is_open(leaf) for leaf in pytree.tree_leaves(node.meta.get("val")))]


def _is_open(leaf: Any) -> bool:
    numbers = leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,)
    return any(isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)) and not number.node.has_hint() for number in numbers)


def fake_like(mode: FakeTensorMode, value: Any) -> Any:
    """The same shapes and dtypes with fixed sizes, all in one fake mode."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    return pytree.tree_map_only(torch.Tensor, one, value)


class _Measured(fx.Interpreter):
    """Runs a graph and writes down the sizes that it meets."""

    def __init__(self, graph: fx.Graph, examples: set[fx.Node] | None = None) -> None:
        super().__init__(nn.Module(), graph=graph)
        self._mode = FakeTensorMode()
        self._examples = examples

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function":
            for leaf in pytree.tree_leaves(result):
                # empty lists of positions tell nothing and lose nothing; empty activations would hide what they couple
                if isinstance(leaf, torch.Tensor) and 0 in leaf.shape and (leaf.is_floating_point() or leaf.is_complex()):
                    raise BadModelError(f"the example inputs select nothing{line_of(n)}; give inputs of which something is selected")
        if self._examples is not None:
            if n in self._examples:
                n.meta["example"] = described(result)
        elif n.op != "output":
            n.meta["val"] = fake_like(self._mode, result)
        return result


def described(result: Any) -> dict[str, Any] | None:
    """The size of a tensor, or of several, or a number, as plain data."""
    if isinstance(result, (list, tuple)):
        return {"items": [described(item) for item in result]}
    if isinstance(result, torch.Tensor):
        return {"shape": list(result.shape), "dtype": str(result.dtype).removeprefix("torch.")}
    return {"value": result} if isinstance(result, (bool, int, float)) else None


def measure(graph: fx.Graph, values: list[Any], examples: list[Any]) -> None:
    """Give every node the sizes that it has on these values of the placeholders; the graph goes on computing them anew.

    examples: the values as the user gave them (`values` may be a larger batch); `meta["example"]` of nodes whose sizes depend on
    values is read off there, so that costs can be counted.
    Raises BadModelError when there are no values (meta device) or when something that is selected is empty.
    """
    opened = open_sizes(graph)
    if not opened:
        return
    first = opened[0]
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in values):
        raise BadModelError(f"a size depends on values{line_of(first)}, and there are none on the meta device: load weights and inputs")
    for given, of in ((values, None), (examples, set(opened))):
        copies = [value.detach().clone() if isinstance(value, torch.Tensor) else value for value in given]
        with torch.no_grad(), torch.random.fork_rng():
            _Measured(graph, of).run(*copies, enable_io_processing=False)
