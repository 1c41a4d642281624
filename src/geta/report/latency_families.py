"""Which families are worth pruning on a machine: milliseconds saved when parts of each of them go, by a latency table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from geta.cost.derive import cost_model
from geta.cost.latency import LatencyTable
from geta.cost.model import LATENCY
from geta.devices import resolve_multiple
from geta.graph.dependency import DependencyGraph

SHARES = (0.25, 0.5, 0.75)
"""Shares of a family's groups that go; one group always stays."""


@dataclass(frozen=True)
class FamilySaving:
    """What pruning one family alone saves; all other families stay whole.

    saved_ms, saved_params: by share of its groups, as in `SHARES`; groups are removed in multiples as `family_savings` was told.
    """

    family: str
    unit: str
    groups: int
    saved_ms: tuple[float, ...]
    saved_params: tuple[int, ...]

    @property
    def ms_per_million(self) -> float:
        """Milliseconds saved per million parameters removed, at half of the groups; 0 where none goes."""
        middle = len(SHARES) // 2
        return 1e6 * self.saved_ms[middle] / self.saved_params[middle] if self.saved_params[middle] else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "ms_per_million": self.ms_per_million}


def family_savings(graph: DependencyGraph, table: LatencyTable, *, multiple_of: int | str = 1) -> list[FamilySaving]:
    """What every prunable family saves, the largest saving at half of its groups first; equal ones in the order of the graph.

    multiple_of: what stays of a family is rounded up to a multiple of this, or all of it; or the name of a `geta.device_profile`, whose
                 multiple is of channels.
    Raises ConfigError when the table was measured for another network.
    """
    resolve_multiple(multiple_of)
    costs = cost_model(graph, table)
    bits = np.full(len(costs.quantizers), 8.0)
    whole = costs.evaluate(np.zeros(len(costs.families), dtype=np.int64), bits)
    found = []
    for number, family in enumerate(graph.prunable_families):
        less = []
        for share in SHARES:
            removed = np.zeros(len(costs.families), dtype=np.int64)
            removed[number] = family.size - family.kept(share, multiple_of)
            less.append(costs.evaluate(removed, bits))
        milliseconds = tuple(max(0.0, whole[LATENCY] - one[LATENCY]) for one in less)
        params = tuple(int(whole["params"] - one["params"]) for one in less)
        found.append(FamilySaving(family.name, family.unit, family.size, milliseconds, params))
    return sorted(found, key=lambda saving: -saving.saved_ms[len(SHARES) // 2])


def savings_table(savings: Sequence[FamilySaving], table: LatencyTable, uncut: float) -> str:
    """The savings as text, one family per line. uncut: predicted latency of the whole network, in milliseconds."""
    shares = [f"-{100 * share:.0f} %" for share in SHARES]
    rows = [("family", "groups", *shares, "of the whole", "per 1M params")]
    for one in savings:
        part = one.saved_ms[len(SHARES) // 2] / uncut if uncut > 0 else 0.0
        saved = [f"{ms:.4f}" for ms in one.saved_ms]
        rows.append((one.family, f"{one.groups} {one.unit}", *saved, f"{100 * part:.1f} %", f"{one.ms_per_million:.3g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{table.words}: {uncut:.4f} ms uncut (predicted)",
        f"milliseconds saved when {', '.join(share[1:] for share in shares)} of a family's groups go and all others stay; the share of the "
        "whole and the milliseconds per million parameters are at the middle one",
        "",
    ]
    for row in rows:
        cells = [cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    if not savings:
        lines.append("no family can be pruned: geta analyze says why")
    return "\n".join(lines)
