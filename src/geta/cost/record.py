"""What counting yields: frozen, printable, comparable records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from geta.errors import CheckpointError, ConfigError

UNQUANTIZED = 32.0
"""Bits that an operand without a quantizer counts with in BOPs, whatever its dtype."""


@dataclass(frozen=True)
class OpCost:
    """The cost of one product of two tensors in the graph.

    name:  the user's module path that called the operator; "" for the model itself.
    op:    the operator, e.g. "conv2d"; attention gives two rows, one per product.
    macs:  multiply-accumulates.
    bops:  macs * weight_bits * activation_bits.
    weight_bits: mean bit width of the weight, or of the second operand when both are activations.
    activation_bits: mean bit width of the other operand.
    """

    name: str
    op: str
    macs: int
    bops: float
    weight_bits: float
    activation_bits: float


@dataclass(frozen=True)
class Cost:
    """Costs of one forward pass of the whole example batch.

    macs:         multiply-accumulates of linear layers, convolutions, matrix and attention products (embeddings: 0).
    bops:         bit operations, the sum over products of `macs * b_w * b_a`; an unquantized side counts 32 bits.
    params:       elements of the model's parameters, without those of quantizers.
    weight_bytes: bytes of parameters and buffers, `numel * bits / 8` for quantized ones (others: their dtype), plus scales.
    per_op:       one row per product.
    input_shapes: shapes of the example inputs that all this was counted for.
    """

    macs: int
    bops: float
    params: int
    weight_bytes: int
    per_op: tuple[OpCost, ...]
    input_shapes: tuple[tuple[int, ...], ...]

    def relative_to(self, other: Cost) -> dict[str, float]:
        """Return the ratios self / other of macs, bops, params and weight_bytes (0 / 0 is 1).

        Raises ConfigError when the two were counted for different input shapes.
        """
        if self.input_shapes != other.input_shapes:
            raise ConfigError(
                f"costs of different inputs can't be compared: {_shapes(self.input_shapes)} here, {_shapes(other.input_shapes)} "
                "in the other; count both for the same example inputs"
            )
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in ("macs", "bops", "params", "weight_bytes")}
        return {name: _ratio(mine, others) for name, (mine, others) in pairs.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; `from_json` reads it back."""
        data = asdict(self)
        data["per_op"] = [asdict(row) for row in self.per_op]
        data["input_shapes"] = [list(shape) for shape in self.input_shapes]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cost:
        """Return the cost that `to_json` wrote; raise CheckpointError when `data` is something else."""
        damaged = CheckpointError("these are not the costs of a model: they were not written by this version of geta, or are damaged")
        if not _has_fields(data, cls) or not isinstance(data["per_op"], list) or not isinstance(data["input_shapes"], list):
            raise damaged
        if not all(_has_fields(row, OpCost) for row in data["per_op"]):
            raise damaged
        shapes = data["input_shapes"]
        if not all(isinstance(shape, list) and all(type(size) is int for size in shape) for shape in shapes):
            raise damaged
        totals = {name: data[name] for name in ("macs", "bops", "params", "weight_bytes")}
        return cls(**totals, per_op=tuple(OpCost(**row) for row in data["per_op"]), input_shapes=tuple(tuple(shape) for shape in shapes))

    def __str__(self) -> str:
        """A table of the products and the totals."""
        rows = [("module", "op", "MACs", "weight bits", "act. bits", "BOPs")]
        for row in self.per_op:
            bits = (f"{row.weight_bits:.4g}", f"{row.activation_bits:.4g}")
            rows.append((row.name or "(model)", row.op, f"{row.macs:,}", *bits, f"{row.bops:,.0f}"))
        rows.append(("total", "", f"{self.macs:,}", "", "", f"{self.bops:,.0f}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(_align(cell, width, column) for column, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows
        ]
        lines.append(f"{self.params:,} parameters, {self.weight_bytes:,} bytes, for inputs {_shapes(self.input_shapes)}")
        return "\n".join(line.rstrip() for line in lines)


def _has_fields(data: Any, kind: type[Cost | OpCost]) -> bool:
    """Whether `data` is an object with exactly the fields of a record, and of their plain types."""
    types = {"str": (str,), "int": (int,), "float": (int, float)}
    expected = {field.name: types.get(str(field.type), (object,)) for field in fields(kind)}
    if not isinstance(data, Mapping) or sorted(data) != sorted(expected):
        return False
    return all(isinstance(data[name], allowed) and not isinstance(data[name], bool) for name, allowed in expected.items())


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _ratio(mine: float, others: float) -> float:
    if others == 0:
        return 1.0 if mine == 0 else float("inf")
    return mine / others


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)
