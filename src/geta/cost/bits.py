"""How wide the values of a node are: found by walking back to its quantizer.

Values keep their bit width through operators that only move, select or repeat them, and through those that add nothing
but zeros (ReLU, zero padding). Everything else computes new values, which count as unquantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from geta.cost.record import UNQUANTIZED
from geta.quant.ops import bit_width

_MOVES = frozenset(
    (
        *("alias", "chunk", "clone", "contiguous", "detach", "detach_", "diagonal", "expand", "expand_as", "flatten", "flip", "lift_fresh"),
        *("lift_fresh_copy", "movedim", "narrow", "numpy_T", "permute", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
        *(
            "repeat",
            "repeat_interleave",
            "reshape",
            "reshape_as",
            "roll",
            "rot90",
            "select",
            "slice",
            "split",
            "split_with_sizes",
            "squeeze",
        ),
        *("squeeze_", "swapaxes", "swapdims", "t", "tensor_split", "tile", "to", "_to_copy", "transpose", "unbind", "unflatten", "unfold"),
        *("unsafe_chunk", "unsafe_split", "unsqueeze", "unsqueeze_", "view", "view_as", "_unsafe_view", "moveaxis", "adjoint", "mT", "mH"),
        *("embedding", "gather", "index", "index_select", "take_along_dim", "im2col"),
        *("relu", "relu_", "max_pool1d", "max_pool2d", "max_pool3d", "amax", "adaptive_max_pool1d", "adaptive_max_pool2d"),
    )
)
_JOINS = frozenset(("cat", "concat", "concatenate", "stack", "hstack", "vstack", "column_stack", "maximum", "minimum", "where"))
_QUANTIZERS = ("geta.fake_quantize.default", "geta.lsq_quantize.default", "geta.dequantize.default")


class BitWidths:
    """Bit widths of the nodes of one graph.

    tensors: values of parameters and buffers by name; names: node -> the name of the tensor that it stands for.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[fx.Node, str]) -> None:
        self._tensors = tensors
        self._names = names
        self._bits: dict[fx.Node, float] = {}
        self._sources: dict[fx.Node, tuple[fx.Node | None, ...]] = {}
        self._values: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node | None) -> float:
        """Return the mean bit width of a node's values; 32 when no quantizer made them (None: not in the graph)."""
        return max(self._width(source) for source in self.sources(node))

    def sources(self, node: fx.Node | None) -> tuple[fx.Node | None, ...]:
        """The quantizers that may have made a node's values, which are as wide as the widest; None: some are unquantized."""
        if node is None or node.op != "call_function":
            return (None,)
        if node not in self._sources:
            self._sources[node] = self._find_sources(node)
        return self._sources[node]

    def _find_sources(self, node: fx.Node) -> tuple[fx.Node | None, ...]:
        base = _base(node)
        if str(node.target) in _QUANTIZERS or base.startswith("fake_quantize_per_"):
            return (node,)
        if base in _JOINS:
            found = [source for parent in node.all_input_nodes for source in self.sources(parent)]
            return tuple(dict.fromkeys(found)) or (None,)
        return self.sources(_source(node) if _moves(node, base) else None)

    def is_weight(self, node: fx.Node | None) -> bool:
        """Whether a node's values come from a parameter or buffer alone, quantized or moved about."""
        while node is not None and node not in self._names:
            node = _source(node)
        return node is not None

    def stored(self, node: fx.Node) -> str | None:
        """Return the name of the tensor that a node's values come from by moves alone; None for activations."""
        current: fx.Node | None = node
        while current is not None and current not in self._names:
            current = _source(current) if _base(current) in _MOVES else None
        return None if current is None else self._names[current]

    def read_by(self, node: fx.Node) -> list[str]:
        """Return the names of all tensors that a node is computed from, in graph order."""
        found, pending, seen = [], [node], {node}
        while pending:
            current = pending.pop()
            if current in self._names:
                found.append(self._names[current])
            for parent in current.all_input_nodes:
                if parent not in seen:
                    seen.add(parent)
                    pending.append(parent)
        return sorted(found)

    def value(self, node: Any) -> Any:
        """Compute a node from the stored tensors; raise KeyError when it depends on the model's inputs."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self._values:
            if node in self._names:
                self._values[node] = self._tensors[self._names[node]].detach()
            elif node.op != "call_function":
                raise KeyError(node.name)
            else:
                args = fx.map_arg(node.args, self.value)
                kwargs = fx.map_arg(node.kwargs, self.value)
                assert callable(node.target)
                with torch.no_grad():
                    self._values[node] = node.target(*args, **kwargs)
        return self._values[node]

    def _width(self, quantizer: fx.Node | None) -> float:
        if quantizer is None:
            return UNQUANTIZED
        if quantizer not in self._bits:
            self._bits[quantizer] = self._find_width(quantizer)
        return self._bits[quantizer]

    def _find_width(self, node: fx.Node) -> float:
        target = str(node.target)
        if target == "geta.fake_quantize.default":
            d, q_m, t = (self.value(argument) for argument in node.args[1:4])
            signed = node.args[4]
            assert isinstance(signed, bool)
            return _snapped(float(bit_width(d, q_m, t, signed).double().mean()))
        if target in ("geta.dequantize.default", "geta.lsq_quantize.default"):
            bits = node.args[2]
            assert isinstance(bits, int)
            return float(bits)
        low, high = node.args[-2:]
        assert isinstance(low, int)
        assert isinstance(high, int)
        return math.log2(high - low + 1)


def _snapped(bits: float) -> float:
    """A step size in float32 gives its bit width to about six digits: what is that close to an integer is one."""
    return float(round(bits)) if abs(bits - round(bits)) < 1e-4 else bits


def _source(node: fx.Node) -> fx.Node | None:
    """The node whose values this one passes on, if it passes on any."""
    quantizes = node.op == "call_function" and str(node.target).startswith("geta.")
    first = node.args[0] if node.args and (quantizes or _moves(node, _base(node))) else None
    return first if isinstance(first, fx.Node) else None


def _moves(node: fx.Node, base: str) -> bool:
    if base in ("pad", "constant_pad_nd"):
        value = node.args[-1] if len(node.args) > (3 if base == "pad" else 2) else node.kwargs.get("value")
        mode = node.args[2] if base == "pad" and len(node.args) > 2 else "constant"
        return mode != "constant" or value is None or (isinstance(value, (int, float)) and value == 0)
    if base in ("dropout", "dropout_"):
        return node.args[-1] is False
    return base in _MOVES


def _base(node: fx.Node) -> str:
    """The operator's name without namespace and overload; "view" for taking an item of a tuple, which is the same to us."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::")
    return "view" if getattr(node.target, "__name__", "") == "getitem" else ""
