"""The quantizers of a captured graph: branches attached to parameters and branches inserted between operators.

Source: QADG, GETA (arXiv 2502.16638) section 4, which names both kinds. Deviation: a branch is found by its operators, so quantizers
that others have put in are found too, and coupling passes through them instead of merging their vertices first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import fx

from geta.graph.capture import Capture
from geta.graph.context import concrete_shape
from geta.graph.rules.affine import Written, argument, name_of, recognise, root
from geta.graph.rules.quantizers import AFFINE, OBSERVED

_ONE_OPERATOR = frozenset({"geta::fake_quantize", "geta::lsq_quantize", *AFFINE, *OBSERVED})
_QUANTIZES = ("quantized_decomposed::quantize_", "torchao::quantize_affine")
_DEQUANTIZES = ("quantized_decomposed::dequantize_", "torchao::dequantize_affine", "geta::dequantize")
WRITTEN_OUT = "written out"
"""Operator name of a quantizer that is written in plain arithmetic: round(x / s), clamp, times s."""

Granularity = Literal["tensor", "channel", "token", "group"]


@dataclass(frozen=True)
class QuantizerBranch:
    """One quantizer of a graph.

    kind:        "attached" to a parameter, or "inserted" between two operators.
    tensor:      name of the parameter, "" for an inserted branch.
    module:      module path of the operator; "" for the model itself.
    operator:    such as "geta::fake_quantize"; "written out" for plain arithmetic.
    granularity: what shares one scale: the "tensor", a "channel", a "token" or a "group" of neighbouring entries.
    bits:        width of the codes in bits, where the graph says it; None where it is a trained value.
    """

    kind: Literal["attached", "inserted"]
    tensor: str
    module: str
    operator: str
    granularity: Granularity
    bits: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_branches(capture: Capture) -> tuple[QuantizerBranch, ...]:
    """The quantizers of a capture in the order of its graph; one attached branch per parameter and operator, however often it is read."""
    written = {item.exit: item for item in recognise(capture.graph).written}
    fed = _fed_by_inputs(capture)
    branches: list[QuantizerBranch] = []
    for node in capture.graph.nodes:
        name = name_of(node)
        if node in written:
            branch = _written_branch(capture, written[node], fed)
        elif name in _ONE_OPERATOR or name.startswith(_DEQUANTIZES):
            branch = _branch(capture, node, fed)
        else:
            continue
        if branch.kind == "inserted" or not any(_same(branch, other) for other in branches):
            branches.append(branch)
    return tuple(branches)


def quantizer_nodes(capture: Capture) -> frozenset[fx.Node]:
    """Every operator that is a quantizer or, from the division by its scale to the multiplication with it, a part of one."""
    found: set[fx.Node] = set()
    for node in capture.graph.nodes:
        name = name_of(node)
        if name in _ONE_OPERATOR or name.startswith((*_QUANTIZES, *_DEQUANTIZES)):
            found.add(node)
    for item in recognise(capture.graph).written:
        found.update(_between(item.entry, item.exit))
    return frozenset(found)


def _between(entry: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The operators on the ways from `entry` to `last`, both included."""
    on_the_way = {entry: True}
    waiting = [last]
    while waiting:
        node = waiting[-1]
        sources = [source for source in node.all_input_nodes if source not in on_the_way and source > entry]
        if node in on_the_way or not sources:
            waiting.pop()
            on_the_way.setdefault(node, any(on_the_way.get(source, False) for source in node.all_input_nodes))
        else:
            waiting += sources
    return [node for node, reaches in on_the_way.items() if reaches]


def summary(branches: Sequence[QuantizerBranch]) -> str:
    """One line for people, "" without quantizers."""
    if not branches:
        return ""
    attached = sum(branch.kind == "attached" for branch in branches)
    counts = dict.fromkeys(f"{branch.operator} per {branch.granularity}" for branch in branches)
    parts = [f"{attached} attached to parameters"] if attached else []
    parts += [f"{len(branches) - attached} inserted on activations"] if len(branches) > attached else []
    return f"quantizers: {', '.join(parts)} ({', '.join(counts)})"


def _same(one: QuantizerBranch, other: QuantizerBranch) -> bool:
    return other.kind == "attached" and (one.tensor, one.operator) == (other.tensor, other.operator)


def _fed_by_inputs(capture: Capture) -> set[fx.Node]:
    """Tensors that depend on the user's inputs; sizes don't count."""
    fed: set[fx.Node] = set()
    for node in capture.graph.nodes:
        if node.op == "placeholder" and node.name not in capture.tensor_names:
            fed.add(node)
        elif node.op == "call_function" and not isinstance(node.meta.get("val"), (int, float, torch.SymInt)):
            fed.update([node] if any(source in fed and _is_tensor(source) for source in node.all_input_nodes) else [])
    return fed


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def _branch(capture: Capture, node: fx.Node, fed: set[fx.Node]) -> QuantizerBranch:
    data: Any = node.args[0]
    origin = root(data)
    if isinstance(origin, fx.Node) and name_of(origin).startswith(_QUANTIZES):
        data = origin.args[0]
    bits = argument(node, "bits")
    if bits is None:
        bits = _width(argument(node, "quant_min"), argument(node, "quant_max"))
    place = _place(capture, data, fed)
    scale = argument(node, "scale", "scales", "d")
    return QuantizerBranch(*place, capture.module_path(node), name_of(node), _granularity(node, scale, data, place[0]), bits)


def _written_branch(capture: Capture, item: Written, fed: set[fx.Node]) -> QuantizerBranch:
    place = _place(capture, item.data, fed)
    granularity = _granularity(item.exit, item.scale, item.data, place[0])
    return QuantizerBranch(*place, capture.module_path(item.exit), WRITTEN_OUT, granularity, _width(item.low, item.high))


def _place(capture: Capture, data: fx.Node, fed: set[fx.Node]) -> tuple[Literal["attached", "inserted"], str]:
    """Attached to which parameter, or inserted."""
    if data in fed:
        return "inserted", ""
    seen = [data]
    for node in seen:  # breadth first, data operands before scales
        if node.op == "placeholder" and node.name in capture.tensor_names:
            return "attached", capture.tensor_names[node.name]
        seen += [source for source in node.all_input_nodes if source not in seen]
    return "inserted", ""


def _width(low: Any, high: Any) -> int | None:
    """Bits that hold all codes from low to high."""
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or high <= low:
        return None
    return math.ceil(math.log2(high - low + 1))


def _granularity(node: fx.Node, scale: Any, data: fx.Node, kind: str) -> Granularity:
    """What shares one scale, from the number of scales and the shape of what they scale."""
    name = name_of(node)
    if name.endswith("_group") or (name.startswith("geta::") and argument(node, "blocks")):
        return "group"
    if "per_token" in name:
        return "token"
    fake = scale.meta.get("val") if isinstance(scale, fx.Node) else None
    count = math.prod(concrete_shape(fake)) if isinstance(fake, torch.Tensor) else 1
    shape = concrete_shape(data.meta["val"])
    if count == 1 or "per_tensor" in name:
        return "tensor"
    if kind == "inserted" and count == math.prod(shape[:-1]):
        return "token"
    return "channel" if count in shape else "group"
