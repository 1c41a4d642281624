"""Residual branches of a captured graph: `x + f(x)`, where `f` can go as a whole because its last layer can be zero.

A *branch* is an operand of an addition that is computed by at least one layer (a contraction with a parameter) from the stream, the
tensor that goes on beside it. What has to be zero for it to be exactly zero is found by `geta.graph.zeros`, backwards from the
addition: usually weight and bias of its last layer, behind a normalisation that one's scale and shift. These are its *makers*. A
branch can go if nothing else reads its makers, or what is zero with them: then the model with zero makers computes what the model
without the branch computes.

Two branches that are added to each other first (attention and MLP in parallel) are two if they share no layer, else they are one
(a layer and its low-rank adapter). A shortcut with a layer of its own (a projection) is no stream, so a block with one isn't listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from geta.graph.aliases import memory_of, written_by
from geta.graph.capture import Capture
from geta.graph.context import concrete_shape
from geta.graph.families import LAYERS, Family, Member
from geta.graph.gates import layer_below
from geta.graph.names import find_tensor, first_names
from geta.graph.rules.registry import operator_name
from geta.graph.zeros import has_pole, is_contraction, is_tensor, law

_ADDITIONS = ("aten::add", "aten::add_")
_PRODUCT = "is a product of two activations"
"""Such as attention scores, to which a mask or a bias is added: no branch, and not listed."""


@dataclass(frozen=True)
class ResidualBranch:
    """One branch of one capture.

    path:   innermost module around its layers; "" for the model itself.
    sums:   additions that it takes part in, from the inside to the stream's; `value`: the operand that is it.
    makers: parameters that are zero when it is removed, weights first; empty where it can't be.
    tensors: parameters and buffers that nobody reads any more once it is gone (the makers among them).
    reason: why it can't be removed, or "".
    """

    path: str
    value: fx.Node
    sums: tuple[fx.Node, ...]
    makers: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    reason: str = ""


def find_residual_branches(captured: Capture, model: nn.Module) -> tuple[ResidualBranch, ...]:
    """All branches of a capture, in the order of the graph."""
    return _Finder(captured, model).run()


def layer_families(branches: Sequence[ResidualBranch], model: nn.Module, protected: Callable[[str], str]) -> list[Family]:
    """One family of one group for each branch. protected: tensor -> why it has to stay, or ""."""
    seen: dict[str, int] = {}
    families = []
    for branch in branches:
        name = f"{branch.path or 'the model itself'} (layer)"
        count = seen[name] = seen.get(name, 0) + 1
        name = name if count == 1 else f"{name}#{count}"
        reason = branch.reason or next(filter(None, map(protected, branch.tensors)), "")
        sizes = {maker: find_tensor(model, maker).shape[0] for maker in branch.makers}
        members = tuple(Member(maker, 0, torch.arange(size, device="cpu")[None], "producer", True) for maker, size in sizes.items())
        families.append(Family(name, LAYERS, 1, not reason, reason, members, removes=branch.tensors))
    return families


def branch_of(branches: Iterable[ResidualBranch], family: Family) -> ResidualBranch | None:
    """The branch of this capture that has the family's makers; None where there is none (any more)."""
    makers = {member.param for member in family.members}
    return next((branch for branch in branches if not branch.reason and set(branch.makers) == makers), None)


def dead_without(captured: Capture, gone: Sequence[ResidualBranch]) -> set[fx.Node]:
    """The nodes that nobody needs any more once these branches are gone, of those that somebody needs now.

    What counts the calls of a batch normalization that goes (it writes into a buffer that nobody else reads) goes with it.
    """
    graph = captured.graph
    dead = set(_needed(graph, {})) - set(_needed(graph, replacements(gone)))
    norms = {captured.module_path(node) for node in dead if operator_name(node.target) == "aten::batch_norm"}
    for node in graph.nodes if norms else ():
        written = written_by(node)
        alone = all(one.op == "placeholder" and set(one.users) == {node} for one in written)
        if written and alone and not node.users and captured.module_path(node) in norms:
            dead.update((node, *written))
    return dead


def replacements(gone: Sequence[ResidualBranch]) -> dict[fx.Node, fx.Node | None]:
    """What stands for an addition without these branches: its other operand; None where both are zero."""
    found: dict[fx.Node, fx.Node | None] = {}
    zero = {branch.value for branch in gone}
    for total in sorted({total for branch in gone for total in branch.sums}):
        left = [operand for operand in total.args[:2] if operand not in zero]
        if not left:
            zero.add(total)
            found[total] = None
        elif len(left) == 1:
            assert isinstance(left[0], fx.Node)
            found[total] = left[0]
    return found


def needed_without(captured: Capture, replaced: Mapping[fx.Node, fx.Node | None]) -> dict[fx.Node, None]:
    """Everything that the output needs when other nodes stand for some (`replacements`)."""
    return _needed(captured.graph, replaced)


def _needed(graph: fx.Graph, replaced: Mapping[fx.Node, fx.Node | None]) -> dict[fx.Node, None]:
    """Everything that the output needs, placeholders included; operators that only write (counters) are looked at by who reads them."""
    needed: dict[fx.Node, None] = {}
    for node in reversed(graph.nodes):
        if node.op != "output" and node not in needed:
            continue
        needed[node] = None
        instead = replaced.get(node)
        needed.update(dict.fromkeys(node.all_input_nodes if node not in replaced else [instead] if instead is not None else []))
    return needed


@dataclass(frozen=True)
class _Zeros:
    """How a tensor comes to be zero: the parameters, and all nodes that are zero on the way."""

    makers: frozenset[str] = frozenset()
    nodes: frozenset[fx.Node] = frozenset()


@dataclass
class _Finder:
    captured: Capture
    model: nn.Module
    found: list[ResidualBranch] = field(default_factory=list)

    def run(self) -> tuple[ResidualBranch, ...]:
        graph = self.captured.graph
        first = first_names(self.model)
        parameters = {id(parameter) for parameter in self.model.parameters()}
        self.names: dict[fx.Node, str] = {}
        self.is_parameter: set[fx.Node] = set()
        for node in graph.find_nodes(op="placeholder"):
            name = self.captured.tensor_names.get(node.name)
            if name is not None:
                self.names[node] = first.get(name, name)
                if name not in self.captured.constants and id(find_tensor(self.model, name)) in parameters:
                    self.is_parameter.add(node)
        self.place = {node: place for place, node in enumerate(graph.nodes)}
        self.above: dict[fx.Node, int] = {}  # bit i: tensor number i is needed to compute this one
        self.fed: set[fx.Node] = set()
        for node in self.place:
            above = 0
            for source in node.all_input_nodes if is_tensor(node) else ():
                if source in self.above:
                    above |= self.above[source] | 1 << self.place[source]
            self.above[node] = above
            if (node.op == "placeholder" and node not in self.names) or any(s in self.fed and is_tensor(s) for s in node.all_input_nodes):
                self.fed.add(node)
        self.writes = self._writes()
        self.layers = [node for node in graph.nodes if is_contraction(node) and self._reads_parameter(node)]
        self.layer_bits = sum(1 << self.place[node] for node in self.layers)
        for node in graph.nodes:
            if operator_name(node.target) in _ADDITIONS:
                self._addition(node)
        return tuple(self.found)

    # ---- where branches are ------------------------------------------------------------------------------------

    def _addition(self, total: fx.Node) -> None:
        pair = total.args[:2]
        if not all(isinstance(operand, fx.Node) and is_tensor(operand) and operand in self.fed for operand in pair) or pair[0] is pair[1]:
            return
        for value, other in (pair, pair[::-1]):
            assert isinstance(value, fx.Node)
            assert isinstance(other, fx.Node)
            stream = self._stream(other, value)
            if stream is None or not _same_shape(other, total) or not self._between(stream, value):
                continue
            whole = _same_dtype(other, total) and (other is pair[0] or total.kwargs.get("alpha", 1) == 1)
            self._split(
                value, stream, (total,), "" if whole else f"changes the type or scale of what it is added to at {self._where(total)}"
            )
            return

    def _split(self, value: fx.Node, stream: fx.Node, sums: tuple[fx.Node, ...], reason: str) -> None:
        """Take the parts of a sum one by one where they are layers of their own."""
        parts = value.args[:2] if operator_name(value.target) in _ADDITIONS and len(value.users) == 1 else ()
        nodes = [part for part in parts if isinstance(part, fx.Node) and part in self.fed and self._between(stream, part)]
        if len(nodes) == 2 and nodes[0] is not nodes[1] and value.kwargs.get("alpha", 1) == 1:
            shared = self._between(stream, nodes[0]) & self._between(stream, nodes[1])
            if not shared and all(_same_shape(node, value) and _same_dtype(node, value) for node in nodes):
                for node in nodes:
                    self._split(node, stream, (value, *sums), reason)
                return
        branch = self._branch(value, stream, sums, reason)
        if branch.reason != _PRODUCT:
            self.found.append(branch)

    def _stream(self, other: fx.Node, value: fx.Node) -> fx.Node | None:
        """The last tensor on the way to `other`, without a layer on it, from which `value` is computed as well."""
        while True:
            if self.above[value] >> self.place[other] & 1:
                return other
            sources = [node for node in other.all_input_nodes if node in self.fed and is_tensor(node)]
            if operator_name(other.target) in _ADDITIONS and len(sources) == 2:
                sources = [one for one, rest in (sources, sources[::-1]) if self._stream_of_sum(one, rest)][:1]
            if len(sources) != 1 or other.op != "call_function" or other in self.layers:
                return None
            other = sources[0]

    def _stream_of_sum(self, one: fx.Node, rest: fx.Node) -> bool:
        """Whether `rest` is computed from `one`, so that `one` is what goes on."""
        return bool(self.above[rest] >> self.place[one] & 1)

    def _between(self, stream: fx.Node, value: fx.Node) -> int:
        """Layers on the way from the stream to a tensor, as bits."""
        candidates = (self.above[value] | 1 << self.place[value]) & self.layer_bits
        own = self.place[stream]
        return sum(1 << self.place[n] for n in self.layers if candidates >> self.place[n] & 1 and self.above[n] >> own & 1)

    def _reads_parameter(self, node: fx.Node) -> bool:
        return any(is_tensor(source) and source not in self.fed for source in node.all_input_nodes)

    # ---- what has to be zero -----------------------------------------------------------------------------------

    def _branch(self, value: fx.Node, stream: fx.Node, sums: tuple[fx.Node, ...], reason: str) -> ResidualBranch:
        bits = self._between(stream, value)
        layers = [node for node in self.layers if bits >> self.place[node] & 1]
        branch = ResidualBranch(_around([self.captured.module_path(node) for node in layers]), value, sums, reason=reason)
        if reason:
            return branch
        known: dict[fx.Node, _Zeros | str] = {}
        zeros = self._zeros(value, stream, known)
        if isinstance(zeros, str):
            return replace(branch, reason=zeros)
        dead = dead_without(self.captured, [branch])
        reason = self._hindrance(zeros, dead.union(sums), sums[0])
        if reason:
            return replace(branch, reason=reason)
        zeros = self._with_layer_below(zeros)
        order = [self.names[node] for node in sorted(zeros.nodes, key=self.place.__getitem__) if node in self.names]
        makers = dict.fromkeys(sorted(order, key=lambda name: not name.endswith(".weight")))
        kept = {name for node, name in self.names.items() if node not in dead and node.users}
        tensors = dict.fromkeys(name for node, name in self.names.items() if node in dead and name not in kept)
        return replace(branch, makers=tuple(makers), tensors=tuple(tensors))

    def _zeros(self, node: fx.Node, stream: fx.Node, known: dict[fx.Node, _Zeros | str]) -> _Zeros | str:
        """How to make a tensor zero, or in words why it can't be."""
        pending = [node]
        while pending:  # no recursion: graphs are deep
            one = pending[-1]
            if one in known:
                pending.pop()
                continue
            options = self._options(one, stream)
            if isinstance(options, (str, _Zeros)):
                known[one] = options
                continue
            missing = self._missing(options, known)
            if missing:
                pending += missing
                continue
            known[one] = self._chosen(one, options, known)
        return known[node]

    def _options(self, node: fx.Node, stream: fx.Node) -> tuple[tuple[fx.Node, ...], ...] | _Zeros | str:
        if node in self.is_parameter:
            if node.meta["val"].dim() == 0:
                return f"is scaled by the single number '{self.names[node]}'"
            return _Zeros(frozenset((self.names[node],)), frozenset((node,)))
        if node in self.names:
            return f"has '{self.names[node]}' added, which is no parameter"
        if node is stream or (node in self.fed and not self.above[node] >> self.place[stream] & 1):
            return "adds something that no layer of its own made"
        if is_contraction(node) and node not in self.layers:
            return _PRODUCT
        options = law(node)
        return options or f"passes {self._where(node)}, which isn't known to make zero of zero"

    @staticmethod
    def _missing(options: Iterable[Sequence[fx.Node]], known: dict[fx.Node, _Zeros | str]) -> list[fx.Node]:
        """What has to be known to choose: nothing as soon as one option is known to be possible."""
        for option in options:
            missing = [one for one in option if one not in known]
            if missing:
                return missing[-1:]
            if not any(isinstance(known[one], str) for one in option):
                return []
        return []

    @staticmethod
    def _chosen(node: fx.Node, options: Iterable[Sequence[fx.Node]], known: dict[fx.Node, _Zeros | str]) -> _Zeros | str:
        reason = ""
        for option in options:
            results = [known[one] for one in option]
            problem = next((one for one in results if isinstance(one, str)), "")
            if not problem:
                parts = [one for one in results if isinstance(one, _Zeros)]
                makers = frozenset().union(*(part.makers for part in parts))
                return _Zeros(makers, frozenset((node,)).union(*(part.nodes for part in parts)))
            reason = reason or problem
        return reason

    def _hindrance(self, zeros: _Zeros, inside: AbstractSet[fx.Node], total: fx.Node) -> str:
        """Why what is zero with the branch can't be: something outside of it reads it or writes over it, or something divides by it."""
        if not zeros.makers:
            return "is zero already"
        for node in sorted({*zeros.nodes, *self._all_of(zeros.makers)}, key=self.place.__getitem__, reverse=True):
            for user in node.users:
                if user not in inside and (user.op == "output" or is_tensor(user)):
                    what = f"'{self.names[node]}'" if node in self.names else f"the result of {self._where(node)}"
                    return f"has {what} read at {self._where(user)} too"
            for writer in self.writes.get(node, ()):
                if writer not in inside and self.place[writer] < self.place[total]:
                    return f"is written over in place at {self._where(writer)}"
        zero = self._spread(zeros.makers)
        for node in zero:
            for user in node.users:
                if node in has_pole(user):
                    return f"isn't finite at {self._where(user)} when it is zero"
        return ""

    def _all_of(self, makers: AbstractSet[str]) -> list[fx.Node]:
        return [node for node, name in self.names.items() if name in makers]

    def _spread(self, makers: AbstractSet[str]) -> set[fx.Node]:
        """Everything that is zero when these parameters are."""
        zero = set(self._all_of(makers))
        start = min((self.place[node] for node in zero), default=0)
        for node, place in self.place.items():
            touched = place > start and node.op == "call_function" and any(source in zero for source in node.all_input_nodes)
            if touched and any(all(one in zero for one in option) for option in law(node)):
                zero.add(node)
        return zero

    def _with_layer_below(self, zeros: _Zeros) -> _Zeros:
        """Add the rows that a batch normalization gates: nothing of them is left once its scale is zero, so they may be zero too."""
        nodes, makers = set(zeros.nodes), set(zeros.makers)
        for node in zeros.nodes:
            below = layer_below(node)
            for placeholder, way in () if below is None else below:
                tensor = placeholder.meta["val"]
                alone = placeholder in self.is_parameter and len(self._all_of({self.names[placeholder]})) == 1
                if alone and tensor.dim() and operator_name(node.all_input_nodes[0].target) in _ROWS_FIRST:
                    nodes |= {placeholder, *way}
                    makers.add(self.names[placeholder])
        return _Zeros(frozenset(makers), frozenset(nodes))

    def _writes(self) -> dict[fx.Node, list[fx.Node]]:
        """Tensor -> operators that write into its memory."""
        base: dict[fx.Node, fx.Node] = {}
        sharers: dict[fx.Node, list[fx.Node]] = {}
        writers: dict[fx.Node, list[fx.Node]] = {}
        for node in self.captured.graph.nodes:
            base[node] = base[memory_of(node)] if memory_of(node) is not node else node
            sharers.setdefault(base[node], []).append(node)
            for given in written_by(node):
                writers.setdefault(base[given], []).append(node)
        return {node: found for root, found in writers.items() for node in sharers[root]}

    def _where(self, node: fx.Node) -> str:
        if node.op == "output":
            return "the model's output"
        return f"{operator_name(node.target).rpartition('::')[2]} at {self.captured.module_path(node) or 'the model itself'}"


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return concrete_shape(one.meta["val"]) == concrete_shape(other.meta["val"])


def _same_dtype(one: fx.Node, other: fx.Node) -> bool:
    return bool(one.meta["val"].dtype == other.meta["val"].dtype)


_ROWS_FIRST = ("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::linear")
"""Layers whose weight has its results along dimension 0, as the normalisation's numbers have them."""


def _around(paths: Sequence[str]) -> str:
    """The innermost module that is around all of these, one of them if there is only one."""
    parts = [path.split(".") if path else [] for path in paths]
    common: list[str] = []
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1:
            break
        common.append(same[0])
    return ".".join(common)
