"""Run a captured graph on labels: every operator's rule turns the labels of its inputs into those of its outputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from geta.errors import ConfigError
from geta.graph.capture import Capture
from geta.graph.context import INTERNAL, Context, Ledger, Place, concrete, concrete_shape
from geta.graph.decompose import decompose
from geta.graph.labels import LabelSpace, Track, Value, along, never_zero, squeezed
from geta.graph.rules import find_rule
from geta.graph.rules.affine import recognise
from geta.graph.rules.quantizers import special_rules
from geta.graph.rules.registry import operator_name
from geta.graph.solver import Constraints, Freeze

UNUSED = "is never used in forward"
"""Why nothing can be said about a tensor that the capture doesn't read."""


@dataclass(frozen=True)
class Propagation:
    """Labels of every tensor of the graph and what was learnt about them.

    values: `values[node]` is a Value, a list of them, or a number.
    learnt: node -> `Constraints.counts()` when it had been run.
    """

    capture: Capture
    space: LabelSpace
    constraints: Constraints
    ledger: Ledger
    values: Mapping[fx.Node, Any]
    learnt: Mapping[fx.Node, tuple[int, int, int]]


def propagate(capture: Capture, same_tensor: Callable[[str], str], granularity: Callable[[str], str] = lambda _path: "") -> Propagation:
    """Propagate labels through a capture. `same_tensor` maps the names of a tied tensor to one of them.

    granularity: module path -> what one group is to be there, "" = the operator's own choice; see `limits.Limits`.
    The analysis runs on the CPU whatever the default device is: labels are data, not part of the model.
    """
    # The device context sees every call into torch, so it is entered only where it changes something.
    pinned = contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with pinned, torch.no_grad():
        return _Interpreter(capture, same_tensor, granularity).run()


class Replaced:
    """Stands for the result of an operator that was replaced by its decomposition."""


class _Interpreter:
    def __init__(self, capture: Capture, same_tensor: Callable[[str], str], granularity: Callable[[str], str]) -> None:
        self._capture = capture
        self._same = same_tensor
        self._granularity = granularity
        self._space = LabelSpace()
        self._constraints = Constraints()
        self._ledger = Ledger()
        self._values: dict[fx.Node, Any] = {}
        self._learnt: dict[fx.Node, tuple[int, int, int]] = {}
        self._tied: dict[str, Value] = {}
        self._storage: dict[fx.Node, fx.Node] = {}
        self._sharers: dict[fx.Node, list[fx.Node]] = {}
        self._replaced: set[fx.Node] = set()
        self._kernels = _kernels(capture.graph)
        holders = capture.graph.find_nodes(op="placeholder")
        self._used = {same_tensor(capture.tensor_names[node.name]) for node in holders if node.users and node.name in capture.tensor_names}
        self._special = special_rules(recognise(capture.graph))

    def run(self) -> Propagation:
        for node in list(self._capture.graph.nodes):
            if node in self._replaced:
                continue
            if node.op == "placeholder":
                self._values[node] = self._placeholder(node)
            elif node.op == "call_function":
                self._compute(node)
            elif node.op == "output":
                self._output(node)
            self._learnt[node] = self._constraints.counts()
        self._collect_ragged()
        return Propagation(self._capture, self._space, self._constraints, self._ledger, self._values, self._learnt)

    def _placeholder(self, node: fx.Node) -> Any:
        fake = node.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            return concrete(fake)
        shape = concrete_shape(fake)
        name = self._capture.tensor_names.get(node.name)
        if name is None:
            return Value(shape)
        name = self._same(name)
        if name not in self._tied:
            # A constant of the graph can be cut but not zeroed: it is no tensor of the user's model.
            settable = name not in self._capture.constants
            tracks = []
            for dim, size in enumerate(shape):
                if size > 1:
                    labels, owner = self._space.new(size, dim, tensor=name)
                    if node in self._kernels and dim > 1:  # a kernel's height and width never shrink
                        self._constraints.fixed.append((labels.numpy(), f"{INTERNAL}a spatial kernel"))
                        continue
                    tracks.append(Track(along(2 * labels + int(settable), shape, dim), frozenset((owner,) if settable else ())))
            self._tied[name] = Value(shape, tuple(tracks), derived=settable)
        if not node.users and name not in self._used:
            for track in self._tied[name].tracks:
                self._constraints.fixed.append((squeezed(track.labels).reshape(-1).numpy(), UNUSED))
        return self._tied[name]

    def _compute(self, node: fx.Node) -> None:
        result = self._call(node)
        if not isinstance(result, Replaced):
            self._values[node] = result
            self._note_aliases(node)

    def _replace(self, node: fx.Node) -> Replaced | str:
        """Try the operators that this one is made of; whatever has no rule among them gets its own second try."""
        gone = [node, *node.users]
        pieces = decompose(node)
        if isinstance(pieces, str):
            return pieces
        self._replaced.update(gone if isinstance(node.meta["val"], (tuple, list)) else gone[:1])
        for piece in pieces:
            self._compute(piece)
            self._learnt[piece] = self._constraints.counts()
        return Replaced()

    def _call(self, node: fx.Node) -> Any:
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._python(node)
        arguments = bind_arguments(node, self._resolved)
        inputs = [leaf for leaf in pytree.tree_leaves(tuple(arguments.values())) if isinstance(leaf, Value)]
        fake = node.meta.get("val")
        leaves = [leaf for leaf in pytree.tree_leaves(fake) if isinstance(leaf, torch.Tensor)]
        if not leaves:
            if node.target._schema.name == "aten::sym_size" and inputs:
                dim = int(arguments["dim"])
                for track in inputs[0].tracks:
                    reason = f"its size is computed with at {self._capture.module_path(node) or 'the model itself'}"
                    self._constraints.freezes.append(Freeze(track.labels, (dim % inputs[0].rank,), reason))
            else:
                self._unknown(node, inputs, "gives a number that depends on it")
            return pytree.tree_map(concrete, fake)
        labelled = any(value.tracks for value in inputs)
        found = self._special.get(node) or find_rule(node.target)
        result: Any = NotImplemented
        if found is not None and (labelled or not inputs or found.__module__.endswith("factories")):
            path = self._capture.module_path(node)
            shared = (self._constraints, self._ledger)
            context = Context(node, arguments, path, self._space, shared, granularity=self._granularity(path))
            result = _checked(found(context), node, path)
            _follows(context, result)
        if result is NotImplemented:
            if labelled:
                replaced = self._replace(node)
                if isinstance(replaced, Replaced):
                    return replaced
                self._unknown(node, inputs, "has no rule" + (f" and {replaced}" if replaced else ""))
            derived = bool(inputs) and all(value.derived for value in inputs)
            result = pytree.tree_map_only(torch.Tensor, lambda leaf: Value(concrete_shape(leaf), (), derived), fake)
        self._written(node, result)
        return result

    def _resolved(self, arg: Any) -> Any:
        """An argument with values in place of nodes."""
        if isinstance(arg, fx.Node):
            return self._values[arg]
        return [self._resolved(one) for one in arg] if isinstance(arg, (list, tuple)) else arg

    def _unknown(self, node: fx.Node, inputs: list[Value], what: str) -> None:
        """Never guess: whatever reaches an operator without a rule stays."""
        path = self._capture.module_path(node) or "the model itself"
        reason = f"operator {operator_name(node.target).replace('::', '.')} at {path} {what}"
        for value in inputs:
            for track in value.tracks:
                self._constraints.fixed.append((squeezed(track.labels).reshape(-1).numpy(), reason))

    def _python(self, node: fx.Node) -> Any:
        """getitem on tuples of tensors, arithmetic on sizes."""
        source = self._values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if isinstance(source, (tuple, list)):
            return source[node.args[1]]  # type: ignore[index]
        values = [self._values[n] for n in node.all_input_nodes]
        self._unknown(node, [value for value in values if isinstance(value, Value)], "has no rule")
        fake = node.meta.get("val")
        return pytree.tree_map(lambda leaf: Value(concrete_shape(leaf)) if isinstance(leaf, torch.Tensor) else concrete(leaf), fake)

    def _note_aliases(self, node: fx.Node) -> None:
        """Remember which tensors share storage, so that a write is seen by all of them."""
        base = node
        if isinstance(node.target, torch._ops.OpOverload):
            aliased = any(result.alias_info is not None for result in node.target._schema.returns)
            base = self._storage.get(node.all_input_nodes[0], node.all_input_nodes[0]) if aliased and node.all_input_nodes else node
        elif node.all_input_nodes:
            base = self._storage.get(node.all_input_nodes[0], node.all_input_nodes[0])
        self._storage[node] = base
        self._sharers.setdefault(base, [base]).append(node)

    def _written(self, node: fx.Node, result: Any) -> None:
        """After an in-place operator: the written node has the new labels, and nobody who shares its storage is surely zero."""
        assert isinstance(node.target, torch._ops.OpOverload)
        written = _described(node.target)[1]
        given_by_name = bind_arguments(node, lambda arg: arg) if written else {}
        for name in written:
            given = given_by_name.get(name)
            if not isinstance(given, fx.Node):
                continue
            base = self._storage.get(given, given)
            for other in self._sharers.get(base, [base]):
                value = self._values.get(other)
                if isinstance(value, Value):
                    tracks = tuple(Track(never_zero(t.code), t.origins) for t in value.tracks)
                    self._values[other] = Value(value.shape, tracks, False)
            if isinstance(result, Value):
                self._values[given] = result

    def _output(self, node: fx.Node) -> None:
        for leaf in pytree.tree_leaves(pytree.tree_map_only(fx.Node, lambda n: self._values[n], node.args)):
            if isinstance(leaf, Value):
                for track in leaf.tracks:
                    self._constraints.freezes.append(Freeze(track.labels, tuple(range(leaf.rank)), "reaches the model output"))

    def _collect_ragged(self) -> None:
        for value in self._values.values():
            for leaf in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(leaf, Value):
                    self._constraints.ragged += [track.labels for track in leaf.tracks if len(track.dims) > 1]


def _kernels(graph: fx.Graph) -> set[fx.Node]:
    """Placeholders that are the weight of a convolution, as they are or after elementwise operators (a quantizer, a norm)."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not operator_name(node.target).startswith(("aten::conv", "aten::_conv")):
            continue
        waiting = [bind_arguments(node, lambda arg: arg).get("weight")]
        for source in waiting:  # grows while it is walked
            if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor) or source in found:
                continue
            if source.op == "placeholder" and source.meta["val"].dim() > 2:
                found.add(source)
            shape = source.meta["val"].shape
            waiting += [one for one in source.all_input_nodes if getattr(one.meta.get("val"), "shape", None) == shape]
    return found


def _checked(result: Any, node: fx.Node, path: str) -> Any:
    """What a rule returned; ConfigError if it can't be the labels of this operator's results."""
    if result is NotImplemented:
        return result
    fakes, found = pytree.tree_leaves(node.meta["val"]), pytree.tree_leaves(result)
    shapes = [concrete_shape(fake) if isinstance(fake, torch.Tensor) else None for fake in fakes]
    if len(fakes) != len(found) or any(getattr(one, "shape", None) != shape for one, shape in zip(found, shapes, strict=True)):
        shown = [one.shape if isinstance(one, Value) else one for one in found]
        raise ConfigError(
            f"the rule of '{operator_name(node.target)}' returned {shown} for the call at {path or 'the model itself'}, whose results have "
            f"the shapes {shapes}: return one Value per result, or NotImplemented"
        )
    return result


def _follows(context: Context, result: Any) -> None:
    """A tensor given as `out` is written over, so it keeps the indices of the result."""
    target = context.arguments.get("out")
    if isinstance(target, Value) and isinstance(result, Value):
        context.align([Place(target, tuple(range(target.rank))), Place(result, tuple(range(result.rank)))], result.rank)


@functools.cache
def _described(target: torch._ops.OpOverload) -> tuple[list[tuple[str, bool, bool, Any]], list[str]]:
    """(name, whether by keyword only, whether with a default, default) of every argument, and the names of those written to.

    Kept, because a schema makes these objects anew whenever it is asked.
    """
    arguments = target._schema.arguments
    written = [one.name for one in arguments if one.alias_info is not None and one.alias_info.is_write]
    return [(one.name, one.kwarg_only, one.has_default_value(), one.default_value) for one in arguments], written


def bind_arguments(node: fx.Node, resolve: Callable[[Any], Any]) -> dict[str, Any]:
    """An operator call's arguments by name, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for place, (name, by_name, has_default, default) in enumerate(_described(node.target)[0]):
        if place < len(node.args) and not by_name:
            bound[name] = resolve(node.args[place])
        elif name in node.kwargs:
            bound[name] = resolve(node.kwargs[name])
        elif has_default:
            bound[name] = default
    return bound
