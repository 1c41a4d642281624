"""Regions of a captured graph (no_grad, autocast, torch.cond) become part of it, without losing what they mean.

no_grad:  what leaves the region is detached; a write into a tensor from outside goes through a detached alias.
autocast: the casts are written into the graph, as the dispatcher makes them; they are found out by running each operator on
          fake tensors, so no list of operators can get out of date.
cond:     both branches are computed, and `where` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from geta.errors import UnsupportedOpError
from geta.graph.places import line_of

_CHECK_OPS = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")
_aten = torch.ops.aten
NOT_CAST = "an autocast region casts inside an operator ({}), which the graph can't show: results there have another precision"


def clean(module: fx.GraphModule, notes: list[str]) -> fx.Graph:
    """Inline all regions and drop assertions, in place; what is left computes and nothing else.

    Raises UnsupportedOpError for any other operator that holds a graph of its own (a loop, say).
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            _inline(module, node, notes)
    for node in reversed(list(graph.nodes)):
        name = getattr(node.target, "__name__", "").split(".")[0]
        if (node.op == "call_function" and name in _CHECK_OPS and not node.users) or (node.op == "get_attr" and not node.users):
            graph.erase_node(node)
    graph.eliminate_dead_code()  # code that only looks at `weight.dtype` leaves a whole computation without a use
    return graph


def _inline(module: fx.GraphModule, node: fx.Node, notes: list[str]) -> None:
    name = str(node.target)
    if name == "wrap_with_set_grad_enabled":
        enabled, body, inputs = node.args[0], node.args[1], node.args[2:]
        result, copied = _splice(module, node, body, inputs, notes)
        if not enabled:
            result = without_gradients(module.graph, copied, result)
    elif name == "wrap_with_autocast":
        given: list[Any] = list(node.args)
        device, dtype, enabled, _, body, *rest = given
        result, copied = _splice(module, node, body, rest, notes)
        if enabled:
            with_casts(module.graph, copied, (str(device), dtype), notes)
        for inner in copied:
            inner.meta["own autocast"] = True
    elif name == "cond" and isinstance(node.args[0], fx.Node) and isinstance(node.args[0].meta["val"], torch.Tensor):
        predicate, yes, no, operands = node.args
        chosen, _ = _splice(module, node, yes, operands, notes)
        other, _ = _splice(module, node, no, operands, notes)
        result = [_where(module.graph, node, predicate, pair) for pair in zip(chosen, other, strict=True)]
        notes.append("torch.cond: both branches are computed and the result is chosen afterwards, so a branch's NaN can reach gradients")
    else:
        raise UnsupportedOpError(
            f"the model calls torch.ops.higher_order.{name}{line_of(node)}, which runs a graph of its own, and geta can't cut that; "
            "write that part with plain tensor operators or Python control flow"
        )
    for user in list(node.users):
        assert isinstance(user.args[1], int)
        user.replace_all_uses_with(result[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def _splice(module: fx.GraphModule, node: fx.Node, body: Any, inputs: Any, notes: list[str]) -> tuple[list[Any], list[fx.Node]]:
    """Copy a region's graph before `node`; returns its results and the nodes."""
    inner = module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    clean(inner, notes)
    mapping: dict[fx.Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), inputs, strict=True))
    result: Any = None
    copied = []
    with module.graph.inserting_before(node):
        for inner_node in inner.graph.nodes:
            if inner_node.op == "output":
                result = pytree.tree_map_only(fx.Node, lambda n: mapping[n], inner_node.args[0])
            elif inner_node.op != "placeholder":
                mapping[inner_node] = module.graph.node_copy(inner_node, lambda n: mapping[n])
                copied.append(mapping[inner_node])
    return list(result) if isinstance(result, (tuple, list)) else [result], copied


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A new node at the present place of insertion, with `like`'s module path and a fake result."""
    new = graph.call_function(target, args)
    new.meta = {key: value for key, value in like.meta.items() if key != "val"}
    new.meta["val"] = target(*pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], args))
    return new


def _where(graph: fx.Graph, node: fx.Node, predicate: Any, pair: tuple[Any, Any]) -> Any:
    if not isinstance(pair[0], fx.Node):
        return pair[0]
    with graph.inserting_before(node):
        return _call(graph, _aten.where.self, (predicate, *pair), node)


def _is_real(node: Any) -> bool:
    """Whether a gradient could run through it."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def without_gradients(graph: fx.Graph, nodes: Sequence[fx.Node], result: Any = None) -> Any:
    """Cut the gradient of a region: in its outputs, and in front of operators that write into their arguments.

    result: what the region returns (nodes in any nesting); returned with detached nodes in it.
    """
    inside = dict.fromkeys(nodes)
    aliases: dict[fx.Node, fx.Node] = {}
    if any(isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in nodes):
        for source in dict.fromkeys(source for node in nodes for source in node.all_input_nodes):
            if source not in inside and _is_real(source):
                with graph.inserting_before(nodes[0]):
                    aliases[source] = _call(graph, _aten.detach.default, (source,), nodes[0])
        for node in nodes:
            for source, alias in aliases.items():
                node.replace_input_with(source, alias)
    cut: dict[fx.Node, fx.Node] = {}

    def detached(node: fx.Node) -> fx.Node:
        if node not in inside or not _is_real(node):
            return node
        if node not in cut:
            with graph.inserting_after(nodes[-1]):
                cut[node] = _call(graph, _aten.detach.default, (node,), node)
        return cut[node]

    for node in nodes:
        for user in list(node.users):
            if user not in inside and user not in cut.values() and _is_real(node):
                user.replace_input_with(node, detached(node))
    return pytree.tree_map_only(fx.Node, detached, result)


class _Casts(TorchDispatchMode):
    """Records to which dtypes the dispatcher casts the given tensors, and whether it casts others too."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = {id(tensor): place for place, tensor in enumerate(tensors)}
        self.found: dict[int, torch.dtype] = {}
        self.hidden = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._to_copy.default and "dtype" in kwargs:
            place = self.places.get(id(args[0]))
            if place is None:
                self.hidden = True
            else:
                self.found[place] = kwargs["dtype"]
        return func(*args, **kwargs)


def with_casts(graph: fx.Graph, nodes: Sequence[fx.Node], autocast: tuple[str, torch.dtype | None], notes: list[str]) -> None:
    """Write the casts of autocast (device type, dtype) in front of the operators of a region."""
    for node in nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.meta.get("own autocast"):
            continue
        casts, hidden = _casts_of(node, autocast)
        if hidden and NOT_CAST.format(node.target._opname) not in notes:
            notes.append(NOT_CAST.format(node.target._opname))
        for source, dtype in casts.items():
            with graph.inserting_before(node):
                cast = _call(graph, _aten.to.dtype, (source, dtype), node)
            node.replace_input_with(source, cast)


def _casts_of(node: fx.Node, autocast: tuple[str, torch.dtype | None]) -> tuple[dict[fx.Node, torch.dtype], bool]:
    """Which arguments of a call autocast casts to what, and whether it also casts something that the call makes inside."""
    sources = [source for source in node.all_input_nodes if isinstance(source.meta["val"], torch.Tensor)]
    device, dtype = autocast
    with FakeTensorMode(), torch.no_grad():
        fakes = [_concrete_like(source.meta["val"], device) for source in sources]
        of = dict(zip(sources, fakes, strict=True))

        def fill(value: fx.Node) -> Any:
            found = of.get(value, value.meta["val"])
            return pytree.tree_map_only((torch.SymInt, torch.SymFloat, torch.SymBool), lambda s: s.node.hint, found)

        args, kwargs = pytree.tree_map_only(fx.Node, fill, (node.args, dict(node.kwargs)))
        plain, cast = _Casts(fakes), _Casts(fakes)
        with plain:
            node.target(*args, **kwargs)  # type: ignore[operator]
        with torch.autocast(device, dtype=dtype, cache_enabled=False), cast:
            node.target(*args, **kwargs)  # type: ignore[operator]
    added = {sources[place]: to for place, to in cast.found.items() if place not in plain.found}
    return added, cast.hidden and not plain.hidden


def _concrete_like(value: torch.Tensor, device: str) -> torch.Tensor:
    sizes: list[Any] = list(value.shape)
    shape = [int(size.node.hint) if isinstance(size, torch.SymInt) else size for size in sizes]
    return torch.empty(shape, dtype=value.dtype, device=device if value.is_meta else value.device)


def resolve_modes(graph: fx.Graph, notes: list[str]) -> None:
    """Replace the switches that a tracer writes down (gradients off, autocast on) by what they do to the operators between them."""
    plain: list[fx.Node] = []
    enabled = True
    casts: list[tuple[fx.Node, list[fx.Node]]] = []
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "_set_grad_enabled":
            without_gradients(graph, plain)
            plain, enabled = [], bool(node.args[0])
        elif name == "_enter_autocast":
            casts.append((node, []))
        elif name == "_exit_autocast":
            start, inside = casts.pop()
            device, dtype, on, *_ = start.args
            if on:
                with_casts(graph, inside, (str(device), dtype), notes)  # type: ignore[arg-type]
            for inner in inside:
                inner.meta["own autocast"] = True
            for _, around in casts[-1:]:
                around.extend(inside)
        elif node.op == "call_function":
            plain += [] if enabled else [node]
            for _, inside in casts[-1:]:
                inside.append(node)
    without_gradients(graph, plain)
    for node in reversed(list(graph.nodes)):
        if getattr(node.target, "__name__", "") in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast"):
            graph.erase_node(node)
