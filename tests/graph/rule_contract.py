"""What every operator rule promises, checked by brute force on one tiny network around the operator.

A network is a function of named tensors and inputs that calls ATen operators only. It is recorded call by call (the exporter
would take apart operators that other graphs may hold whole), analysed, and then computed in three ways that must agree:
zeroed (the whole network, removed slices zero), brute (the same Python function on tensors from which the removed indices
were sliced), compact (what `geta.compact` builds). Wherever the analysis says "zero", zeroing must really give zeros.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from geta.errors import GetaError
from geta.graph import DependencyGraph, analyze
from geta.graph.capture import Capture, capture
from geta.graph.dependency import analyse_capture
from geta.graph.labels import Value, squeezed
from geta.graph.rules.registry import operator_name
from geta.subnet import compact
from geta.subnet.comparison import max_difference

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2}
Spec = tuple[int, ...] | Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Case:
    """One way of calling one operator.

    op:      the operator that the recorded graph must hold, "aten::relu".
    fn:      (tensors, *inputs) -> output; sizes come from the tensors, so that it also runs on sliced ones.
    params, buffers, inputs: shapes, or functions that draw them.
    expect:  {"<tensor>.<dim>": how many prunable groups own it, or a part of the reason why none does}.
    exact:   False = the inexact mode: only brute and compact must agree.
    runs:    False = no kernel on this machine: recorded on the meta device, only `expect` is checked.
    """

    op: str
    fn: Callable[..., Any]
    params: Mapping[str, Spec]
    expect: Mapping[str, int | str]
    inputs: tuple[Spec, ...] = ((2, 5, 4),)
    buffers: Mapping[str, Spec] = field(default_factory=dict)
    label: str = ""
    exact: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16)
    runs: bool = True

    @property
    def name(self) -> str:
        return f"{self.op.removeprefix('aten::')} {self.label}".strip()


class Net(nn.Module):
    """A case's function with tensors of its own, as attributes."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        super().__init__()
        self.fn = case.fn
        generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
        for name, spec in case.params.items():
            tensor = draw(spec, generator, dtype)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        for name, spec in case.buffers.items():
            self.register_buffer(name, draw(spec, generator, dtype))
        self.inputs = tuple(draw(spec, generator, dtype) for spec in case.inputs)

    def below(self, place: str, bound: int) -> int:
        """How many of the first `bound` indices of "<tensor>.<dim>" are left: a number that a smaller network must write."""
        return bound

    def forward(self, *inputs: Tensor) -> Any:
        return self.fn(self, *inputs)


class Smaller:
    """The same tensors without some indices: no rewriting, no labels."""

    def __init__(self, net: Net, gone: Mapping[tuple[str, int], list[int]]) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
        self._left: dict[str, Tensor] = {}
        for (name, dim), indices in gone.items():
            kept = torch.ones(self._tensors[name].shape[dim], dtype=torch.bool).index_fill(0, torch.tensor(indices), False)
            self._left[f"{name}.{dim}"] = kept.nonzero().reshape(-1)
        for place, left in self._left.items():
            name, _, dim = place.rpartition(".")
            self._tensors[name] = self._tensors[name].index_select(int(dim), left)

    def __getattr__(self, name: str) -> Tensor:
        return self._tensors[name]

    def below(self, place: str, bound: int) -> int:
        return int((self._left[place] < bound).sum()) if place in self._left else bound


def draw(spec: Spec, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    tensor = spec(generator) if callable(spec) else torch.randn(spec, generator=generator, dtype=torch.float64)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class Recorder(TorchFunctionMode):
    """Writes down every ATen call as it is made."""

    def __init__(self, known: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.names: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []
        for place, (name, tensor) in enumerate(known.items()):
            self._hold(f"p_{place}", tensor)
            self.names[f"p_{place}"] = name
        for place, tensor in enumerate(inputs):
            self._hold(f"x_{place}", tensor)

    def _hold(self, name: str, tensor: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        return self._remember(node, tensor)

    def _remember(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["val"] = value
        self._alive.append(value)  # or another tensor may get its id
        if isinstance(value, Tensor):
            self._nodes[id(value)] = node
        elif isinstance(value, (tuple, list)):
            for place, item in enumerate(value):
                if isinstance(item, Tensor):
                    self._remember(self.graph.call_function(operator.getitem, (node, place)), item)
        return node

    def node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:  # a constant of the function
            name = f"constant_{len(self.constants)}"
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                self._hold(name, tensor)
            self.names[name], self.constants[name] = name, tensor
        return self._nodes[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverloadPacket):
            func = getattr(func, torch._C._jit_resolve_packet(func._qualified_op_name, *args, **kwargs))
        if isinstance(func, torch._ops.OpOverload):
            given = pytree.tree_map_only(Tensor, self.node, (args, kwargs))
            self._remember(self.graph.call_function(func, *given), result)
        elif pytree.tree_any(lambda leaf: isinstance(leaf, Tensor), result):
            raise AssertionError(f"{func} is no ATen operator: write torch.ops.aten calls in cases")
        return result


def record(net: nn.Module, args: tuple[Any, ...], kwargs: Any = None, *, dynamic_shapes: Any = None, train: bool = False) -> Capture:
    """Stands in for `geta.graph.capture.capture`."""
    assert isinstance(net, Net)
    recorder = Recorder({**dict(net.named_parameters()), **dict(net.named_buffers())}, args)
    with torch.no_grad(), recorder:
        result = net(*args)
    recorder.graph.output(pytree.tree_map_only(Tensor, recorder.node, result))
    in_spec, out_spec = pytree.tree_structure((args, {})), pytree.tree_structure(result)
    return Capture(recorder.graph, recorder.names, recorder.constants, in_spec, out_spec, train)


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Within this block every capture of a network is a recording of it."""
    with contextlib.ExitStack() as stack:
        for module in [
            module for name, module in sys.modules.items() if name.startswith("geta.") and vars(module).get("capture") is capture
        ]:
            stack.enter_context(mock.patch.object(module, "capture", record))
        stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)  # it takes milliseconds for a tiny bfloat16 product
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # so does waking a second thread
        yield


def failures(case: Case, *, compacts: bool = True) -> list[str]:
    """What a rule gets wrong in this case, in words; empty if it keeps its contract."""
    net = Net(case, case.dtypes[0])
    if not case.runs:
        net = net.to("meta")
        net.inputs = tuple(tensor.to("meta") for tensor in net.inputs)
    with recorded():
        captured = record(net, net.inputs)
        if case.op not in {operator_name(node.target) for node in captured.graph.nodes}:
            return [f"the graph does not hold {case.op}"]
        graph = analyze(net, net.inputs, exact=case.exact)
        found = [*unexpected(case, graph)]
        if case.runs and graph.prunable_families:
            claims = Claims(net, graph, captured) if case.exact else None
            for dtype in case.dtypes:
                narrow = Net(case, dtype)
                found += computed_differently(case, narrow, graph, dtype, claims if dtype is case.dtypes[0] else None)
            if compacts and not found:
                found += compacted_differently(case, net, graph)
    return found


def unexpected(case: Case, graph: DependencyGraph) -> Iterator[str]:
    """Where the families differ from what the case's author says."""
    for place, wanted in case.expect.items():
        name, _, dim = place.rpartition(".")
        mine = [family for family in graph.families if any(m.param == name and m.dim == int(dim) for m in family.members)]
        count = sum(family.size for family in mine if family.prunable)
        reasons = [family.reason for family in mine if not family.prunable]
        if isinstance(wanted, int) and count != wanted:
            yield f"{place} has {count} prunable groups, not {wanted} ({'; '.join(reasons)})"
        if isinstance(wanted, str) and (count or not reasons or not all(wanted in reason for reason in reasons)):
            yield f"{place} has {count} prunable groups and the reasons {reasons}, not '{wanted}'"


def computed_differently(case: Case, net: Net, graph: DependencyGraph, dtype: torch.dtype, claims: Claims | None) -> Iterator[str]:
    """Where the zeroed network and the one of smaller tensors disagree, or where what is said to be zero is not."""
    for selection in selections(graph, alone=dtype is case.dtypes[0]):
        with zeroed(net, graph, selection if case.exact else {}):
            try:
                whole, brute = flat(net(*copied(net.inputs))), removed(case, net, graph, selection)
            except (RuntimeError, IndexError, ValueError) as error:
                yield f"brute-force removal of {shown(selection)} fails: {str(error).splitlines()[0]}"
                return
            if not all(bool(tensor.isfinite().all()) for tensor in brute):
                yield f"without {shown(selection)} the output is not finite: the case says nothing"
            if case.exact:
                yield from differs("zeroed", whole, "brute", brute, selection, dtype)
            if claims is not None:
                yield from claims.broken(net, selection)


def compacted_differently(case: Case, net: Net, graph: DependencyGraph) -> Iterator[str]:
    """Where the compact model disagrees with the one of smaller tensors."""
    selection = graph.random_selection(0.5, seed=1)
    with zeroed(net, graph, selection if case.exact else {}):
        brute = removed(case, net, graph, selection)
    try:
        small = compact(net, graph, selection, verify=case.exact)
        with torch.no_grad():
            yield from differs("brute", brute, "compact", flat(small(*copied(net.inputs))), selection, case.dtypes[0])
    except (RuntimeError, IndexError, ValueError, GetaError) as error:
        yield f"compact without {shown(selection)} fails: {str(error).splitlines()[0]}"


def selections(graph: DependencyGraph, *, alone: bool) -> Iterator[dict[str, Tensor]]:
    """Random halves of everything; before that, the first and the last group of every family by itself."""
    for family in graph.prunable_families if alone else []:
        for group in (0, family.size - 1):
            yield {family.name: torch.arange(family.size) == group}
    for seed in range(2):
        yield graph.random_selection(0.5, seed=seed)


@contextlib.contextmanager
def zeroed(net: Net, graph: DependencyGraph, selection: Mapping[str, Tensor]) -> Iterator[None]:
    """The network with its removed slices zero; afterwards it is as it was."""
    before = [(tensor, tensor.detach().clone()) for tensor in net.parameters()]
    with torch.no_grad():
        graph.zero_(net, selection)
        yield
        for tensor, value in before:
            tensor.copy_(value)


def removed(case: Case, net: Net, graph: DependencyGraph, selection: Mapping[str, Tensor]) -> list[Tensor]:
    """The output of the same function on tensors without the removed indices."""
    gone: dict[tuple[str, int], list[int]] = {}
    for family in graph.families:
        for member in family.members if family.name in selection else ():
            gone.setdefault((member.param, member.dim), []).extend(member.index[selection[family.name]].reshape(-1).tolist())
    with torch.no_grad():
        return flat(case.fn(Smaller(net, gone), *copied(net.inputs)))


def differs(
    first: str, expected: list[Tensor], second: str, found: list[Tensor], selection: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[str]:
    gap = max_difference(expected, found)[1]
    if not gap <= TOLERANCE[dtype]:
        yield f"without {shown(selection)}, {first} and {second} differ by {gap:.2g}"


class Claims:
    """Which elements of the graph's tensors are said to be zero once groups are removed."""

    def __init__(self, net: Net, graph: DependencyGraph, captured: Capture) -> None:
        self._graph, self._captured = graph, captured
        solved = analyse_capture(net, captured, exact=True)
        self._root, self._space, self._values = solved.partition.root, solved.propagation.space, solved.propagation.values

    def broken(self, zeroed: Net, selection: Mapping[str, Tensor]) -> Iterator[str]:
        """Elements that are said to be zero and are not."""
        removed = np.zeros(len(self._root), dtype=bool)
        asked: dict[int, np.ndarray] = {}
        numbers = {(owner.tensor, owner.dim): number for number, owner in enumerate(self._space.owners) if owner.tensor}
        for family in self._graph.families:
            for member in family.members if family.name in selection else ():
                number = numbers[member.param, member.dim]
                rows = member.index[selection[family.name]].reshape(-1).numpy()
                roots = self._root[self._space.owners[number].start + rows]
                removed[roots] = True
                if member.zero:
                    asked.setdefault(number, np.zeros_like(removed))[roots] = True
        real = self._run(zeroed)
        for node, value in self._values.items():
            for track in value.tracks if isinstance(value, Value) else ():
                gone = removed.copy()
                for owner in track.origins if value.derived else ():  # a tensor that only reads a unit is zero if it is asked to be
                    gone &= asked.get(owner, False)
                small = squeezed(track.code)
                said = torch.from_numpy(gone[self._root[(small >> 1).numpy()]]) & (small & 1).bool()
                if bool((said.expand(real[node].shape) & (real[node] != 0)).any()):
                    yield f"without {shown(selection)}, {node.name} is said to be zero where it is not"

    def _run(self, zeroed: Net) -> dict[fx.Node, Any]:
        state = {**dict(zeroed.named_parameters()), **dict(zeroed.named_buffers()), **self._captured.constants}
        inputs, real = iter(zeroed.inputs), dict[fx.Node, Any]()
        with torch.no_grad():
            for node in self._captured.graph.nodes:
                if node.op == "placeholder":
                    name = self._captured.tensor_names.get(node.name)
                    real[node] = (next(inputs) if name is None else state[name]).detach().clone()
                elif node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda given: real[given])
                    real[node] = node.target(*args, **kwargs)
        return real


def copied(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An in-place operator may write to its input."""
    return tuple(tensor.clone() for tensor in inputs)


def flat(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def shown(selection: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name}{remove.nonzero().reshape(-1).tolist()}" for name, remove in selection.items())
