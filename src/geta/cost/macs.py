"""Multiply-accumulates of one operator from the shapes of its arguments.

Legend: `B` batch, `I` input and `O` output channels, `L` and `S` query and key length, `E` head width.
A formula returns the products that an operator computes: of which two operands, and which sizes multiply to the MACs, so that
`geta.cost.model` can count again with other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx


class Size(NamedTuple):
    """`size` is the length of dimension `dim` of what `node` gives."""

    node: fx.Node
    dim: int
    size: int


@dataclass(frozen=True)
class Product:
    """`macs` multiply-accumulates between two operands (None: an intermediate that the graph doesn't show).

    sizes: `macs` is the product of these; None where only the number is known (a measured operator).
    """

    op: str
    macs: int
    left: fx.Node | None
    right: fx.Node | None
    sizes: tuple[Size, ...] | None = None


@dataclass(frozen=True)
class Call:
    """One call of an operator: its arguments by their schema's names, as graph nodes and as values with shapes."""

    node: fx.Node
    op: str
    nodes: dict[str, Any]
    values: dict[str, Any]
    result: Any

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor argument."""
        return tuple(self.values[name].shape)

    def sizes(self, name: str, dims: slice = slice(None)) -> list[Size]:
        """The sizes of a tensor argument, or some of them."""
        return sizes_of(self.nodes[name], self.shape(name), dims)

    def product(self, sizes: Sequence[Size], left: str, right: str) -> list[Product]:
        """The products of an operator that multiplies the two named arguments."""
        return [multiplied(self.op, sizes, self.nodes[left], self.nodes[right])]


Formula = Callable[[Call], list[Product]]


def sizes_of(node: fx.Node, shape: Sequence[int], dims: slice = slice(None)) -> list[Size]:
    """The sizes of a tensor, or some of them."""
    return [Size(node, dim, int(size)) for dim, size in enumerate(shape)][dims]


def multiplied(op: str, sizes: Sequence[Size], left: fx.Node | None, right: fx.Node | None) -> Product:
    """A product whose MACs are the product of `sizes`."""
    return Product(op, math.prod(size.size for size in sizes), left, right, tuple(sizes))


def bind(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Call | None:
    """Name the arguments of an operator's call; None for what is not an ATen operator."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    names = [argument.name for argument in target._schema.arguments]
    nodes = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    return Call(node, target._schema.name.removeprefix("aten::"), nodes, values, result)


def _linear(call: Call) -> list[Product]:
    return call.product([*call.sizes("input", slice(-1)), *call.sizes("weight")], "input", "weight")


def _convolution(call: Call) -> list[Product]:
    transposed = call.op.startswith("conv_transpose") or bool(call.values.get("transposed", False))
    positions = call.sizes("input") if transposed else sizes_of(call.node, call.result.shape)
    return call.product([*positions, *call.sizes("weight", slice(1, None))], "input", "weight")


def _matmul(left: str, right: str) -> Formula:
    def formula(call: Call) -> list[Product]:
        a, b = call.sizes(left), call.sizes(right)
        columns = b[-1:] if len(b) > 1 else []
        return call.product([*_broadcast(a[:-2], b[:-2]), *a[-2:], *columns], left, right)

    return formula


def _broadcast(a: list[Size], b: list[Size]) -> list[Size]:
    """The sizes of two batches broadcast against each other, from the right; of equal ones the first."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    start = len(longer) - len(shorter)
    pairs = zip(longer[start:], shorter, strict=True)
    return [*longer[:start], *(second if first.size == 1 else first for first, second in pairs)]


def _attention(call: Call) -> list[Product]:
    """Q K^T: B L S E each head, then P V: B L S E_v; the probabilities P are never quantized."""
    query, keys, value_width = call.sizes("query"), call.sizes("key", slice(-2, -1)), call.sizes("value", slice(-1, None))
    scores = multiplied(f"{call.op} q k", [*query, *keys], call.nodes["query"], call.nodes["key"])
    return [scores, multiplied(f"{call.op} p v", [*query[:-1], *keys, *value_width], None, call.nodes["value"])]


def _recurrent(call: Call) -> list[Product]:
    """Every weight matrix is applied once per time step and sample."""
    steps = call.sizes("input", slice(-1))
    matrices = [pair for pair in zip(call.nodes["params"], call.values["params"], strict=True) if pair[1].dim() == 2]
    return [multiplied(call.op, [*steps, *sizes_of(node, value.shape)], call.nodes["input"], node) for node, value in matrices]


def _einsum(call: Call) -> list[Product] | None:
    """Two operands: the product of the sizes of all indices that are not summed within one operand alone."""
    nodes, values = call.nodes["tensors"], call.values["tensors"]
    if len(values) != 2:
        return None
    inputs, _, output = str(call.values["equation"]).replace(" ", "").partition("->")
    terms = inputs.split(",")
    sizes: dict[str, Size] = {}
    held: list[list[str]] = []
    for term, value, node in zip(terms, values, nodes, strict=True):
        indices = _indices(term, value.dim())
        held.append(indices)
        for index, size in zip(indices, sizes_of(node, value.shape), strict=True):
            if index not in sizes or size.size > sizes[index].size:
                sizes[index] = size
    if "->" not in str(call.values["equation"]):
        kept = [index for index in sizes if index.startswith(".") or (held[0] + held[1]).count(index) == 1]
    else:
        kept = _indices(output, len([index for index in sizes if index.startswith(".")]) + len(output.replace("...", "")))
    counted = [index for index in sizes if index in kept or (index in held[0] and index in held[1])]
    return [multiplied(call.op, [sizes[index] for index in counted], nodes[0], nodes[1])]


def _indices(term: str, dim: int) -> list[str]:
    """Split a term into its indices; those of an ellipsis are named ".1", ".2" ... from the right."""
    before, dots, after = term.partition("...")
    hidden = dim - len(before) - len(after) if dots else 0
    return [*before, *(f".{number}" for number in range(hidden, 0, -1)), *after]


FORMULAS: dict[str, Callable[[Call], list[Product] | None]] = {
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    "matmul": _matmul("self", "other"),
    "mm": _matmul("self", "mat2"),
    "bmm": _matmul("self", "mat2"),
    "mv": _matmul("self", "vec"),
    "dot": _matmul("self", "tensor"),
    "addmm": _matmul("mat1", "mat2"),
    "addmv": _matmul("mat", "vec"),
    "addbmm": _matmul("batch1", "batch2"),
    "baddbmm": _matmul("batch1", "batch2"),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
}
"""By base name: overloads and in-place twins of an operator multiply the same."""


def products(call: Call) -> list[Product] | None:
    """The products that a call computes; None when there is no formula for its operator."""
    formula = FORMULAS.get(call.op.removesuffix("_"))
    return None if formula is None else formula(call)
