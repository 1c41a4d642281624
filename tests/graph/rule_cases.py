"""The table of rule contracts: one place that knows every case, and which operators the elementwise lists speak of."""

from __future__ import annotations

from geta.subnet.rewrite import _REWRITERS
from graph.rule_cases_layers import LAYERS
from graph.rule_cases_pointwise import KEEP, LOSE, OUTSIDE, POINTWISE, POLES
from graph.rule_cases_reductions import REDUCTIONS
from graph.rule_cases_special import SPECIAL
from graph.rule_cases_structure import STRUCTURE
from graph.rule_contract import Case

CASES = [*POINTWISE, *STRUCTURE, *LAYERS, *REDUCTIONS, *SPECIAL]
__all__ = ["CASES", "KEEP", "LOSE", "OUTSIDE", "POLES", "cases_of", "compacts"]


def cases_of(op: str) -> list[Case]:
    """The cases of an operator, its in-place twin included."""
    return [case for case in CASES if case.op in (op, f"{op}_")]


_FIRST = {case.op: case.name for case in reversed(CASES)}


def compacts(case: Case) -> bool:
    """Whether to build the compact model: once for each operator, and in every case of one with constants to rewrite."""
    return case.op in _REWRITERS or _FIRST[case.op] == case.name
