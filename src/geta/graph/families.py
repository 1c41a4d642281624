"""What the analysis finds: groups of indices that live and die together, gathered into families.

Legend: `n` groups of a family, `m` indices of one group along one parameter dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from geta.devices import resolve_multiple

Role = Literal["producer", "consumer", "buffer"]
Selection = Mapping[str, torch.Tensor]
"""Family name -> BoolTensor[n]; True = remove that group."""

LAYERS = "layers"
"""The unit of families of one group that is a whole residual branch (`geta.graph.depth`)."""


@dataclass(frozen=True)
class Member:
    """The part of one tensor that a family owns.

    param: the user's own name (`layer1.0.conv1.weight`), of a parameter or a buffer; never a parametrization's name.
    dim:   the dimension that shrinks.
    index: int64 [n, m]; row i holds the indices along `dim` that group i owns.
    role:  "producer" (its rows make the group), "consumer" (its columns only read the group), "buffer" (not trained).
    zero:  True if removing the group requires this slice to be zero; False if the slice is only cut away.
    """

    param: str
    dim: int
    index: torch.Tensor = field(compare=False)
    role: Role
    zero: bool


@dataclass(frozen=True)
class Family:
    """Groups that touch the same parameter dimensions, e.g. "the 12 heads of block 3".

    name:      taken from the user's module paths; unique in its graph.
    unit:      what one group is, in the plural: "channels", "heads", "neurons", "norm groups" ...
    size:      number of groups n.
    prunable:  whether groups may be removed.
    reason:    in words: why not, or "" when prunable.
    members:   everything that shrinks when a group is removed.
    inexact:   why removal changes the result (only with `analyze(exact=False)`), else "".
    suggestion: for a family that can't be pruned, what would make it prunable, in words; "" when nothing is known.
    gated:     parameters among the members whose rows count for nothing once others of the group are zero (`geta.graph.gates`).
    removes:   of a whole residual branch: all tensors that go with it. Its members are those of them that have to be zero, with all
               their rows, which may belong to other families as well.
    """

    name: str
    unit: str
    size: int
    prunable: bool
    reason: str
    members: tuple[Member, ...]
    inexact: str = ""
    suggestion: str = ""
    gated: frozenset[str] = frozenset()
    removes: tuple[str, ...] = ()
    block: str = ""
    no_block: str = ""

    @property
    def is_layer(self) -> bool:
        """Whether its only group is a whole residual branch, so that the family may be emptied."""
        return self.unit == LAYERS

    @property
    def channels(self) -> int:
        """What number of channels (rows or columns of a weight) every group has a multiple of in all its layers.

        Of heads, 1 only where all members say so: what has one row per head (a bias, a table of scores) is no layer's width.
        """
        rows = {int(member.index.shape[1]) for member in self.members}
        if self.unit in ("heads", "key-value groups"):
            rows -= {1}
        return math.gcd(*rows) or 1

    def kept(self, share: float, multiple_of: int | str) -> int:
        """How many groups stay when this share goes: at least one, rounded up to the multiple of `resolve_multiple`, at most all."""
        multiple = resolve_multiple(multiple_of, self.channels)
        least = max(1, self.size - int(share * self.size))
        return min(-(-least // multiple) * multiple, self.size)

    def summary(self) -> dict[str, Any]:
        """All but the members, as plain data."""
        return {
            "name": self.name,
            "unit": self.unit,
            "size": self.size,
            "prunable": self.prunable,
            "reason": self.reason,
            "inexact": self.inexact,
            "suggestion": self.suggestion,
        }

    @property
    def zeroed(self) -> tuple[Member, ...]:
        """The members whose slices must be zero for a removed group."""
        return tuple(member for member in self.members if member.zero)


def repeated(families: Sequence[Family]) -> list[list[Family]]:
    """Families that are the same part of different layers together; every family is in one list, most of a vision model's alone.

    The same part: equal unit, number of groups, and tensors with equal dimensions and rows per group, where names may differ in numbers
    between dots only (`layers.0.mlp.up.weight`, `layers.1.mlp.up.weight`). Lists, and families in them, are in the order given.
    """
    found: dict[tuple[Any, ...], list[Family]] = {}
    for family in families:
        members: list[tuple[str, int, int]] = sorted((_without_numbers(m.param), m.dim, int(m.index.shape[1])) for m in family.members)
        found.setdefault((family.unit, family.size, tuple(members)), []).append(family)
    return list(found.values())


def layer_sets(families: Sequence[Family]) -> list[list[Family]]:
    """Whole residual branches among the prunable families, in sets of which at least one has to stay.

    A set are branches that repeat across layers (the attention of all decoder layers), as `repeated` finds them; those that repeat
    nowhere are one set together.
    """
    layers = [family for family in families if family.is_layer and family.prunable]
    ties = repeated(layers)
    alone = [tie[0] for tie in ties if len(tie) == 1]
    return [*(tie for tie in ties if len(tie) > 1), *([alone] if alone else [])]


def layer_units(families: Sequence[Family], *, uniform: bool) -> list[list[list[Family]]]:
    """What goes together of the whole residual branches that may go, in sets of which at least one has to stay.

    uniform: False = each branch for itself, in the sets of `layer_sets`. True = all branches of a block (`Family.block`) at once, and those
    without a block never; a set are blocks whose branches repeat across layers, and those that repeat nowhere are one set together.
    """
    if not uniform:
        return [[[family] for family in together] for together in layer_sets(families)]
    blocks: dict[str, list[Family]] = {}
    for family in families:
        if family.block and family.prunable:
            blocks.setdefault(family.block, []).append(family)
    inside = [family for unit in blocks.values() for family in unit]
    part_of = {family.name: part for part, tie in enumerate(repeated(inside)) for family in tie}
    alike: dict[tuple[int, ...], list[list[Family]]] = {}
    for unit in blocks.values():
        alike.setdefault(tuple(sorted(part_of[family.name] for family in unit)), []).append(unit)
    alone = [units[0] for units in alike.values() if len(units) == 1]
    return [*(units for units in alike.values() if len(units) > 1), *([alone] if alone else [])]


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
