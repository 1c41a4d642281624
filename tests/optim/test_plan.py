"""The planner against enumeration on small problems, its promise about the rest of the budget, and its speed."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from geta.cost.model import CostModel, ProductTerm, TensorTerm, Width
from geta.optim.plan import Coordinate, smallest_costs, solve

MIXES = [["bops"], ["macs"], ["bytes"], ["params"], ["bops", "params"], ["macs", "bytes"]]


def problem(rng: np.random.Generator, shape: tuple[int, int, int, int, int]) -> tuple[CostModel, list[Coordinate]]:
    """A random network: `families` of `size` groups, `widths` quantizers with `choices` bit widths, `products` layers."""
    families, size, widths, choices, products = shape
    slope = np.concatenate([np.eye(families, dtype=np.int64), np.zeros((1, families), dtype=np.int64)])
    terms, tensors = [], []
    for _ in range(products):
        pair = tuple(int(u) for u in rng.integers(0, families + 1, 2))
        weight, other = (Width(0.0, (int(rng.integers(widths)),)) if widths and rng.random() < p else Width(32.0) for p in (1.0, 0.5))
        terms.append(ProductTerm(int(rng.integers(1, 50)), pair, weight, other))
        tensors.append(TensorTerm(pair, True, weight))
    names = [tuple(f"{kind}{i}" for i in range(count)) for kind, count in (("f", families), ("q", widths))]
    base = np.array([size] * families + [3], dtype=np.int64)
    model = CostModel(names[0], (size,) * families, names[1], base, slope, tuple(terms), tuple(tensors), {}, ())
    coordinates = []
    for family in range(families):
        losses = np.concatenate([[0.0], np.cumsum(np.sort(rng.gamma(1.0, 1.0, size)))[:-1]]) / (families * size)
        coordinates.append(Coordinate(family, False, np.arange(size), losses))
    for quantizer in range(widths):
        bits = np.arange(8, 8 - choices, -1)
        coordinates.append(Coordinate(quantizer, True, bits, 0.3 * rng.gamma(1.0) / widths * 4.0 ** -(bits - 4.0)))
    return model, coordinates


def point(model: CostModel, coordinates: list[Coordinate], chosen) -> tuple[dict[str, float], float]:
    """Exact costs and loss of a choice."""
    removed, bits = np.zeros(len(model.families), dtype=np.int64), np.zeros(len(model.quantizers))
    for one, place in zip(coordinates, chosen, strict=True):
        (bits if one.bits else removed)[one.number] = one.values[place]
    return model.evaluate(removed, bits), float(sum(one.losses[place] for one, place in zip(coordinates, chosen, strict=True)))


def within(costs: dict[str, float], limits: dict[str, float]) -> bool:
    return all(costs[kind] <= limit for kind, limit in limits.items())


def limits_between(model: CostModel, coordinates: list[Coordinate], kinds: list[str], share: float) -> dict[str, float]:
    dense, small = point(model, coordinates, [0] * len(coordinates))[0], smallest_costs(model, coordinates)
    return {kind: small[kind] + (dense[kind] - small[kind]) * share for kind in kinds}


def test_small_problems_are_solved_nearly_as_well_as_by_enumeration():
    gaps = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        model, coordinates = problem(rng, (3, 5, 2, 3, 6))
        limits = limits_between(model, coordinates, MIXES[seed % len(MIXES)], rng.uniform(0.1, 0.8))
        costs, loss = point(model, coordinates, solve(model, coordinates, limits))
        assert within(costs, limits)
        every = itertools.product(*(range(len(one.values)) for one in coordinates))
        candidates = sorted((float(sum(one.losses[i] for one, i in zip(coordinates, c, strict=True))), c) for c in every)
        best = next(least for least, chosen in candidates if within(point(model, coordinates, chosen)[0], limits))
        assert loss >= best - 1e-12
        gaps.append(loss / best - 1.0)
    assert np.mean(gaps) < 0.02
    assert np.mean(np.array(gaps) < 1e-9) > 0.85


@pytest.mark.parametrize("kinds", MIXES)
def test_nothing_more_could_be_kept_within_the_budget(kinds):
    rng = np.random.default_rng(11)
    model, coordinates = problem(rng, (6, 16, 5, 5, 14))
    limits = limits_between(model, coordinates, kinds, 0.4)
    chosen = solve(model, coordinates, limits)
    assert within(point(model, coordinates, chosen)[0], limits)
    for i, place in enumerate(chosen):
        if place:
            assert not within(point(model, coordinates, [*chosen[:i], place - 1, *chosen[i + 1 :]])[0], limits)
    assert solve(model, coordinates, limits) == chosen


def test_a_budget_that_the_dense_network_meets_removes_nothing():
    model, coordinates = problem(np.random.default_rng(0), (3, 8, 2, 4, 6))
    limits = limits_between(model, coordinates, ["bops", "bytes"], 1.0)
    assert solve(model, coordinates, {kind: limit * 1.0001 for kind, limit in limits.items()}) == [0] * 5


def test_the_smallest_reachable_cost_is_itself_a_feasible_budget():
    model, coordinates = problem(np.random.default_rng(1), (3, 8, 2, 4, 6))
    limits = smallest_costs(model, coordinates)
    chosen = solve(model, coordinates, limits)
    assert within(point(model, coordinates, chosen)[0], limits)


def test_a_hundred_families_of_a_thousand_groups_take_seconds():
    model, coordinates = problem(np.random.default_rng(2), (100, 1000, 10, 5, 120))
    limits = limits_between(model, coordinates, ["bops"], 0.3)
    start = time.process_time()
    chosen = solve(model, coordinates, limits)
    assert time.process_time() - start < 40.0
    costs = point(model, coordinates, chosen)[0]
    assert 0.9999 * limits["bops"] <= costs["bops"] <= limits["bops"]
