"""Answers to "what would removing channel 3 of layer X remove?" and, where it can't go, how that came about."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from geta.errors import ConfigError
from geta.graph.context import INTERNAL
from geta.graph.families import LAYERS, Family, Role
from geta.graph.labels import Value, squeezed
from geta.graph.limits import module_paths, nearest, tensor_names
from geta.graph.names import canonical_name, find_tensor, first_names
from geta.graph.rules.registry import operator_name

if TYPE_CHECKING:
    from geta.graph.dependency import Analysis, DependencyGraph

_SHOWN_STEPS = 9
_SHOWN_RUNS = 6
_SHOWN_SLICES = 24
_SHOWN_MODULES = 8


@dataclass(frozen=True)
class Slice:
    """What goes of one tensor: indices `rows` of dimension `dim`. zero: they have to be zero for the removal to change nothing."""

    tensor: str
    dim: int
    rows: tuple[int, ...]
    role: Role
    zero: bool


@dataclass(frozen=True)
class Explanation:
    """What index `index` of dimension `dim` of `tensor` lives and dies with. Printing it tells it in words.

    family, group: the family and the number of the group in it that the index belongs to; "" and None where there is none
                   (a kernel height, a buffer that nothing couples to a parameter).
    unit, size:    what one group of that family is (plural) and how many it has.
    prunable, reason, inexact, suggestion: as in `Family`.
    slices:        everything that goes with it (or would, if it could go), the tensor itself included.
    parameters:    number of parameter elements in these slices; one that lies in two of them counts once.
    modules:       the other modules that shrink.
    chain:         how it came to stay: from the tensor through the operators that carry the index to the place where the
                   reason arose; empty if it may go, or if the reason has no place.
    """

    tensor: str
    dim: int
    index: int
    family: str
    group: int | None
    unit: str
    size: int
    prunable: bool
    reason: str
    inexact: str
    suggestion: str
    slices: tuple[Slice, ...]
    parameters: int
    modules: tuple[str, ...]
    chain: tuple[str, ...]

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        what = f"'{self.tensor}'" if self.unit == LAYERS else _rows(self.tensor, self.dim, (self.index,))
        lines = []
        if self.prunable and self.unit == LAYERS:
            lines.append(f"Removing {what} leaves the whole residual branch out:")
        elif self.prunable:
            lines.append(f"Removing {what} removes group {self.group} of the {self.size} {self.unit} of '{self.family}':")
        else:
            lines.append(f"{what[0].upper()}{what[1:]} can't be removed: it {self.reason}.")
            if self.chain:
                lines.append(f"how that came about: {' -> '.join(_shortened(self.chain))}")
            if self.suggestion:
                lines.append(f"suggestion: {self.suggestion}")
            lines.append("it would take with it:" if self.family else "it is tied to:")
        for part in self.slices[:_SHOWN_SLICES]:
            lines.append(f"  {_rows(part.tensor, part.dim, part.rows)}{' (has to be zero)' if part.zero else ''}")
        if len(self.slices) > _SHOWN_SLICES:
            lines.append(f"  ... and {len(self.slices) - _SHOWN_SLICES} more")
        shown = ", ".join(self.modules[:_SHOWN_MODULES]) or "none"
        more = f" and {len(self.modules) - _SHOWN_MODULES} more" if len(self.modules) > _SHOWN_MODULES else ""
        lines.append(f"{self.parameters} parameters in all; other modules that shrink: {shown}{more}")
        if self.inexact:
            lines.append(f"the result changes a little, because it {self.inexact}")
        return "\n".join(lines)


def explain(graph: DependencyGraph, name: str, dim: int, index: int) -> Explanation:
    """See `DependencyGraph.explain`."""
    layer = next((family for family in graph.families if family.is_layer and family.name == name), None)
    if layer is not None:
        return _explain_layer(graph, layer, dim, index)
    tensor = _resolve(graph, name)
    shape = tuple(find_tensor(graph.model, tensor).shape)
    if not 0 <= dim < len(shape):
        raise ConfigError(f"'{tensor}' has shape {shape}, so it has no dimension {dim}: dim counts from 0 to {len(shape) - 1}")
    if not 0 <= index < shape[dim]:
        raise ConfigError(f"dimension {dim} of '{tensor}' has size {shape[dim]}: index counts from 0 to {shape[dim] - 1}, got {index}")
    tensor = first_names(graph.model)[tensor]
    found = _find(graph.families, tensor, dim, index)
    if found is None:
        return _outside(graph, tensor, dim, index)
    family, group = found
    slices = tuple(Slice(m.param, m.dim, tuple(m.index[group].tolist()), m.role, m.zero) for m in family.members)
    return Explanation(
        tensor=tensor,
        dim=dim,
        index=index,
        family=family.name,
        group=group,
        unit=family.unit,
        size=family.size,
        prunable=family.prunable,
        reason=family.reason,
        inexact=family.inexact,
        suggestion=family.suggestion,
        slices=slices,
        parameters=_parameters(graph, slices),
        modules=_others(tensor, slices),
        chain=() if family.prunable else _chain(graph, tensor, dim, index),
    )


def _explain_layer(graph: DependencyGraph, family: Family, dim: int, index: int) -> Explanation:
    if (dim, index) != (0, 0):
        raise ConfigError(f"'{family.name}' is one residual branch: ask for dimension 0 and index 0 of it, not for {dim} and {index}")
    makers = {member.param for member in family.members}
    tensors = {name: find_tensor(graph.model, name) for name in family.removes}
    slices = tuple(
        Slice(name, 0, tuple(range(tensor.shape[0])), "producer" if name in makers else "consumer", name in makers)
        for name, tensor in tensors.items()
        if tensor.dim()
    )
    counted, others = _parameters(graph, slices), _others(next(iter(makers), ""), slices)
    what = (family.name, 0, 0, family.name, 0, family.unit, 1, family.prunable, family.reason, "", family.suggestion)
    return Explanation(*what, slices, counted, others, ())


def _resolve(graph: DependencyGraph, name: str) -> str:
    """The tensor that a user's text means."""
    tensors = tensor_names(graph.model)
    asked = canonical_name(name)
    if asked in tensors:
        return asked
    if name not in module_paths(graph.model):
        raise ConfigError(f"'{name}' is no tensor and no module of the model{nearest(name, graph.model)}")
    own = [tensor for tensor in tensors if tensor.rpartition(".")[0] == name]
    weight = f"{name}.weight" if name else "weight"
    if weight in own or len(own) == 1:
        return weight if weight in own else own[0]
    inside = own or [tensor for tensor in tensors if tensor.startswith(f"{name}.")]
    shown = ", ".join(inside[:6]) + (", ..." if len(inside) > 6 else "")
    raise ConfigError(f"module '{name}' has no weight of its own; name a tensor{f': {shown}' if inside else ', it has none'}")


def _find(families: Iterable[Family], tensor: str, dim: int, index: int) -> tuple[Family, int] | None:
    for family in families:
        for member in family.members if not family.is_layer else ():
            if (member.param, member.dim) == (tensor, dim):
                places = (member.index == index).nonzero()
                if len(places):
                    return family, int(places[0, 0])
    return None


def _outside(graph: DependencyGraph, tensor: str, dim: int, index: int) -> Explanation:
    """An index that belongs to no family."""
    reason = "belongs to a tensor that the captured graph does not read"
    slices: tuple[Slice, ...] = (Slice(tensor, dim, (index,), "consumer", False),)
    chain: tuple[str, ...] = ()
    if find_tensor(graph.model, tensor).shape[dim] == 1:
        reason = "is the only index of that dimension: removing it would remove the whole tensor"
    else:
        root = _root(graph.analysis, tensor, dim, index)
        if root is not None:
            reason = graph.analysis.partition.frozen.get(root, "is coupled to no parameter")
            reason = f"belongs to {reason.removeprefix(INTERNAL)}" if reason.startswith(INTERNAL) else reason
            slices = tuple(_slices_of(graph, root))
            chain = _chain(graph, tensor, dim, index)
    counted, others = _parameters(graph, slices), _others(tensor, slices)
    return Explanation(tensor, dim, index, "", None, "", 0, False, reason, "", "", slices, counted, others, chain)


def _slices_of(graph: DependencyGraph, root: int) -> Iterator[Slice]:
    analysis = graph.analysis
    buffers = {canonical_name(name) for name, _ in graph.model.named_buffers(remove_duplicate=False)}
    for owner in analysis.propagation.space.owners:
        rows = np.flatnonzero(analysis.partition.root[owner.start : owner.start + owner.size] == root)
        if owner.tensor and len(rows):
            yield Slice(owner.tensor, owner.dim, tuple(rows.tolist()), "buffer" if owner.tensor in buffers else "consumer", False)


def _parameters(graph: DependencyGraph, slices: Iterable[Slice]) -> int:
    """Parameter elements in the union of the slices: size - product over dimensions of what stays."""
    parameters = {canonical_name(name) for name, _ in graph.model.named_parameters(remove_duplicate=False)}
    gone: dict[str, dict[int, int]] = {}
    for part in slices:
        if part.tensor in parameters:
            gone.setdefault(part.tensor, {})[part.dim] = len(part.rows)
    total = 0
    for name, dims in gone.items():
        shape = find_tensor(graph.model, name).shape
        total += math.prod(shape) - math.prod(size - dims.get(dim, 0) for dim, size in enumerate(shape))
    return total


def _others(tensor: str, slices: Iterable[Slice]) -> tuple[str, ...]:
    own = tensor.rpartition(".")[0]
    modules = dict.fromkeys(part.tensor.rpartition(".")[0] or part.tensor for part in slices)
    return tuple(module for module in modules if module not in (own, tensor))


def _root(analysis: Analysis, tensor: str, dim: int, index: int) -> int | None:
    for owner in analysis.propagation.space.owners:
        if (owner.tensor, owner.dim) == (tensor, dim):
            return int(analysis.partition.root[owner.start + index])
    return None


def _chain(graph: DependencyGraph, tensor: str, dim: int, index: int) -> tuple[str, ...]:
    """The shortest way through operators that see the class, from the tensor to where the reason arose."""
    analysis = graph.analysis
    root = _root(analysis, tensor, dim, index)
    reason = None if root is None else analysis.partition.frozen.get(root)
    if root is None or reason is None:
        return ()
    trail = _Trail(analysis, root, first_names(graph.model))
    goals = trail.goals(reason)
    queue = trail.placeholders(tensor)
    came_from: dict[fx.Node, fx.Node | None] = dict.fromkeys(queue)
    for node in queue:
        if node in goals:
            return trail.words(node, came_from)
        for other in trail.neighbours(node):
            if other not in came_from:
                came_from[other] = node
                queue.append(other)
    return ()


class _Trail:
    """Where one class of labels shows in a graph: tensors that carry it, operators that see it, places that make it stay."""

    def __init__(self, analysis: Analysis, root: int, first: Mapping[str, str]) -> None:
        self._found, self._of, self._root = analysis.propagation, analysis.partition.root, root
        self._carriers = {node for node, value in self._found.values.items() if self._carries(value)}
        names = analysis.capture.tensor_names
        self._tensors = {
            node: first.get(names[node.name], names[node.name])
            for node in self._found.values
            if node.op == "placeholder" and node.name in names
        }

    def placeholders(self, tensor: str) -> list[fx.Node]:
        return [node for node, name in self._tensors.items() if name == tensor]

    def neighbours(self, node: fx.Node) -> list[fx.Node]:
        inputs = [other for other in node.all_input_nodes if other in self._carriers]
        return [*inputs, *(node.users if node in self._carriers else ())]

    def goals(self, reason: str) -> set[fx.Node]:
        """The nodes whose operator gave this reason for this class to stay; for a protected tensor, the tensor."""
        known, found = self._found.constraints, set()
        before = (0, 0, 0)
        for node, counts in self._found.learnt.items():
            freezes, fixed, aligned = (slice(first, last) for first, last in zip(before, counts, strict=True))
            before = counts
            if (
                any(item.reason == reason and self._has(item.labels) for item in known.freezes[freezes])
                or any(text == reason and self._has(labels) for labels, text in known.fixed[fixed])
                or any(item.reason == reason and any(self._has(labels) for _, labels in item.tracks) for item in known.aligned[aligned])
            ):
                found.add(node)
        for labels, text in known.wishes:
            if text == reason and self._has(labels):
                owner = next(owner for owner in self._found.space.owners if owner.start <= labels[0] < owner.start + owner.size)
                found.update(self.placeholders(owner.tensor))
        return found

    def words(self, node: fx.Node | None, came_from: Mapping[fx.Node, fx.Node | None]) -> tuple[str, ...]:
        """The way to `node`, from its start, one text per operator."""
        steps: list[str] = []
        while node is not None:
            step = self._word(node)
            if step and step not in steps[-1:]:
                steps.append(step)
            node = came_from[node]
        return tuple(reversed(steps))

    def _word(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return self._tensors.get(node, "a model input")
        if node.op == "output":
            return "the model's output"
        if not isinstance(node.target, torch._ops.OpOverload):
            return ""
        return f"{operator_name(node.target).rpartition('::')[2]} at {self._found.capture.module_path(node) or 'the model itself'}"

    def _carries(self, value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return any(self._carries(item) for item in value)
        return isinstance(value, Value) and any(self._has(track.labels) for track in value.tracks)

    def _has(self, labels: torch.Tensor | np.ndarray) -> bool:
        flat = squeezed(labels).numpy() if isinstance(labels, torch.Tensor) else labels
        return bool((self._of[flat] == self._root).any())


def _rows(tensor: str, dim: int, rows: tuple[int, ...]) -> str:
    """e.g. "rows 0-7 of q_proj.weight", "index 1 of dimension 2 of conv.weight"."""
    runs: list[list[int]] = []
    for row in sorted(rows):
        if runs and row == runs[-1][1] + 1:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    listed = ", ".join(shown) if len(shown) <= _SHOWN_RUNS else f"{', '.join(shown[:_SHOWN_RUNS])} ... ({len(rows)} in all)"
    word, plural = (("row", "rows"), ("column", "columns"), ("index", "indices"))[min(dim, 2)]
    return f"{word if len(rows) == 1 else plural} {listed} of {f'dimension {dim} of ' if dim > 1 else ''}{tensor}"


def _shortened(steps: tuple[str, ...]) -> tuple[str, ...]:
    if len(steps) <= _SHOWN_STEPS:
        return steps
    return (*steps[: _SHOWN_STEPS - 4], f"({len(steps) - _SHOWN_STEPS + 1} more)", *steps[-3:])
