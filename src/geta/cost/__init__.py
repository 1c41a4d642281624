"""Costs of a network: multiply-accumulates, bit operations, parameters and bytes, counted on its real graph."""

from __future__ import annotations

from geta.cost.count import cost, cost_of_graph
from geta.cost.record import Cost, OpCost

__all__ = ["Cost", "OpCost", "cost", "cost_of_graph"]
