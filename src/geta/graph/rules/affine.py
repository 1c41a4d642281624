"""Quantizers that a model writes out in plain arithmetic (torchao's QAT modules do, and so do many users):

    q = clamp(round(x / s) + z, low, high);   y = (q - z) * s

Operator by operator this looks as if zeros were lost (`+ z`) and as if the scale were a weight like any other (`* s`). Seen as a
whole, x = 0 gives y = 0: round(0) + z = z, which the clamp leaves alone because a zero point is one of the quantized values
(low <= z <= high), and z - z = 0. The scale and the zero point only follow their channel; they are never zeroed.

A scale that is computed from the tensor itself stays the same without the removed entries, if these are zero and the range
spans zero anyway: amax(|x|), or min(amin(x), 0) and max(amax(x), 0).
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from geta.graph.rules.registry import operator_name

Root = fx.Node | float
_MOVES = frozenset(
    f"aten::{name}"
    for name in (
        "view reshape _unsafe_view expand expand_as unsqueeze squeeze flatten unflatten permute transpose t view_as reshape_as to _to_copy "
        "type_as clone contiguous detach alias broadcast_to"
    ).split()
)
_ROUNDS = frozenset({"aten::round", "aten::floor", "aten::ceil", "aten::trunc"})
_CLAMPS = frozenset({"aten::clamp", "aten::clip", "aten::hardtanh"})
_NEVER_NEGATIVE = frozenset(f"aten::{name}" for name in "abs relu square sigmoid exp relu6 softplus".split())
_LARGEST = frozenset({"aten::amax", "aten::max"})
_SMALLEST = frozenset({"aten::amin", "aten::min"})
QPARAMS = frozenset(
    {
        "torchao::choose_qparams_affine",
        "quantized_decomposed::choose_qparams",
        "quantized_decomposed::choose_qparams_symmetric",
        "quantized_decomposed::choose_qparams_per_token",
        "quantized_decomposed::choose_qparams_per_token_asymmetric",
        "quantized_decomposed::_choose_qparams_per_token_asymmetric_impl",
    }
)
"""Operators that compute (scale, zero point) from a tensor, with a range that spans zero and a zero point within the codes."""


@dataclass(frozen=True)
class Written:
    """One written-out quantizer: what it quantizes, by what, and where the result is.

    scale, zero: the node (or number) they come from; zero is None for a symmetric quantizer.
    low, high:   the codes that the clamp allows, None without a clamp.
    entry, exit: the operators that divide by the scale and multiply with it again.
    """

    data: fx.Node
    scale: Root
    zero: Root | None
    low: float | None
    high: float | None
    entry: fx.Node
    exit: fx.Node


@dataclass
class Recognised:
    """What the arithmetic of a graph turned out to be.

    written: quantizers, in the order of the graph.
    scaled:  node -> place of its data argument; the other argument is a quantizer's scale.
    shifted: node -> places of its data arguments; it works on codes, whose zero is the zero point.
    inverses: reciprocals of stored scales, which are never zeroed, so that they stay finite.
    ranges:  reductions whose result does not change when zeros are left out.
    """

    written: list[Written] = field(default_factory=list)
    scaled: dict[fx.Node, int] = field(default_factory=dict)
    shifted: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    inverses: list[fx.Node] = field(default_factory=list)
    ranges: list[fx.Node] = field(default_factory=list)


def name_of(node: Any) -> str:
    """An operator's name; "" for what is no operator call."""
    return operator_name(node.target) if isinstance(node, fx.Node) and isinstance(node.target, torch._ops.OpOverload) else ""


def recognise(graph: fx.Graph) -> Recognised:
    """Find the quantizers written out in a graph and the ranges that they are computed from."""
    found = Recognised()
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        name = name_of(node)
        if name in _ROUNDS:
            _note_quantizer(found, node, order)
        elif name in _LARGEST | _SMALLEST | {"aten::aminmax"} and _spans_zero(node):
            found.ranges.append(node)
    return found


def argument(node: fx.Node, *names: str) -> Any:
    """The first of these arguments that an operator has and was given; else None."""
    known = [schema.name for schema in node.target._schema.arguments]  # type: ignore[union-attr]
    for name in names:
        if name in known:
            place = known.index(name)
            given = node.args[place] if place < len(node.args) else node.kwargs.get(name)
            if given is not None:
                return given
    return None


def root(value: Any, *, through: Callable[[fx.Node], fx.Node | None] | None = None) -> Root | None:
    """Where a scale or zero point comes from: back through moves and casts."""
    while isinstance(value, fx.Node):
        step = _moved(value) or (through(value) if through else None)
        if step is None:
            return value
        value = step
    return float(value) if isinstance(value, (int, float)) else None


def users_beyond_moves(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(user, the operand it sees) for every use of a tensor, moves and casts passed over."""
    for user in node.users:
        if _moved(user) is node:
            yield from users_beyond_moves(user)
        else:
            yield user, node


def _moved(node: fx.Node) -> fx.Node | None:
    """What a move or a cast moves."""
    if name_of(node) in _MOVES and node.args and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def _inverse(node: fx.Node) -> fx.Node | None:
    """1 / s, also written reciprocal(s) * 1.0."""
    name, args = name_of(node), node.args
    if name == "aten::reciprocal" and isinstance(args[0], fx.Node):
        return args[0]
    if name == "aten::mul" and isinstance(args[0], fx.Node) and args[1] == 1.0:
        return args[0]
    return None


def _inverses(value: Any) -> list[fx.Node]:
    """The reciprocals on the way from a stored scale to where it is multiplied with."""
    passed = []
    while isinstance(value, fx.Node) and (step := _moved(value) or _inverse(value)) is not None:
        passed += [value] if name_of(value) == "aten::reciprocal" else []
        value = step
    return passed if isinstance(value, fx.Node) and value.op == "placeholder" else []


def _entries(node: fx.Node) -> Iterator[tuple[int, Root]]:
    """Ways to read an operator as "data divided by a scale": (place of the data, where the scale comes from)."""
    if len(node.args) < 2:
        return
    first, second = node.args[:2]
    if name_of(node) in ("aten::div", "aten::true_divide"):
        found = root(second)
        if found is not None:
            yield 0, found
    elif name_of(node) == "aten::mul":
        for place, scale in ((0, second), (1, first)):
            origin = root(scale)
            inverse = root(scale, through=_inverse)
            if inverse is not None and inverse != origin:
                yield place, inverse


def _note_quantizer(found: Recognised, node: fx.Node, order: Mapping[fx.Node, int]) -> None:
    """Take down the quantizer around a rounding, if there is one."""
    step: Any = node.args[0]
    while isinstance(step, fx.Node) and (name_of(step) in _CLAMPS | {"aten::add"} or _moved(step) is not None):
        step = step.args[0]
    if not isinstance(step, fx.Node) or step in found.scaled:
        return
    for place, scale in _entries(step):
        region = _Region(step, order)
        exit_node = region.find_exit(scale)
        data = step.args[place]
        if exit_node is None or node not in region.shift or not isinstance(data, fx.Node):
            continue
        zero = next((zero for zero in region.zeros), None)
        found.written.append(Written(data, scale, zero, *region.bounds, step, exit_node))
        found.scaled[step] = place
        found.scaled[exit_node] = 0 if exit_node.args[0] in region.shift else 1
        found.inverses += _inverses(step.args[1 - place])
        found.shifted.update({inner: region.data_places(inner) for inner in region.moved_by_zero})
        return


class _Region:
    """The operators between `x / s` and `* s`. `shift[node]` = k: where x is zero, the node's value is k * z."""

    def __init__(self, entry: fx.Node, order: Mapping[fx.Node, int]) -> None:
        self.shift: dict[fx.Node, int] = {entry: 0}
        self.moved_by_zero: list[fx.Node] = []
        self.zeros: list[Root] = []
        self.bounds: tuple[float | None, float | None] = (None, None)
        pending = [(order[user], user) for user in entry.users]
        heapq.heapify(pending)  # in the order of the graph, so that all operands of an operator have been looked at before it
        while pending:
            _, node = heapq.heappop(pending)
            if node not in self.shift and self._joins(node):
                for user in node.users:
                    heapq.heappush(pending, (order[user], user))

    def _joins(self, node: fx.Node) -> bool:
        name = name_of(node)
        if name in _ROUNDS or _moved(node) in self.shift:
            inner = node.args[0]
            if inner not in self.shift or (self.shift[inner] and not self._stays_whole(node)):  # type: ignore[index]
                return False
            self.shift[node] = self.shift[inner]  # type: ignore[index]
            return True
        if name in _CLAMPS:
            return self._clamp(node)
        if name in ("aten::add", "aten::sub") and not node.kwargs:
            return self._add(node, 1 if name == "aten::add" else -1)
        return False

    def _stays_whole(self, node: fx.Node) -> bool:
        """Rounding or casting a zero point to integers leaves it alone only if it is an integer."""
        rounds = name_of(node) in _ROUNDS or not node.meta["val"].is_floating_point()
        return not rounds or all(_whole(zero) for zero in self.zeros)

    def _clamp(self, node: fx.Node) -> bool:
        inner, bounds = node.args[0], _bounds(node)
        if inner not in self.shift or bounds is None:
            return False
        low, high = bounds
        shift = self.shift[inner]  # type: ignore[index]
        inside = low <= 0 <= high if shift == 0 else shift == 1 and all(_within(zero, low, high) for zero in self.zeros)
        if not inside:
            return False
        self.bounds = (low, high)
        self.shift[node] = shift
        if shift:
            self.moved_by_zero.append(node)
        return True

    def _add(self, node: fx.Node, sign: int) -> bool:
        left, right = node.args[:2]
        if left in self.shift and right in self.shift:
            self.shift[node] = self.shift[left] + sign * self.shift[right]  # type: ignore[index]
        elif left in self.shift or (right in self.shift and sign == 1):
            inner, other = (left, right) if left in self.shift else (right, left)
            zero = root(other)
            if zero is None or (self.zeros and self.zeros[0] != zero):
                return False
            self.zeros = [zero]
            self.shift[node] = self.shift[inner] + sign  # type: ignore[index]
        else:
            return False
        if any(self.shift.get(side) for side in (left, right, node) if isinstance(side, fx.Node)):
            self.moved_by_zero.append(node)
        return True

    def data_places(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(place for place, argument in enumerate(node.args[:2]) if argument in self.shift)

    def find_exit(self, scale: Root) -> fx.Node | None:
        """The multiplication with the same scale; None when codes also leave in another way, where their zero would be lost."""
        exits = []
        for node, shift in self.shift.items():
            for user in node.users:
                if user in self.shift:
                    continue
                if shift:
                    return None
                if name_of(user) == "aten::mul" and any(root(side) == scale for side in user.args[:2] if side is not node):
                    exits.append(user)
        return exits[0] if len(exits) == 1 else None


def _within(zero: Root, low: float, high: float) -> bool:
    """Whether a zero point is one of the codes; a stored integer is by its nature, a trained float need not be."""
    if isinstance(zero, float):
        return low <= zero <= high
    if zero.target is operator.getitem:
        source = zero.args[0]
        bounds = qparams_bounds(source) if isinstance(source, fx.Node) else None
        return bounds is not None and low <= bounds[0] and bounds[1] <= high
    if name_of(zero) in _CLAMPS:
        bounds = _bounds(zero)
        return bounds is not None and low <= bounds[0] and bounds[1] <= high
    return zero.op == "placeholder" and not zero.meta["val"].is_floating_point()


def _whole(zero: Root) -> bool:
    """Whether a zero point is an integer for sure."""
    if isinstance(zero, float):
        return zero.is_integer()
    if not zero.meta["val"].is_floating_point():
        return True
    if zero.target is operator.getitem:
        return name_of(zero.args[0]) in QPARAMS
    step: Any = zero
    while name_of(step) in _CLAMPS | {"aten::add", "aten::sub", "aten::rsub"}:
        if not all(float(number).is_integer() for number in step.args[1:] if isinstance(number, (int, float))):
            return False
        nodes = [side for side in step.args if isinstance(side, fx.Node)]
        step = nodes[0] if len(nodes) == 1 else None
    return name_of(step) in _ROUNDS


def _bounds(node: fx.Node) -> tuple[float, float] | None:
    """Both bounds of a clamp when they are numbers."""
    low, high = argument(node, "min", "min_val"), argument(node, "max", "max_val")
    return (float(low), float(high)) if isinstance(low, (int, float)) and isinstance(high, (int, float)) else None


def qparams_bounds(node: fx.Node) -> tuple[float, float] | None:
    """The codes between which an operator that computes quantization parameters puts its zero point."""
    name = name_of(node)
    if name not in QPARAMS:
        return None
    if "per_token" in name:
        return -128.0, 127.0
    low, high = argument(node, "quant_min"), argument(node, "quant_max")
    return (float(low), float(high)) if isinstance(low, (int, float)) and isinstance(high, (int, float)) else None


def _spans_zero(node: fx.Node) -> bool:
    """Whether leaving zeros out of a minimum or maximum changes nothing that its users see."""
    name = name_of(node)
    if len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        return False  # max(a, b) is elementwise
    if name in _LARGEST and name_of(node.args[0]) in _NEVER_NEGATIVE and _values_only(node):
        return True
    if name == "aten::aminmax":
        return all(user.target is operator.getitem and _clamped(user, largest=bool(user.args[1])) for user in node.users)
    if not _values_only(node):
        return False
    results = [node] if not isinstance(node.meta.get("val"), (tuple, list)) else list(node.users)
    return all(_clamped(result, largest=name in _LARGEST) for result in results)


def _values_only(node: fx.Node) -> bool:
    """max(dim) also says where the largest entry is, and that does change."""
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return True
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def _clamped(node: fx.Node, *, largest: bool) -> bool:
    """Whether every use first takes the maximum (minimum) with zero."""
    return bool(node.users) and all(_clamps_at_zero(user, seen, largest=largest) for user, seen in users_beyond_moves(node))


def _clamps_at_zero(user: fx.Node, seen: fx.Node, *, largest: bool) -> bool:
    name = name_of(user)
    if name in _CLAMPS | {"aten::clamp_min", "aten::clamp_max"}:
        bound = argument(user, "min", "min_val") if largest else argument(user, "max", "max_val")
        return isinstance(bound, (int, float)) and (bound >= 0 if largest else bound <= 0)
    twins = {"aten::maximum", "aten::max", "aten::fmax"} if largest else {"aten::minimum", "aten::min", "aten::fmin"}
    if name in twins and len(user.args) > 1:
        other = user.args[1] if user.args[0] is seen else user.args[0]
        return name_of(other) in ("aten::zeros_like", "aten::zeros", "aten::new_zeros")
    return False
