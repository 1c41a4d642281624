"""Elements of lists of modules that consist of residual branches alone, so that a model can do without them.

A *block* is an element of an `nn.ModuleList` or `nn.Sequential` (a decoder layer, say) that hands its input on as it is once all residual
branches in it are gone: of what the model's output needs then nothing is computed in it, but for copies, other shapes of the same
numbers in the same order, and a `relu` of what a `relu` made. A norm behind the sum (as BERT has it) is something else.

An `nn.Sequential` calls its elements one after the other. What is done with those of an `nn.ModuleList` is the business of the module
that has it; only elements with others of their class count, so that the two unlike halves of a layer are no blocks of their own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from torch import fx, nn

from geta.graph.capture import Capture
from geta.graph.context import concrete_shape
from geta.graph.depth import ResidualBranch, needed_without, replacements
from geta.graph.families import Family
from geta.graph.propagate import bind_arguments
from geta.graph.rules.registry import operator_name
from geta.graph.zeros import is_tensor

_Replaced = Mapping[fx.Node, fx.Node | None]
IN_NO_LIST = "it is in no nn.ModuleList or nn.Sequential with others like it"
_SAME = ("aten::alias", "aten::detach", "aten::clone", "aten::contiguous", "aten::to", "aten::_to_copy")
_RESHAPES = ("aten::view", "aten::reshape", "aten::flatten", "aten::unflatten", "aten::squeeze", "aten::unsqueeze", "aten::_unsafe_view")
_RELUS = ("aten::relu", "aten::relu_")
_SELECTS = ("aten::max_pool1d", "aten::max_pool2d", "aten::max_pool3d", "aten::dropout")
"""What makes numbers that are not negative of such numbers."""


def with_blocks(families: Sequence[Family], branches: Sequence[ResidualBranch], captured: Capture, model: nn.Module) -> list[Family]:
    """The families, in which those of residual branches say which block they are part of, or why of none.

    branches: those that the families of whole branches were made from, in their order.
    """
    layers = [family for family in families if family.is_layer]
    elements = list_elements(model) if layers else []
    inside = _nodes_inside(captured, elements)
    blocks: dict[str, str] = {}  # element -> why it is no block, or ""
    found: dict[str, Family] = {}
    pairs = list(zip(layers, branches, strict=True))
    for family, branch in pairs:
        around = [path for path in elements if _is_inside(branch.path, path)]
        reason = IN_NO_LIST
        for path in sorted(around, key=len, reverse=True):
            if path not in blocks:
                blocks[path] = _hindrance(path, [pair for pair in pairs if _is_inside(pair[1].path, path)], inside[path], captured)
            if not blocks[path]:
                reason = ""
                found[family.name] = replace(family, block=path)
                break
            reason = blocks[path] if reason == IN_NO_LIST else reason
        if reason:
            found[family.name] = replace(family, no_block=reason)
    return [found.get(family.name, family) for family in families]


def list_elements(model: nn.Module) -> list[str]:
    """Paths of the elements that their list may be able to do without."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        in_turn = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        kinds = Counter(type(child) for child in module)
        prefix = f"{path}." if path else ""
        found += [f"{prefix}{name}" for name, child in module._modules.items() if in_turn or kinds[type(child)] > 1]
    return found


def _is_inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _nodes_inside(captured: Capture, elements: Sequence[str]) -> dict[str, list[fx.Node]]:
    """Element -> the tensors that are computed in it."""
    known, found = set(elements), defaultdict(list)
    for node in captured.graph.nodes if known else ():
        path = captured.module_path(node) if node.op == "call_function" and is_tensor(node) else ""
        for outer in _outer(path):
            if outer in known:
                found[outer].append(node)
    return defaultdict(list, found)


def _outer(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _hindrance(path: str, own: Sequence[tuple[Family, ResidualBranch]], inside: Sequence[fx.Node], captured: Capture) -> str:
    """Why an element with these branches is no block, or ""."""
    for family, _ in own:
        if not family.prunable:
            return f"of '{path}' '{family.name}' has to stay: it {family.reason}"
    replaced = replacements([branch for _, branch in own])
    needed = needed_without(captured, replaced)
    left = [node for node in inside if node in needed and node not in replaced]
    for node in left:
        if not _hands_on(node, replaced):
            name = operator_name(node.target).rpartition("::")[2]
            return f"'{path}' still computes {name} at '{captured.module_path(node)}' without its branches"
    return _other_shape(path, left, (set(inside), needed), replaced)


def _other_shape(
    path: str, left: Sequence[fx.Node], nodes: tuple[AbstractSet[fx.Node], Mapping[fx.Node, None]], replaced: _Replaced
) -> str:
    """Why what leaves an element isn't what comes in, where all in it are other shapes of that, or "".

    nodes: those in it, and those that the output needs.
    """
    inside, needed = nodes
    for node in left:
        if all(user in inside for user in _readers(node, needed, replaced)):
            continue
        source = node
        while source in inside:
            source = _operand(source, replaced)
        if concrete_shape(source.meta["val"]) != concrete_shape(node.meta["val"]):
            return f"'{path}' gives another shape to what it gets"
    return ""


def _readers(node: fx.Node, needed: Mapping[fx.Node, None], replaced: _Replaced) -> Iterator[fx.Node]:
    """Who reads a tensor, where additions without their branches are skipped."""
    for user in node.users:
        if user not in replaced:
            yield from (user,) if user in needed else ()
        elif replaced[user] is node:
            yield from _readers(user, needed, replaced)


def _operand(node: fx.Node, replaced: _Replaced) -> fx.Node:
    """What a tensor is a copy of, where additions without their branches are skipped."""
    source = node if node in replaced else node.all_input_nodes[0]
    while source in replaced:
        instead = replaced[source]
        assert instead is not None  # nobody needs a sum of which nothing is left
        source = instead
    return source


def _hands_on(node: fx.Node, replaced: _Replaced) -> bool:
    """Whether a call computes nothing but its first operand again."""
    name = operator_name(node.target)
    if name not in (*_SAME, *_RESHAPES, *_RELUS, "aten::dropout"):
        return False
    source = _operand(node, replaced)
    if name in _RELUS:
        return _is_not_negative(source, replaced)
    if name == "aten::dropout":
        return not bind_arguments(node, lambda arg: arg)["p"]
    return bool(node.meta["val"].dtype == source.meta["val"].dtype)


def _is_not_negative(node: fx.Node, replaced: _Replaced) -> bool:
    while node.op == "call_function":
        name = operator_name(node.target)
        if name in _RELUS:
            return True
        if name not in (*_SAME, *_RESHAPES, *_SELECTS):
            return False
        node = _operand(node, replaced)
    return False
