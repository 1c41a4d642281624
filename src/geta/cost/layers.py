"""Layers by their shapes: what a latency table times, and how the sizes of a layer follow from how many groups are removed.

A size of a layer is `factor * v_j`, where the variable v_j shrinks with families (`a` channels in, `b` channels out, heads ...), or fixed.
Sizes that shrink in proportion share one variable, so that a residual block's convolution has one and a query projection counts heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from geta.cost.bits import BitWidths
from geta.cost.count import graph_results
from geta.cost.macs import Call, bind
from geta.cost.shrink import Shrinkage, Slopes
from geta.errors import CheckpointError, ConfigError, UnsupportedOpError

MOST_VARIABLES = 3
"""Further sizes of a layer count as fixed."""
Dims = tuple[tuple[int, int], ...]
"""(factor, number of the variable) of every dimension; -1 for a fixed one."""

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_TENSORS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_CONVOLUTIONS, *_TRANSPOSED), ("input", "weight", "bias")),
    "linear": ("input", "weight", "bias"),
    "matmul": ("self", "other"),
    "bmm": ("self", "mat2"),
    "mm": ("self", "mat2"),
    "addmm": ("self", "mat1", "mat2"),
    "scaled_dot_product_attention": ("query", "key", "value"),
}
"""Operators that are timed -> their tensors."""
_SETTINGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_CONVOLUTIONS, ("stride", "padding", "dilation")),
    **dict.fromkeys(_TRANSPOSED, ("stride", "padding", "output_padding", "dilation")),
    "scaled_dot_product_attention": ("is_causal",),
}
_DEFAULTS: dict[str, Any] = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "is_causal": False}
_UNMOVED = frozenset(("dropout", "contiguous", "feature_dropout", "alpha_dropout"))
"""They do nothing in evaluation mode, though their schemas say that they make a new tensor."""


@dataclass(frozen=True)
class LayerShape:
    """An operator and its sizes.

    op: as ATen calls it. tensors: (argument, whether it is a constant of the network, dimensions). settings: (argument, plain value).
    extents: the uncut values of the variables.
    """

    op: str
    tensors: tuple[tuple[str, bool, Dims], ...]
    settings: tuple[tuple[str, Any], ...]
    extents: tuple[int, ...]

    def at(self, values: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor when the variables have these values."""
        return {name: tuple(f if v < 0 else f * values[v] for f, v in dims) for name, _, dims in self.tensors}

    @property
    def key(self) -> str:
        """One line that two layers share exactly if they are alike: `conv2d input*[1, 8a, 6, 6] weight[b, 8a, 3, 3] ... a=2 b=12`.

        A star marks what isn't a constant of the network.
        """
        words = [self.op]
        for name, constant, dims in self.tensors:
            shape = ", ".join(str(f) if v < 0 else f"{'' if f == 1 else f}{chr(97 + v)}" for f, v in dims)
            words.append(f"{name}{'' if constant else '*'}[{shape}]")
        words += [f"{name}={json.dumps(value)}" for name, value in self.settings]
        return " ".join([*words, *(f"{chr(97 + place)}={extent}" for place, extent in enumerate(self.extents))])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        tensors = [[name, constant, [list(dim) for dim in dims]] for name, constant, dims in self.tensors]
        settings = [[name, list(value) if isinstance(value, tuple) else value] for name, value in self.settings]
        return {"op": self.op, "tensors": tensors, "settings": settings, "extents": list(self.extents)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerShape:
        """What `to_json` wrote. Raises CheckpointError for something else."""
        try:
            tensors = tuple((str(n), bool(c), tuple((int(f), int(v)) for f, v in dims)) for n, c, dims in data["tensors"])
            settings = tuple((str(name), tuple(value) if isinstance(value, list) else value) for name, value in data["settings"])
            return cls(str(data["op"]), tensors, settings, tuple(int(extent) for extent in data["extents"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"this is no shape of a layer: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Layer:
    """One layer of a network: its module path, its shape, and (extent, slopes) of its variables, as in `geta.cost.shrink`."""

    path: str
    shape: LayerShape
    variables: tuple[tuple[int, Slopes], ...]


@dataclass(frozen=True)
class Elements:
    """Numbers that the other operators write: `factor` times the product of sizes (extent, slopes)."""

    factor: int
    sizes: tuple[tuple[int, Slopes], ...]


class Layers:
    """The layers of one capture and everything else in it, for a batch size.

    live: the operators that count. given: values of all placeholders, which here decide the sizes. path: a node's module path.
    Raises ConfigError when the capture's batch size is fixed to another one.
    """

    def __init__(
        self,
        graph: fx.Graph,
        live: Mapping[fx.Node, None],
        given: Mapping[fx.Node, Any],
        *,
        shrinkage: Shrinkage,
        widths: BitWidths,
        path: Any,
    ) -> None:
        self.notes: dict[str, None] = {}
        self._live, self._given, self._shrinkage, self._widths, self._path = live, given, shrinkage, widths, path
        try:
            self._results = graph_results(graph, given, widths, path)
        except UnsupportedOpError as error:
            raise ConfigError(
                f"the network can't be followed at this batch size, perhaps because its analysis has a fixed one (graph.notes says so): "
                f"measure with the batch size of the example inputs ({error})"
            ) from error
        self.layers, found = [], set()
        for node in live:
            layer = self._layer(node)
            if layer is not None:
                self.layers.append(layer)
                found.add(node)
        self._timed = found

    def others(self, *, constants: bool) -> Iterator[Elements]:
        """What the operators that are no layers write. constants: also those that only depend on parameters."""
        for node in self._live:
            value = self._results.get(node)
            if node in self._timed or not isinstance(value, Tensor) or not value.is_floating_point() or _passes_on(node):
                continue
            if not constants and self._widths.is_weight(node):
                continue
            sizes = [self._scaled(node, dim, int(size)) for dim, size in enumerate(value.shape)]
            fixed = math.prod(size for size, slopes in sizes if not slopes)
            yield Elements(fixed, tuple((size, slopes) for size, slopes in sizes if slopes))

    def _layer(self, node: fx.Node) -> Layer | None:
        if node.op != "call_function":
            return None
        call = bind(node, *fx.map_arg((node.args, node.kwargs), self._value), self._results.get(node))
        if call is None or call.op not in _TENSORS or not _plain(call):
            return None
        variables: dict[tuple[int, Slopes], int] = {}
        tensors = []
        for name in _TENSORS[call.op]:
            if isinstance(call.values.get(name), Tensor):
                dims = tuple(self._dim(call, name, dim, size, variables) for dim, size in enumerate(call.shape(name)))
                tensors.append((name, self._widths.is_weight(call.nodes[name]), dims))
        settings = tuple((name, _setting(call, name)) for name in _SETTINGS.get(call.op, ()))
        shape = LayerShape(call.op, tuple(tensors), settings, tuple(extent for extent, _ in variables))
        return Layer(self._path(node), shape, tuple(variables))

    def _value(self, node: fx.Node) -> Any:
        return self._results.get(node, self._given.get(node))

    def _dim(self, call: Call, name: str, dim: int, size: int, variables: dict[tuple[int, Slopes], int]) -> tuple[int, int]:
        """(factor, variable) of one dimension; a new variable is added to `variables`."""
        size, slopes = self._scaled(call.nodes[name], dim, size)
        if not slopes:
            return size, -1
        factor = math.gcd(size, *(entries for _, entries in slopes))
        variable = (size // factor, tuple((family, entries // factor) for family, entries in slopes))
        if variable not in variables and len(variables) == MOST_VARIABLES:
            self.notes[f"{call.op} at {self._path(call.node) or 'the model itself'} has more than {MOST_VARIABLES} sizes that shrink"] = (
                None
            )
            return size, -1
        return factor, variables.setdefault(variable, len(variables))

    def _scaled(self, node: fx.Node, dim: int, size: int) -> tuple[int, Slopes]:
        """A size with its slopes at this batch size: where batch and channels share a dimension, a group takes more or fewer entries."""
        slopes, _ = self._shrinkage.slopes(node, dim)
        value = self._shrinkage.analysis.propagation.values.get(node)
        analysed = getattr(value, "shape", ())[dim] if slopes else size
        if any(entries * size % analysed for _, entries in slopes):
            self.notes[f"dimension {dim} of {node.target} at {self._path(node) or 'the model itself'} counts as uncut"] = None
            return size, ()
        return size, tuple((family, entries * size // analysed) for family, entries in slopes)


def resized(leaf: Any, batch: int | None) -> Any:
    """An input with another batch size, as a tensor without numbers."""
    if batch is None or not isinstance(leaf, Tensor) or not leaf.dim():
        return leaf
    return torch.empty((batch, *leaf.shape[1:]), dtype=leaf.dtype, device="meta")


def _plain(call: Call) -> bool:
    """Whether all sizes of a call follow from its tensors: groups of a transposed convolution don't."""
    return call.op not in _TRANSPOSED or call.values.get("groups", 1) == 1


def _setting(call: Call, name: str) -> Any:
    value = call.values.get(name, _DEFAULTS[name])
    if isinstance(value, (list, tuple)):
        return tuple(int(part) for part in value)
    return value if isinstance(value, (str, bool)) else (int(value),) * int(call.op[-2])


def _passes_on(node: fx.Node) -> bool:
    """Whether an operator only shows its input in another way."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True  # taking an item of a tuple
    schema = node.target._schema
    name = schema.name.removeprefix("aten::")
    return name in _UNMOVED or any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
