"""Parameters whose rows a batch normalization scales: its own two numbers per channel decide alone what the channel gives.

    y_c = gamma_c (w_c x - mean_c) / sigma_c + beta_c      gamma_c = beta_c = 0  =>  y_c = 0, whatever w_c is

So a group is gone as soon as gamma and beta are zero; its rows of `w` may then be set to zero at once, and nothing changes. Shrinking `w`
on the way there has no effect in training mode, where sigma_c shrinks with it, and spoils the running mean and variance, which lag behind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from geta.graph.capture import Capture
from geta.graph.families import Family, Member
from geta.graph.rules.registry import operator_name

_NORMS = tuple(
    f"aten::{name}"
    for name in ("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
)
_LAYERS = tuple(
    f"aten::{name}"
    for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "linear")
)


def with_gates(families: Sequence[Family], captured: Capture) -> list[Family]:
    """The families, with the parameters that batch normalizations gate."""
    candidates: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for row, gate in _pairs(captured):
        candidates[row].add(gate)
    owners: dict[str, list[Mapping[str, list[Member]]]] = defaultdict(list)
    tables = [_zeroed(family) if family.prunable else {} for family in families]
    for table in tables:
        for name in table:
            owners[name].append(table)
    gated = {row for row, gates in candidates.items() if owners[row] and all(_shuts(row, gate, owners[row]) for gate in gates)}
    return [replace(family, gated=frozenset(gated & table.keys())) for family, table in zip(families, tables, strict=True)]


def layer_below(norm: fx.Node) -> list[tuple[fx.Node, list[fx.Node]]] | None:
    """The placeholders of the layer whose result only this batch normalization reads, with the nodes between; None if it isn't one."""
    if operator_name(norm.target) not in _NORMS or not isinstance(norm.args[0], fx.Node):
        return None
    layer = norm.args[0]
    if operator_name(layer.target) not in _LAYERS or len(layer.users) > 1:
        return None
    ways = [_way(arg) for arg in layer.args[1:3]]
    return [(way[-1], way) for way in ways if way]


def _pairs(captured: Capture) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(parameter of a layer, (gamma, beta) of the only thing that reads its result)."""
    for norm in captured.graph.nodes:
        below = layer_below(norm)
        gate = tuple(_source(arg, captured) for arg in norm.args[1:3]) if below else ("",)
        for placeholder, _ in below if below and all(gate) else ():
            row = captured.tensor_names.get(placeholder.name, "")
            if row:
                yield row, gate


def _source(arg: object, captured: Capture) -> str:
    """The parameter that an argument is, perhaps through quantizers; "" if it is read by others too."""
    way = _way(arg)
    return captured.tensor_names.get(way[-1].name, "") if way else ""


def _way(arg: object) -> list[fx.Node]:
    """From an argument to the placeholder that it is, perhaps through quantizers; empty if something else reads any of them."""
    way: list[fx.Node] = []
    while isinstance(arg, fx.Node) and len(arg.users) == 1:
        way.append(arg)
        if arg.op == "placeholder":
            return way
        arg = arg.args[0] if arg.args else None
    return []


def _zeroed(family: Family) -> dict[str, list[Member]]:
    found: dict[str, list[Member]] = defaultdict(list)
    for member in family.zeroed:
        found[member.param].append(member)
    return found


def _shuts(row: str, gate: tuple[str, ...], tables: Sequence[Mapping[str, list[Member]]]) -> bool:
    """Whether every group that owns rows of this parameter owns the same rows of the gate."""
    for table in tables:
        if len(table[row]) != 1 or any(len(table.get(name, [])) != 1 for name in gate):
            return False
        if not all(torch.equal(table[row][0].index, table[name][0].index) for name in gate):
            return False
    return True
