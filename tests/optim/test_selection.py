"""Which groups become redundant: exact counts, alignment, no emptied family, lowest scores."""

from __future__ import annotations

import time
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geta.errors import ConfigError
from geta.optim.selection import Selector, nearest_feasible, removable_counts

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def kept_is_allowed(size: int, kept: int, multiple_of: int) -> bool:
    return kept == size or (kept > 0 and kept % multiple_of == 0)


def run_periods(selector: Selector, rng: np.random.Generator, groups: int, periods: int) -> np.ndarray:
    pruned = np.zeros(groups, dtype=bool)
    for period in range(periods):
        total = selector.target * (period + 1) // periods
        new = selector.mark(rng.random(groups), pruned, total)
        assert not (new & pruned).any()
        pruned |= new
        assert pruned.sum() == total
    return pruned


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 12), st.floats(0, 0.99), st.integers(1, 4), st.integers(0, 1000))
def test_every_run_lands_on_an_aligned_exact_count(sizes, multiple_of, sparsity, periods, seed):
    wanted = int(sparsity * sum(sizes))
    selector = Selector(sizes, wanted, multiple_of)
    pruned = run_periods(selector, np.random.default_rng(seed), sum(sizes), periods)
    assert pruned.sum() == selector.target
    start = 0
    for size in sizes:
        kept = size - int(pruned[start : start + size].sum())
        assert kept_is_allowed(size, kept, multiple_of)
        start += size
    assert bool(selector.note) == (selector.target != wanted)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.sampled_from([1, 2, 3, 8, 24, 64])), min_size=1, max_size=5),
    st.floats(0, 0.99),
    st.integers(1, 4),
)
def test_a_profile_aligns_the_channels_of_every_family(families, sparsity, periods):
    sizes, channels = [size for size, _ in families], [each for _, each in families]
    selector = Selector(sizes, int(sparsity * sum(sizes)), "avx512-vnni", channels)
    pruned = run_periods(selector, np.random.default_rng(0), sum(sizes), periods)
    assert pruned.sum() == selector.target
    for size, each, mine in zip(sizes, channels, np.split(pruned, np.cumsum(sizes)[:-1]), strict=True):
        kept = size - int(mine.sum())
        assert kept == size or (kept > 0 and kept * each % 16 == 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5), st.data())
def test_the_target_is_the_nearest_feasible_count(sizes, multiple_of, data):
    wanted = data.draw(st.integers(0, sum(sizes)))
    allowed = [[n - kept for kept in range(n + 1) if kept_is_allowed(n, kept, multiple_of)] for n in sizes]
    totals = sorted({sum(choice) for choice in product(*allowed)})
    best = min(totals, key=lambda total: (abs(total - wanted), total))
    assert nearest_feasible([removable_counts(n, multiple_of) for n in sizes], wanted) == best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 1000), st.data())
def test_the_cheapest_aligned_choice_is_found(sizes, multiple_of, seed, data):
    wanted = data.draw(st.integers(0, sum(sizes)))
    scores = np.random.default_rng(seed).random(sum(sizes))
    selector = Selector(sizes, wanted, multiple_of)
    chosen = selector.mark(scores, np.zeros(sum(sizes), dtype=bool), selector.target)
    costs, start = [], 0
    for size in sizes:
        ranked = np.sort(scores[start : start + size])
        costs.append({n - k: ranked[: n - k].sum() for n in [size] for k in range(n + 1) if kept_is_allowed(n, k, multiple_of)})
        start += size
    best = min(
        sum(cost[count] for cost, count in zip(costs, choice, strict=True)) for choice in product(*costs) if sum(choice) == selector.target
    )
    assert scores[chosen].sum() == pytest.approx(best)


def test_without_alignment_the_lowest_scores_go_first():
    scores = np.array([0.3, 0.1, 0.9, 0.2, 0.8, 0.05])
    chosen = Selector([3, 3], 3).mark(scores, np.zeros(6, dtype=bool), 3)
    assert chosen.tolist() == [False, True, False, True, False, True]


def test_equal_scores_are_taken_in_order():
    chosen = Selector([4, 4], 3).mark(np.zeros(8), np.zeros(8, dtype=bool), 3)
    assert chosen.tolist() == [True] * 3 + [False] * 5


def test_a_family_is_never_emptied():
    selector = Selector([2, 6], 6)
    chosen = selector.mark(np.array([0.0, 0.0, 1, 1, 1, 1, 1, 1]), np.zeros(8, dtype=bool), 6)
    assert chosen[:2].sum() == 1
    assert chosen[2:].sum() == 5


def test_missed_targets_are_said_in_words():
    assert Selector([16, 16], 13, 8).note == (
        "13 of 32 groups were to be removed; 16 is the nearest possible, because every family keeps a multiple of 8 groups or all"
    )
    assert "no family may be emptied" in Selector([2, 2], 3).note


def test_large_families_are_planned_in_reasonable_time():
    sizes = [1003] * 4 + [1024] * 8
    selector = Selector(sizes, sum(sizes) // 2, 8)
    assert abs(selector.target - sum(sizes) // 2) <= 1
    pruned = run_periods(selector, np.random.default_rng(0), sum(sizes), 2)
    assert pruned.sum() == selector.target


@pytest.mark.parametrize("multiple_of", [0, -1, 2.0, True])
def test_a_bad_multiple_is_refused(multiple_of):
    with pytest.raises(ConfigError, match="multiple_of"):
        Selector([4], 1, multiple_of)


def tied_problems(draw) -> tuple[list[int], list[list[int]], int]:
    """Sizes of families, ties of them, and m."""
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    sizes, ties = [], []
    for length in lengths:
        size = draw(st.integers(1, 6))
        ties.append(list(range(len(sizes), len(sizes) + length)))
        sizes += [size] * length
    return sizes, ties, draw(st.integers(1, 3))


def choices(sizes, ties, multiple_of):
    """All ways to remove equal numbers in every tie: {family: count} as lists."""
    allowed = [
        [sizes[tie[0]] - kept for kept in range(sizes[tie[0]] + 1) if kept_is_allowed(sizes[tie[0]], kept, multiple_of)] for tie in ties
    ]
    for choice in product(*allowed):
        yield [count for count, tie in zip(choice, ties, strict=True) for _ in tie]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 1000))
def test_tied_families_lose_equal_numbers_at_the_smallest_cost(data, seed):
    sizes, ties, multiple_of = tied_problems(data.draw)
    wanted = data.draw(st.integers(0, sum(sizes)))
    scores = np.random.default_rng(seed).random(sum(sizes))
    selector = Selector(sizes, wanted, multiple_of, ties=ties)
    every = list(choices(sizes, ties, multiple_of))
    assert selector.target == min((sum(counts) for counts in every), key=lambda total: (abs(total - wanted), total))
    chosen = selector.mark(scores, np.zeros(sum(sizes), dtype=bool), selector.target)
    starts = np.cumsum([0, *sizes])
    costs = [np.concatenate([[0.0], np.cumsum(np.sort(scores[a:b]))]) for a, b in pairwise(starts)]
    best = min(sum(c[n] for c, n in zip(costs, counts, strict=True)) for counts in every if sum(counts) == selector.target)
    assert scores[chosen].sum() == pytest.approx(best)
    assert [int(chosen[a:b].sum()) for a, b in pairwise(starts)] in every
    assert bool(selector.note) == (selector.target != wanted)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.floats(0, 0.99), st.integers(1, 5), st.integers(0, 1000))
def test_tied_families_end_equal_whatever_the_periods_marked(data, sparsity, periods, seed):
    sizes, ties, multiple_of = tied_problems(data.draw)
    selector = Selector(sizes, int(sparsity * sum(sizes)), multiple_of, ties=ties)
    pruned = run_periods(selector, np.random.default_rng(seed), sum(sizes), periods)
    assert pruned.sum() == selector.target
    assert [int(mine.sum()) for mine in np.split(pruned, np.cumsum(sizes)[:-1])] in list(choices(sizes, ties, multiple_of))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(0, 1000))
def test_a_later_marking_takes_the_cheapest_even_end_that_is_left(data, periods, seed):
    """The second marking, after an uneven first one, against enumeration of all even ends above it."""
    sizes, ties, multiple_of = tied_problems(data.draw)
    rng = np.random.default_rng(seed)
    selector = Selector(sizes, data.draw(st.integers(0, sum(sizes))), multiple_of, ties=ties)
    pruned = selector.mark(rng.random(sum(sizes)), np.zeros(sum(sizes), dtype=bool), selector.target // (periods + 1))
    scores = rng.random(sum(sizes))
    chosen = selector.mark(scores, pruned, selector.target)
    bounds = list(pairwise(np.cumsum([0, *sizes])))
    done = [int(pruned[a:b].sum()) for a, b in bounds]
    costs = [np.concatenate([[0.0], np.cumsum(np.sort(scores[a:b][~pruned[a:b]]))]) for a, b in bounds]
    ends = [
        counts
        for counts in choices(sizes, ties, multiple_of)
        if sum(counts) == selector.target and all(count >= have for count, have in zip(counts, done, strict=True))
    ]
    best = min(sum(cost[count - have] for cost, count, have in zip(costs, counts, done, strict=True)) for counts in ends)
    assert scores[chosen].sum() == pytest.approx(best)


def test_ties_without_an_even_count_are_said_in_words():
    selector = Selector([8, 8, 8], 4, ties=[[0, 1, 2]])
    assert (selector.target, selector.note) == (
        3,
        "4 of 24 groups were to be removed; 3 is the nearest possible, because no family may be emptied and families that repeat lose "
        "equal numbers",
    )
    assert "multiple of 4 groups or all and families that repeat" in Selector([8, 8, 8], 4, 4, ties=[[0, 1, 2]]).note
    assert Selector([8, 8, 8], 4, ties=[[0], [1], [2]]).note == ""


def test_thirty_two_layers_are_planned_in_reasonable_time():
    sizes = [8] * 32 + [2048] * 32 + [512]
    selector = Selector(sizes, sum(sizes) // 2, "nvidia-int8", [128] * 32 + [1] * 33, ties=[list(range(32)), list(range(32, 64))])
    assert abs(selector.target - sum(sizes) // 2) <= 16 * 32
    start = time.process_time()
    pruned = run_periods(selector, np.random.default_rng(0), sum(sizes), 2)
    assert time.process_time() - start < 5.0
    counts = [int(mine.sum()) for mine in np.split(pruned, np.cumsum(sizes)[:-1])]
    assert len(set(counts[:32])) == len(set(counts[32:64])) == 1
    assert counts[0] > 0
    assert (2048 - counts[32]) % 32 == 0 < counts[32]
