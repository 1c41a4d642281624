"""Which tensors of a graph share memory, and which operators write into it."""

from __future__ import annotations

import torch
from torch import fx

from geta.graph.propagate import bind_arguments
from geta.graph.rules.registry import operator_name


def memory_of(node: fx.Node) -> fx.Node:
    """The operand whose memory the result shares, else the node itself."""
    if node.op != "call_function" or not node.all_input_nodes:
        return node
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes[0]
    shares = any(result.alias_info is not None for result in node.target._schema.returns)
    return node.all_input_nodes[0] if shares or operator_name(node.target) in _MAY_SHARE else node


_MAY_SHARE = ("aten::reshape", "aten::contiguous", "aten::to", "aten::flatten", "aten::dropout", "aten::alias")
"""Operators that hand their operand on where nothing has to be done, which their schemas don't say."""


def written_by(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator writes over."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    written = [one.name for one in node.target._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    given = bind_arguments(node, lambda arg: arg) if written else {}
    return [given[name] for name in written if isinstance(given.get(name), fx.Node)]
