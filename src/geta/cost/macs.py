"""Multiply-accumulates of one operator from the shapes of its arguments.

Legend: `B` batch, `I` input and `O` output channels, `L` and `S` query and key length, `E` head width.
A formula returns the products that an operator computes: how many MACs, and of which two operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Product:
    """`macs` multiply-accumulates between two operands (None: an intermediate that the graph doesn't show)."""

    op: str
    macs: int
    left: fx.Node | None
    right: fx.Node | None


@dataclass(frozen=True)
class Call:
    """One call of an operator: its arguments by their schema's names, as graph nodes and as values with shapes."""

    op: str
    nodes: dict[str, Any]
    values: dict[str, Any]
    result: Any

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor argument."""
        return tuple(self.values[name].shape)

    def numel(self, name: str) -> int:
        """The number of elements of a tensor argument."""
        return math.prod(self.shape(name))

    def product(self, macs: int, left: str, right: str) -> list[Product]:
        """The products of an operator that multiplies the two named arguments."""
        return [Product(self.op, macs, self.nodes[left], self.nodes[right])]


Formula = Callable[[Call], list[Product]]


def bind(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Call | None:
    """Name the arguments of an operator's call; None for what is not an ATen operator."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    names = [argument.name for argument in target._schema.arguments]
    nodes = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    return Call(target._schema.name.removeprefix("aten::"), nodes, values, result)


def _linear(call: Call) -> list[Product]:
    inputs = call.shape("weight")[-1]
    return call.product(call.numel("input") // inputs * call.numel("weight") if inputs else 0, "input", "weight")


def _convolution(call: Call) -> list[Product]:
    transposed = call.op.startswith("conv_transpose") or bool(call.values.get("transposed", False))
    positions = call.numel("input") if transposed else call.result.numel()
    return call.product(positions * math.prod(call.shape("weight")[1:]), "input", "weight")


def _matmul(left: str, right: str) -> Formula:
    def formula(call: Call) -> list[Product]:
        a, b = call.shape(left), call.shape(right)
        rows = a[-2] if len(a) > 1 else 1
        columns = b[-1] if len(b) > 1 else 1
        batch: tuple[int, ...] = torch.broadcast_shapes(a[:-2], b[:-2])
        return call.product(math.prod(batch) * rows * a[-1] * columns, left, right)

    return formula


def _attention(call: Call) -> list[Product]:
    """Q K^T: B L S E each head, then P V: B L S E_v; the probabilities P are never quantized."""
    width, keys, value_width = call.shape("query")[-1], call.shape("key")[-2], call.shape("value")[-1]
    rows = call.numel("query") // width if width else 0
    scores = Product(f"{call.op} q k", rows * keys * width, call.nodes["query"], call.nodes["key"])
    return [scores, Product(f"{call.op} p v", rows * keys * value_width, None, call.nodes["value"])]


def _recurrent(call: Call) -> list[Product]:
    """Every weight matrix is applied once per time step and sample."""
    steps = math.prod(call.shape("input")[:-1])
    pairs = zip(call.nodes["params"], call.values["params"], strict=True)
    return [Product(call.op, steps * value.numel(), call.nodes["input"], node) for node, value in pairs if value.dim() == 2]


def _einsum(call: Call) -> list[Product] | None:
    """Two operands: the product of the sizes of all indices that are not summed within one operand alone."""
    nodes, values = call.nodes["tensors"], call.values["tensors"]
    if len(values) != 2:
        return None
    inputs, _, output = str(call.values["equation"]).replace(" ", "").partition("->")
    terms = inputs.split(",")
    sizes: dict[str, int] = {}
    held: list[list[str]] = []
    for term, value in zip(terms, values, strict=True):
        indices = _indices(term, value.dim())
        held.append(indices)
        for index, size in zip(indices, value.shape, strict=True):
            sizes[index] = max(sizes.get(index, 1), int(size))
    if "->" not in str(call.values["equation"]):
        kept = [index for index in sizes if index.startswith(".") or (held[0] + held[1]).count(index) == 1]
    else:
        kept = _indices(output, len([index for index in sizes if index.startswith(".")]) + len(output.replace("...", "")))
    counted = [index for index in sizes if index in kept or (index in held[0] and index in held[1])]
    return [Product(call.op, math.prod(sizes[index] for index in counted), nodes[0], nodes[1])]


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
