"""Every operator rule against brute force; see `rule_contract`."""

from __future__ import annotations

import collections

import pytest
import torch

from geta.graph import analyze
from geta.graph.rules import elementwise
from geta.graph.rules.registry import _RULES
from graph.rule_cases import CASES, KEEP, LOSE, OUTSIDE, POLES, cases_of, compacts
from graph.rule_cases_pointwise import RANDOM
from graph.rule_contract import Case, Net, failures, recorded

OURS = ("aten", "geta")
"""Operators of other packages need not be installed; tests/graph/test_quantized_families.py covers their rules."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_zeroed_brute_and_compact_agree(case: Case) -> None:
    assert failures(case, compacts=compacts(case)) == []


@pytest.mark.parametrize("name", sorted(name for name in _RULES if name.partition("::")[0] in OURS))
def test_every_rule_has_a_case_for_an_operator_that_exists(name: str) -> None:
    space, _, op = name.partition("::")
    assert hasattr(getattr(torch.ops, space), op), f"torch has no operator {name}: a rule for it can never be used"
    assert cases_of(name), f"no case in tests/graph/rule_cases*.py calls {name}"


def test_names_of_cases_are_unique() -> None:
    assert [name for name, count in collections.Counter(case.name for case in CASES).items() if count > 1] == []


def test_elementwise_lists_are_the_ones_that_the_table_checks() -> None:
    assert set(elementwise._KEEP) == set(KEEP)
    assert set(elementwise._LOSE) == {*LOSE, *RANDOM}
    assert set(elementwise._POLES) == {*POLES, *OUTSIDE}


@pytest.mark.parametrize("name", sorted(KEEP))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_zero(name: str, dtype: torch.dtype) -> None:
    assert bool((KEEP[name](torch.zeros(3, 4, dtype=dtype)) == 0).all())


@pytest.mark.parametrize("name", sorted(LOSE))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loses_zero(name: str, dtype: torch.dtype) -> None:
    found = LOSE[name](torch.zeros(3, 4, dtype=dtype))
    assert bool(found.isfinite().all())
    assert bool((found != 0).all())


@pytest.mark.parametrize("name", sorted({**POLES, **OUTSIDE}))
def test_is_not_finite_at_zero(name: str) -> None:
    assert not bool({**POLES, **OUTSIDE}[name](torch.zeros(3, 4, dtype=torch.float64)).isfinite().any())


EXPORTED = """aten::relu two|aten::sigmoid|aten::add|aten::flip|aten::cat|aten::split|aten::softmax|aten::mean|aten::matmul|aten::conv2d|
aten::batch_norm|aten::group_norm|aten::layer_norm|aten::embedding|aten::scaled_dot_product_attention|aten::lstm|aten::constant_pad_nd|
aten::index|aten::roll|aten::pixel_shuffle|aten::glu|aten::einsum"""


@pytest.mark.parametrize("op", EXPORTED.replace("\n", "").replace(" two", "").split("|"))
def test_recorded_and_exported_graphs_have_the_same_families(op: str) -> None:
    """The cases are recorded call by call; what `torch.export` makes of the same function must mean the same."""
    case = cases_of(op)[0]
    net = Net(case, case.dtypes[0])
    with recorded():
        expected = analyze(net, net.inputs, exact=case.exact)
    exported = analyze(net, net.inputs, exact=case.exact)
    described = [
        [(f.name, f.size, f.prunable, [(m.param, m.dim, m.index.tolist(), m.zero) for m in f.members]) for f in graph.families]
        for graph in (expected, exported)
    ]
    assert described[0] == described[1]
