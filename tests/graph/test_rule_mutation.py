"""A wrong rule must fail its contract: each mutant here is a plausible mistake, and the check says what it gets wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from geta.graph.context import Context, Rule
from geta.graph.labels import Track, Value, squeezed
from geta.graph.rules import contraction, elementwise, registry
from graph.rule_cases import cases_of
from graph.rule_contract import failures

Mutation = Callable[[Rule], Rule]


def first_value(ctx: Context) -> Value:
    return next(value for value in ctx.arguments.values() if isinstance(value, Value))


def without(*verbs: str) -> Mutation:
    """The rule forgets to bind, align or freeze."""

    def mutate(rule: Rule) -> Rule:
        def forgetful(ctx: Context) -> Any:
            mute = copy.copy(ctx)
            for verb in verbs:
                setattr(mute, verb, lambda *args, **options: None)
            return rule(mute)

        return forgetful

    return mutate


def unmoved(rule: Rule) -> Rule:
    """Every index stays where it was: an unknown operator treated as elementwise."""
    return lambda ctx: ctx.free(first_value(ctx).tracks, first_value(ctx).derived)


def zero(rule: Rule) -> Rule:
    """The result is said to be zero wherever a unit is removed."""

    def hopeful(ctx: Context) -> Any:
        result = rule(ctx)
        tracks = tuple(Track((squeezed(track.code) | 1).expand(track.code.shape), track.origins) for track in result.tracks)
        return Value(result.shape, tracks, result.derived)

    return hopeful


def backwards(rule: Rule) -> Rule:
    """Operands in the wrong order."""

    def swapped(ctx: Context) -> Any:
        turned = copy.copy(ctx)
        turned.arguments = {**ctx.arguments, "tensors": list(reversed(ctx.arguments["tensors"]))}
        return rule(turned)

    return swapped


def frozen(rule: Rule) -> Rule:
    """Nothing is wrong, but nothing can be pruned either."""

    def timid(ctx: Context) -> Any:
        ctx.freeze_all([first_value(ctx)], "is feared")
        return rule(ctx)

    return timid


def instead(other: Rule) -> Mutation:
    return lambda rule: other


DIFFER, FAILS, NOT_ZERO, EXPECTED = "differ by", "brute-force removal", "is said to be zero where it is not", "prunable groups"
MUTANTS: dict[str, tuple[str, Mutation, str]] = {
    "flip moves nothing": ("aten::flip", unmoved, DIFFER),
    "roll moves nothing": ("aten::roll", unmoved, DIFFER),
    "sigmoid keeps zero": ("aten::sigmoid", instead(elementwise.keeps_zero), NOT_ZERO),
    "exp keeps zero": ("aten::exp", instead(elementwise.keeps_zero), DIFFER),
    "relu loses zero and is feared": ("aten::relu", frozen, EXPECTED),
    "adding a number keeps zero": ("aten::add", zero, NOT_ZERO),
    "add does not align": ("aten::add", without("align"), FAILS),
    "log is finite at zero": ("aten::log", instead(elementwise.loses_zero), DIFFER),
    "division by what becomes zero": ("aten::div", instead(elementwise.products), DIFFER),
    "tril works element by element": ("aten::tril", instead(elementwise.keeps_zero), DIFFER),
    "softmax does not freeze": ("aten::softmax", without("freeze"), DIFFER),
    "mean does not freeze": ("aten::mean", without("freeze"), DIFFER),
    "a sum of what is not zero does not freeze": ("aten::sum", without("freeze"), DIFFER),
    "cumprod does not freeze": ("aten::cumprod", without("freeze"), DIFFER),
    "cat in the wrong order": ("aten::cat", backwards, DIFFER),
    "padding with a number is zero": ("aten::constant_pad_nd", zero, NOT_ZERO),
    "batch_norm is zero with statistics alone": ("aten::batch_norm", zero, NOT_ZERO),
    "batch_norm does not align": ("aten::batch_norm", without("align"), FAILS),
    "group_norm does not bind": ("aten::group_norm", without("bind"), FAILS),
    "layer_norm does not freeze": ("aten::layer_norm", without("freeze"), DIFFER),
    "linear does not align": ("aten::linear", without("align"), FAILS),
    "matmul does not align": ("aten::matmul", without("align"), FAILS),
    "attention does not align": ("aten::scaled_dot_product_attention", without("align"), FAILS),
    "grouped convolution does not bind": ("aten::conv2d", without("bind"), EXPECTED),
    "rows of an embedding do not stay": ("aten::embedding", without("freeze"), EXPECTED),
    "indexing does not freeze": ("aten::index_select", without("freeze"), FAILS),
    "a recurrent layer does not bind its gates": ("aten::lstm", without("bind"), FAILS),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, mutate, symptom = MUTANTS[name]
    cases = cases_of(op)
    monkeypatch.setitem(registry._RULES, op, mutate(registry._RULES[op]))
    found = [failure for case in cases for failure in failures(case, compacts=False)]
    assert any(symptom in failure for failure in found), found


def test_a_grouped_convolution_that_takes_leftovers_for_units_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a summed operand leaves along the group axis says nothing about the outputs of a group."""
    contract = contraction.contract

    def careless(*args: Any, joined: int = -1) -> Value:
        return contract(*args)

    monkeypatch.setattr(contraction, "contract", careless)
    found = [failure for case in cases_of("aten::conv2d") for failure in failures(case, compacts=False)]
    assert any(NOT_ZERO in failure for failure in found)


@pytest.mark.parametrize("op", sorted({op for op, _, _ in MUTANTS.values()}))
def test_the_right_rules_pass(op: str) -> None:
    assert [failure for case in cases_of(op)[:3] for failure in failures(case, compacts=False)] == []
