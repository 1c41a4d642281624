"""Leave whole residual branches out of a program: `x + 0` becomes `x`, and whatever only the branch needed goes.

Where operators write in place, a sum and what stands for it must not come to share memory that one of them would see change: a copy is
put between them then, unless nobody would notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from geta.errors import BadModelError
from geta.graph.aliases import memory_of, written_by
from geta.graph.dependency import Analysis, DependencyGraph
from geta.graph.depth import ResidualBranch, branch_of, dead_without, replacements
from geta.graph.families import Family, Selection


def selected_layers(graph: DependencyGraph, selection: Selection) -> list[Family]:
    """The families of whole residual branches that go."""
    return [family for family in graph.families if family.is_layer and family.name in selection and bool(selection[family.name].all())]


def selected_branches(analysis: Analysis, graph: DependencyGraph, selection: Selection) -> list[ResidualBranch]:
    """The branches of this capture that go. Raises BadModelError when the model has changed so that one can't be found."""
    found = []
    for family in selected_layers(graph, selection):
        branch = branch_of(analysis.branches, family)
        if branch is None:
            raise BadModelError(f"'{family.name}' can't be removed from the model as it is now: analyze it again and select again")
        found.append(branch)
    return found


def drop_branches(analysis: Analysis, mapping: Mapping[fx.Node, fx.Node], gone: Sequence[ResidualBranch]) -> None:
    """Take branches out of the program that `mapping` (captured node -> its node) was made for, in place."""
    if not gone:
        return
    captured = analysis.capture
    dead = dead_without(captured, gone)
    copies = []
    graph = mapping[gone[0].sums[0]].graph
    writes = any(written_by(node) for node in graph.nodes)
    for total, instead in replacements(gone).items():
        new = mapping[total]
        if instead is None:
            continue  # what reads it goes as well
        stand = new.args[total.args.index(instead)]
        assert isinstance(stand, fx.Node)
        if writes and memory_of(total) is not instead:
            with graph.inserting_before(new):
                stand = graph.call_function(torch.ops.aten.clone.default, (stand,))
                stand.meta = dict(new.meta)
            copies.append(stand)
        new.replace_all_uses_with(stand)
        graph.erase_node(new)
    _sweep(graph, {mapping[node] for node in dead if node in mapping})
    for copy in copies:
        if copy.graph is graph and not _copy_matters(copy):
            source = copy.args[0]
            assert isinstance(source, fx.Node)
            copy.replace_all_uses_with(source)
            graph.erase_node(copy)


def _sweep(graph: fx.Graph, dead: set[fx.Node]) -> None:
    """Erase dead operators, those that write included, if what they write is not read any more."""
    for node in reversed(graph.nodes):
        if node.op != "call_function" or node.users:
            continue
        written = written_by(node)
        if node in dead or (not written and not node.is_impure()) or (written and all(_only_for(base, node) for base in written)):
            graph.erase_node(node)


def _only_for(base: fx.Node, writer: fx.Node) -> bool:
    """Whether nobody but one operator looks at a tensor that was made in the graph."""
    while True:
        if base.op != "call_function" or set(base.users) != {writer}:
            return False
        if memory_of(base) is base:
            return True
        base, writer = memory_of(base), base


def _copy_matters(copy: fx.Node) -> bool:
    """Whether anybody would see the difference if a copy shared the memory of what it was made from."""
    source = copy.args[0]
    assert isinstance(source, fx.Node)
    place = {node: number for number, node in enumerate(copy.graph.nodes)}
    mine, other = _sharing(copy), _sharing(source)
    root = source
    while memory_of(root) is not root:
        root = memory_of(root)
    for one, rest in ((mine, other), (other, mine)):
        for node in one:
            for writer in node.users:
                if node not in written_by(writer) or place[writer] < place[copy]:
                    continue
                if one is mine and root.op != "call_function":
                    return True
                if any(place[reader] > place[writer] for shared in rest for reader in shared.users if reader is not copy):
                    return True
    return False


def _sharing(node: fx.Node) -> set[fx.Node]:
    """All nodes with the memory of this one."""
    root = node
    while memory_of(root) is not root:
        root = memory_of(root)
    found = {root}
    pending = [root]
    while pending:
        one = pending.pop()
        for user in one.users:
            if user not in found and memory_of(user) is one:
                found.add(user)
                pending.append(user)
    return found
