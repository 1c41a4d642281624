"""The second try for an operator without a rule: replace it, in the captured graph, by the operators it is made of."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx

MOST_OPERATORS = 500
"""A decomposition that unrolls a loop over a long sequence into more operators than this is not used."""


def decompose(node: fx.Node) -> list[fx.Node] | str:
    """Replace `node` in its graph by its decomposition; return the new nodes, or say in words why it can't be had.

    The trace runs on the fake tensors of the capture, so that symbolic sizes stay symbolic. The module path is handed on.
    """
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    if target._schema.is_mutable:
        return "writes into its input"
    body = target.decompose if target._can_decompose() else decomposition_table.get(target)
    if body is None:
        return ""
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    sources = [leaf for leaf in flat if isinstance(leaf, fx.Node)]

    def run(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(leaf, fx.Node) else leaf for leaf in flat], spec)
        return body(*args, **kwargs)

    try:
        with _quiet():
            inner = make_fx(run)(*[source.meta["val"] for source in sources])
    except Exception as error:  # noqa: BLE001 - it may fail in any way on fake tensors; the reason becomes the family's
        return f"can't be decomposed ({type(error).__name__})"
    count = sum(piece.op == "call_function" for piece in inner.graph.nodes)
    if count > MOST_OPERATORS or any(piece.op in ("get_attr", "call_module") for piece in inner.graph.nodes):
        return f"decomposes into {count} operators"
    if any(piece.target is target for piece in inner.graph.nodes):
        return ""
    return _splice(node, inner.graph, sources)


def _splice(node: fx.Node, inner: fx.Graph, sources: list[fx.Node]) -> list[fx.Node]:
    mapping: dict[fx.Node, Any] = dict(zip(inner.find_nodes(op="placeholder"), sources, strict=True))
    pieces = []
    result: Any = None
    with node.graph.inserting_before(node):
        for piece in inner.nodes:
            if piece.op == "output":
                result = pytree.tree_map_only(fx.Node, lambda n: mapping[n], piece.args[0])
            elif piece.op == "call_function" and not _computes(piece):  # it packs the results into a named tuple
                mapping[piece] = tuple(mapping.get(arg, arg) if isinstance(arg, fx.Node) else arg for arg in piece.args)
            elif piece.op == "call_function" and isinstance(packed := mapping.get(piece.args[0]), tuple):
                mapping[piece] = packed[piece.args[1]]
            elif piece.op == "call_function":
                new = mapping[piece] = node.graph.node_copy(piece, lambda n: mapping[n])
                new.meta = {key: value for key, value in node.meta.items() if key != "val"} | {"val": piece.meta.get("val")}
                pieces.append(new)
    if isinstance(result, (tuple, list)):
        for user in list(node.users):
            assert isinstance(user.args[1], int)
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    else:
        node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return pieces


def _computes(piece: fx.Node) -> bool:
    return isinstance(piece.target, torch._ops.OpOverload) or getattr(piece.target, "__module__", "") in ("_operator", "math", "torch")


@contextmanager
def _quiet() -> Iterator[None]:
    """The fake-tensor machinery logs a traceback for every failed try, which we report in our own words."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
