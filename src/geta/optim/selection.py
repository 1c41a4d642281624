"""Which groups become redundant: exactly K of them in the end, hardware alignment kept, no family emptied.

With `multiple_of = m` the number of groups kept in each family is a multiple of m, or the whole family; with the name of a device profile
m differs per family, so that what is kept is a multiple of the profile's number of channels. Families that are tied lose equal numbers
of groups, as a single number of a configuration says it (`geta.graph.families.repeated`). At each period the
cheapest complete plan for the final K is made (cost = sum of scores, already pruned groups stay pruned), and its lowest-scored
groups are marked until the running total is reached. So the last period always lands on an aligned, exactly counted result.

Whole residual branches (`geta.graph.depth`) are counted apart: of these, a number of their own goes, lowest scores first, and at least one
of each set stays (`geta.graph.families.layer_units`). With `uniform=True` the branches of a block go together, and the sum of their scores
counts. One score per group says nothing about how many channels a branch is worth.

Everything here runs on the host, once per period. Legend: `G` groups, `F` families.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from geta.devices import resolve_multiple
from geta.optim.branch_plan import Unit, cheapest, nearest, reachable

_FIRST_WINDOW = 64
"""Blocks of m that are planned exactly at the end of the greedy pass; widened when the target can't be met inside it."""


class Selector:
    """Chooses redundant groups.

    sizes: groups per family. wanted: K as the user asked for. multiple_of: m, or the name of a device profile whose multiple of
    channels is kept. channels: of a group, per family (None: 1). multiples: m per family.
    ties: lists of families (by place, all of one size and of equal channels) that lose equal numbers in the end; a family in none is
    free. In `Selector.ties` every family is in exactly one.
    layers: sets of families (by place, each of one group) that are whole residual branches, of which `wanted_layers` go in all.
    units: what goes together of them, in sets of which at least one unit stays; None = each branch of `layers` is one.
    target: the K that will be met, branches included: the feasible count nearest to what is wanted, the smaller one of two equally near.
    layer_target: how many of them are branches.
    note: in words, when `target` differs from `wanted`; otherwise "".
    counts: how many groups each family loses in the end, when that is fixed (`fix`); else None.
    """

    counts: list[int] | None = None

    def __init__(
        self,
        sizes: Sequence[int],
        wanted: int,
        multiple_of: int | str = 1,
        channels: Sequence[int] | None = None,
        *,
        ties: Sequence[Sequence[int]] = (),
        layers: Sequence[Sequence[int]] = (),
        units: Sequence[Sequence[Sequence[int]]] | None = None,
        wanted_layers: int = 0,
    ) -> None:
        resolve_multiple(multiple_of)
        self.multiples = [resolve_multiple(multiple_of, each) for each in (channels or [1] * len(sizes))]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self.layers = [list(together) for together in layers]
        self.units = [[[family] for family in together] for together in layers] if units is None else units
        layered = {family for together in layers for family in together}
        self.multiples = [1 if family in layered else multiple for family, multiple in enumerate(self.multiples)]
        self.options = [
            [0, 1] if family in layered else removable_counts(size, multiple)
            for family, (size, multiple) in enumerate(zip(sizes, self.multiples, strict=True))
        ]
        tied = {family for tie in ties for family in tie}
        self.ties = [*map(list, ties), *([family] for family in range(len(sizes)) if family not in tied)]
        assert sorted(family for tie in self.ties for family in tie) == list(range(len(sizes))), ties
        assert all(self.options[family] == self.options[tie[0]] for tie in self.ties for family in tie), ties
        ways = [[len(tie) * count for count in self.options[tie[0]]] for tie in self.ties if tie[0] not in layered]
        ordinary = nearest_feasible(ways, wanted)
        self.layer_target = nearest(reachable([[len(unit) for unit in together] for together in self.units]), wanted_layers)
        self.target = ordinary + self.layer_target
        self.note = ""
        if self.layer_target != wanted_layers:
            blocks = any(len(unit) > 1 for together in self.units for unit in together)
            what = "nearest possible, because whole blocks go, and of those" if blocks else "most possible, because of those"
            self.note = (
                f"{wanted_layers} of {len(layered)} residual branches were to be removed; {self.layer_target} is the {what} that repeat "
                f"across layers, and of the others together, at least one stays"
            )
        if ordinary != wanted:
            rule = "no family may be emptied" if self.largest == 1 else f"every family keeps a multiple of {self._words()} groups or all"
            rule += " and families that repeat lose equal numbers" if self.binds else ""
            total = int(self.starts[-1]) - len(layered)
            note = f"{wanted} of {total} groups were to be removed; {ordinary} is the nearest possible, because {rule}"
            self.note = f"{note}; {self.note}" if self.note else note

    @property
    def largest(self) -> int:
        """The largest m of a family."""
        return max(self.multiples, default=1)

    @property
    def alignment(self) -> int | list[int]:
        """m, or where families differ m of each."""
        return self.multiples[0] if len(set(self.multiples)) == 1 else self.multiples

    @property
    def binds(self) -> bool:
        """Whether any families are tied to each other."""
        return any(len(tie) > 1 for tie in self.ties)

    def _words(self) -> str:
        lowest = min(self.multiples)
        return str(lowest) if lowest == self.largest else f"{lowest} to {self.largest} (see Family.channels)"

    def fix(self, counts: Sequence[int] | None) -> None:
        """Fix how many groups each family loses in the end; None: nothing is removed for now."""
        self.counts = None if counts is None else list(counts)
        self.target = sum(counts or ())
        self.layer_target = sum(self.counts[family] for together in self.layers for family in together) if self.counts else 0

    def mark(self, scores_G: np.ndarray, pruned_G: np.ndarray, total: int) -> np.ndarray:
        """Newly redundant groups (bool [G]) that bring the number of pruned groups from `pruned_G` up to `total`.

        Lowest scores first; equal scores in the order of families and groups. Needs `pruned_G.sum() <= total <= target`.
        """
        assert int(pruned_G.sum()) <= total <= self.target, (int(pruned_G.sum()), total, self.target)
        scores = np.asarray(scores_G, dtype=np.float64)
        plan = self._plan(scores, pruned_G)
        order = plan[np.lexsort((plan, self._together(scores, pruned_G)[plan]))]
        chosen = np.zeros_like(pruned_G)
        chosen[order[: total - int(pruned_G.sum())]] = True
        return chosen

    def _plan(self, scores: np.ndarray, pruned: np.ndarray) -> np.ndarray:
        """Ids of all groups still to be removed to reach `target`, at the smallest sum of scores found."""
        ranked = [self._ranked(scores, pruned, f) for f in range(len(self.options))]
        done = [int(pruned[a:b].sum()) for a, b in pairwise(self.starts)]
        if self.counts is not None:
            left = zip(ranked, self.counts, done, strict=True)
            return np.concatenate([np.zeros(0, np.int64), *(ids[: count - have] for ids, count, have in left)])
        return np.concatenate([self._plan_groups(scores, ranked, done), self._plan_layers(scores, pruned)])

    def _plan_groups(self, scores: np.ndarray, ranked: list[np.ndarray], done: list[int]) -> np.ndarray:
        """The part of the plan that isn't residual branches."""
        layered = {family for together in self.layers for family in together}
        ties = [tie for tie in self.ties if tie[0] not in layered]
        needed = self.target - self.layer_target - sum(done[family] for tie in ties for family in tie)
        if self.largest == 1 and not self.binds:
            most = [(ranked[tie[0]], self.options[tie[0]][-1] - done[tie[0]]) for tie in sorted(ties)]
            candidates = np.concatenate([np.zeros(0, np.int64), *(ids[:limit] for ids, limit in most)])
            return candidates[np.lexsort((candidates, scores[candidates]))][:needed]
        sums = [np.concatenate([[0.0], np.cumsum(scores[ids])]) for ids in ranked]
        ways = [_ways(self.options[tie[0]], [done[f] for f in tie], [sums[f] for f in tie]) for tie in ties]
        longest = max((len(tie) * self.multiples[tie[0]] for tie in ties), default=1)
        stuck = self._misaligned(done, ties)
        found = _cheapest_counts([steps for steps, _ in ways], [costs for _, costs in ways], needed, longest, stuck=stuck)
        chosen = [np.zeros(0, np.int64)]
        for tie, count in zip(ties, found, strict=True):
            final = (sum(done[f] for f in tie) + count) // len(tie)
            chosen += [ranked[f][: final - done[f]] for f in tie]
        return np.concatenate(chosen)

    def _plan_layers(self, scores: np.ndarray, pruned: np.ndarray) -> np.ndarray:
        """The residual branches that are still to go: the lowest sums of units, without the last one left of each set."""
        ids = [[self.starts[list(unit)] for unit in together] for together in self.units]
        sets = [[Unit(len(unit), float(scores[unit[~pruned[unit]]].sum()), bool(pruned[unit].any())) for unit in one] for one in ids]
        chosen = zip(ids, cheapest(sets, self.layer_target), strict=True)
        found = np.concatenate([np.zeros(0, np.int64), *(one[place] for one, places in chosen for place in places)])
        left: np.ndarray = found[~pruned[found]]
        return left

    def _together(self, scores: np.ndarray, pruned: np.ndarray) -> np.ndarray:
        """The scores, of branches that go together the mean of those that are left, so that they go one after the other."""
        found = scores.copy()
        for unit in (self.starts[list(unit)] for together in self.units for unit in together if len(unit) > 1):
            left = unit[~pruned[unit]]
            found[left] = scores[left].mean() if len(left) else 0.0
        return found

    def _ranked(self, scores: np.ndarray, pruned: np.ndarray, family: int) -> np.ndarray:
        ids: np.ndarray = np.arange(self.starts[family], self.starts[family + 1])
        ids = ids[~pruned[ids]]
        return ids[np.argsort(scores[ids], kind="stable")]

    def _misaligned(self, done: list[int], ties: list[list[int]]) -> list[bool]:
        """Ties whose pruned counts aren't allowed as final ones, so that they have to go on."""
        return [len({done[f] for f in tie}) > 1 or done[tie[0]] not in set(self.options[tie[0]]) for tie in ties]


def removable_counts(size: int, multiple_of: int) -> list[int]:
    """How many groups of a family of `size` may be removed, ascending: 0, and `size - j * multiple_of` for every j >= 1."""
    largest_kept = (size - 1) // multiple_of * multiple_of
    return [0, *range(size - largest_kept, size, multiple_of)] if largest_kept > 0 else [0]


def nearest_feasible(options: Sequence[Sequence[int]], wanted: int) -> int:
    """The sum of one option per family that is nearest to `wanted`; the smaller one of two equally near."""
    possible = 1  # bit i = a total of i is possible
    for counts in options:
        possible = _shifted(possible, counts)
    return nearest(possible, wanted)


def _shifted(reachable: int, counts: Sequence[int]) -> int:
    """OR of `reachable << count` over the counts, which after the leading 0 are evenly spaced: doubling keeps it fast."""
    spaced = counts[1:]
    if not spaced:
        return reachable
    step = spaced[1] - spaced[0] if len(spaced) > 1 else 1
    span, covered = reachable << spaced[0], 1
    while covered < len(spaced):
        grow = min(covered, len(spaced) - covered)
        span |= span << (grow * step)
        covered += grow
    return reachable | span


def _ways(options: Sequence[int], done: Sequence[int], sums: Sequence[np.ndarray]) -> tuple[list[int], np.ndarray]:
    """How many further groups the families of one tie may lose together (without 0), and what that many cost.

    options: how many each may lose in the end. done: how many it has lost. sums: cost of its next i groups.
    """
    finals = np.array([count for count in options if count >= max(done) and len(done) * count > sum(done)], dtype=np.int64)
    steps = len(done) * finals - sum(done)
    costs = np.zeros(int(steps.max(initial=0)) + 1)
    costs[steps] = sum(each[finals - have] for each, have in zip(sums, done, strict=True))
    return steps.tolist(), costs


def _cheapest_counts(steps: list[list[int]], costs: list[np.ndarray], needed: int, multiple_of: int, *, stuck: list[bool]) -> list[int]:
    """How many further groups each tie loses so that together they lose `needed`.

    steps: allowed further counts per tie (without 0). costs: of losing so many further groups, by that number.
    stuck: ties that must not stop at 0.
    Takes whole increments in the order of their mean score until a window before the end, then solves the rest exactly.
    """
    window = _FIRST_WINDOW * multiple_of
    while True:
        counts = _greedy(steps, costs, needed - window)
        exact = _exact(steps, costs, counts, needed - sum(counts), stuck)
        if exact is not None:
            return exact
        assert window < needed, "the target was found feasible, so the widest window must reach it"
        window *= 4


def _greedy(steps: list[list[int]], costs: list[np.ndarray], limit: int) -> list[int]:
    counts = [0] * len(steps)
    increments = []
    for family, allowed in enumerate(steps):
        mean = -np.inf
        for low, high in pairwise([0, *allowed]):
            mean = max(mean, (costs[family][high] - costs[family][low]) / (high - low))
            increments.append((mean, family, high, high - low))
    taken = 0
    for _, family, count, size in sorted(increments):
        if taken + size > limit:
            break
        counts[family] = count
        taken += size
    return counts


def _exact(steps: list[list[int]], costs: list[np.ndarray], start: list[int], needed: int, stuck: list[bool]) -> list[int] | None:
    """Knapsack over the families: from `start`, the cheapest further counts that sum to `needed`; None if there are none."""
    best = np.full(needed + 1, np.inf)
    best[0] = 0.0
    choices = []
    for family, allowed in enumerate(steps):
        here = start[family]
        may_stay = here > 0 or not stuck[family]
        new = best.copy() if may_stay else np.full_like(best, np.inf)
        choice = np.zeros(needed + 1, dtype=np.int64)
        for count in allowed:
            size = count - here
            if not 0 < size <= needed:
                continue
            candidate = best[: needed + 1 - size] + (costs[family][count] - costs[family][here])
            better = candidate < new[size:]
            new[size:][better] = candidate[better]
            choice[size:][better] = size
        best = new
        choices.append(choice)
    if not np.isfinite(best[needed]):
        return None
    counts = list(start)
    left = needed
    for family in reversed(range(len(steps))):
        size = int(choices[family][left])
        counts[family] += size
        left -= size
    return counts
