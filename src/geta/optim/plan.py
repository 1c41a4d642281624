"""Which counts of groups and which bit widths meet a budget at the smallest loss of importance: an integer program.

    min   sum_i loss_i(v_i)      over one candidate value v_i of every coordinate i (a family's removed groups, a quantizer's bits)
    s.t.  cost_k(v) <= limit_k   for every limited kind of cost k

Costs are products of several coordinates (MACs of a layer shrink with both of its families, BOPs with bits as well, a predicted latency
is interpolated between measured points), so this is no linear program. It is solved in three parts, all of which look at exact costs:

1. Start. Four points within the limits: all coordinates have gone the same share of their way, or all families first, or all
   quantizers first; and coordinate descent on `loss + price * sum_k cost_k / limit_k` at the smallest price that suffices (bisection).
2. Polish. Around a point, the effect of each coordinate alone is exact; their sum is the linear model of a 0-1 program with one
   choice per coordinate (`scipy.optimize.milp`). Its solution is taken if its exact costs are within the limits and it loses
   less; else the limits of the next try are tightened by what was exceeded, then the candidates drawn closer around the point.
3. Fill. Coordinates take single steps back while the limits hold, until none can: so at the end *no* family could keep one more
   block of groups and *no* quantizer have one more bit. That is how close to the budget a plan comes.

A global optimum is not proven: part 2 is successive linear programming, which stops at a point that no combination of moves within
the linear model improves. Against enumeration on 100 random problems of 5 coordinates it found the optimum 96 times; the loss was
0.4 % above it on average and 29 % at worst (`tests/optim/test_plan.py` bounds it). No time limits and no randomness: equal inputs
give equal plans.

Legend: `I` coordinates, `C` candidates of one, `K` kinds of cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from geta.cost.model import CostModel, CostMoves

_MARGINS = (0.0, 1e-12, 1e-6)
"""Shares by which the limits are lowered, one after the other, should rounding in floats have hidden that an exact cost is above its."""
_SAMPLES = 24
"""Candidates of a coordinate looked at in coordinate descent."""
_POLISHED = 3
_POLISHES = 16
_TIGHTENINGS = 3
_BISECTIONS = 12
_STEPS = 2.0**20
_OPTIONS = {"mip_rel_gap": 1e-3, "node_limit": 100}
_WORTH = 1e-4
"""A polishing step has to save this share of the loss."""


@dataclass(frozen=True)
class Coordinate:
    """One decision: `values` [C] from the dearest (index 0) to the cheapest, `losses` [C] that go with them, not falling.

    number: of the family or the quantizer in the cost model; bits: which of the two it is.
    """

    number: int
    bits: bool
    values: np.ndarray
    losses: np.ndarray


def smallest_costs(model: CostModel, coordinates: Sequence[Coordinate]) -> dict[str, float]:
    """The costs with every coordinate at its cheapest value; no plan goes below any of them."""
    removed, bits = _point(model, coordinates, [len(one.values) - 1 for one in coordinates])
    return model.evaluate(removed, bits)


def solve(model: CostModel, coordinates: Sequence[Coordinate], limits: dict[str, float]) -> list[int]:
    """The chosen candidate's index for every coordinate. `smallest_costs` must be within the limits."""
    for margin in _MARGINS:
        chosen = _Search(model, coordinates, {kind: limit * (1.0 - margin) for kind, limit in limits.items()}).run()
        reached = model.evaluate(*_point(model, coordinates, chosen))
        if all(reached[kind] <= limit for kind, limit in limits.items()):
            return chosen
    return [len(one.values) - 1 for one in coordinates]


def _point(model: CostModel, coordinates: Sequence[Coordinate], chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    removed, bits = np.zeros(len(model.families), dtype=np.int64), np.zeros(len(model.quantizers))
    for one, place in zip(coordinates, chosen, strict=True):
        (bits if one.bits else removed)[one.number] = one.values[place]
    return removed, bits


class _Search:
    def __init__(self, model: CostModel, coordinates: Sequence[Coordinate], limits: dict[str, float]) -> None:
        self._coordinates = list(coordinates)
        self._kinds = [number for number, kind in enumerate(model.kinds) if kind in limits]
        self._limits = np.array([limits[model.kinds[number]] for number in self._kinds], dtype=np.float64)
        self._last = [len(one.values) - 1 for one in self._coordinates]
        self._chosen = [0] * len(self._coordinates)
        self._moves = CostMoves(model, _point(model, coordinates, self._chosen)[1])

    def run(self) -> list[int]:
        if self._fits():
            return self._chosen
        groups, widths = ([one.bits is bits for one in self._coordinates] for bits in (False, True))
        starts: list[tuple[float, list[int]]] = []
        found: list[tuple[float, list[int]]] = []
        for first in (groups, widths, [True] * len(groups), None):
            if first is None:
                self._descend()
            else:
                self._equal_shares(first)
            self._fill()
            starts.append((self._loss(), list(self._chosen)))
        for _, start in sorted(starts)[:_POLISHED]:
            self._go(start)
            self._polish()
            found.append((self._loss(), list(self._chosen)))
        return min(found)[1]

    def _fits(self) -> bool:
        return bool((self._moves.cost[self._kinds] <= self._limits).all())

    def _loss(self) -> float:
        return float(sum(one.losses[place] for one, place in zip(self._coordinates, self._chosen, strict=True)))

    def _go(self, chosen: Sequence[int]) -> None:
        self._chosen = list(chosen)
        self._moves.move_to(*_point(self._moves.model, self._coordinates, self._chosen))

    def _set(self, i: int, place: int) -> None:
        one = self._coordinates[i]
        self._chosen[i] = place
        if one.bits:
            self._moves.set_bits(one.number, float(one.values[place]))
        else:
            self._moves.set_removed(one.number, int(one.values[place]))

    def _deltas(self, i: int, places: np.ndarray) -> np.ndarray:
        """Changes of the limited costs [K, C] if coordinate i took these candidates."""
        one = self._coordinates[i]
        change = self._moves.bits_deltas if one.bits else self._moves.removal_deltas
        deltas: np.ndarray = change(one.number, one.values[places])
        return deltas[self._kinds]

    def _equal_shares(self, first: Sequence[bool]) -> None:
        """The `first` coordinates all the same share of their way, then the others; the smallest shares that fit."""
        fixed = [0] * len(first)
        for moving in (list(first), [not one for one in first]):
            low, high = 0.0, 1.0
            for _ in range(_BISECTIONS):
                share = (low + high) / 2
                self._go(self._shared(fixed, moving, share))
                low, high = (low, share) if self._fits() else (share, high)
            fixed = self._shared(fixed, moving, high)
        self._go(fixed)

    def _shared(self, fixed: Sequence[int], moving: Sequence[bool], share: float) -> list[int]:
        """`share` of the way for those that move."""
        return [int(np.ceil(share * last)) if moves else place for place, moves, last in zip(fixed, moving, self._last, strict=True)]

    def _descend(self) -> None:
        """Coordinate descent from the dearest point, at the smallest price that leads within the limits."""
        samples = [np.unique(np.linspace(0, last, min(last + 1, _SAMPLES)).round().astype(np.int64)) for last in self._last]
        low, high, best = -5.0, 5.0, list(self._last)
        for _ in range(_BISECTIONS):
            exponent = (low + high) / 2
            self._go([0] * len(self._last))
            self._settle(10.0**exponent, samples)
            if self._fits():
                high, best = exponent, list(self._chosen)
            else:
                low = exponent
        self._go(best)

    def _settle(self, price: float, samples: list[np.ndarray]) -> None:
        for _ in range(3):
            before = list(self._chosen)
            for i, places in enumerate(samples):
                if self._last[i]:
                    costs = (self._deltas(i, places) / self._limits[:, None]).sum(axis=0)
                    self._set(i, int(places[np.argmin(self._coordinates[i].losses[places] + price * costs)]))
            if before == self._chosen:
                return

    def _fill(self) -> None:
        """Take steps back, those that save most loss per cost first; long steps before short ones, until not even one fits."""
        stride = 1 << max(self._last, default=1).bit_length()
        while stride:
            moved = True
            while moved:
                moved = False
                for i in self._by_gain(stride):
                    place = self._chosen[i] - stride
                    if place >= 0 and (self._moves.cost[self._kinds] + self._deltas(i, np.array([place]))[:, 0] <= self._limits).all():
                        self._set(i, place)
                        moved = True
            self._go(self._chosen)  # sums in floats don't drift
            stride //= 4 if stride > 2 else 2

    def _by_gain(self, stride: int) -> list[int]:
        gains = []
        for i, one in enumerate(self._coordinates):
            if self._chosen[i] >= stride:
                place = self._chosen[i] - stride
                cost = float((self._deltas(i, np.array([place]))[:, 0] / self._limits).max())
                gains.append((-(one.losses[self._chosen[i]] - one.losses[place]) / max(cost, 1e-30), i))
        return [i for _, i in sorted(gains)]

    def _polish(self) -> None:
        """Take better points that the linear model proposes, within a reach that narrows when it proposes nothing that holds."""
        reach = max(self._last, default=0)
        for _ in range(_POLISHES):
            if not self._improve(reach):
                if reach <= 1:
                    return
                reach = max(1, reach // 4)

    def _improve(self, reach: int) -> bool:
        """One step of the polish; False, with nothing changed, when no proposal is better and within the limits."""
        before, start = self._loss(), list(self._chosen)
        tightened = np.zeros(len(self._kinds))
        for _ in range(_TIGHTENINGS):
            proposed = self._linear_choice(reach, tightened)
            if proposed is None or proposed == start:
                return False
            self._go(proposed)
            excess = np.maximum(self._moves.cost[self._kinds] - self._limits, 0.0)
            if not excess.any():
                self._fill()
                if self._loss() < before * (1.0 - _WORTH):
                    return True
                self._go(start)
                return False
            self._go(start)
            tightened += excess
        return False

    def _linear_choice(self, reach: int, tightened: np.ndarray) -> list[int] | None:
        """The best combination of single moves, as if their costs added up; None when there is none within the limits."""
        places = [_around(chosen, last, reach) for chosen, last in zip(self._chosen, self._last, strict=True)]
        losses = np.concatenate([one.losses[near] for one, near in zip(self._coordinates, places, strict=True)])
        deltas = np.concatenate([self._deltas(i, near) for i, near in enumerate(places)], axis=1)
        counts = [len(near) for near in places]
        rows = np.repeat(np.arange(len(counts)), counts)
        one_each = csr_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(counts), len(rows)))
        room = self._limits - self._moves.cost[self._kinds] - tightened
        # Coefficients in steps of 2^-20, rounded to the safe side: the solver's own tolerances then decide nothing.
        scales = np.maximum(np.abs(deltas).max(axis=1), 1e-30) / _STEPS
        steps, most = np.ceil(deltas / scales[:, None]) / _STEPS, np.floor(room / scales) / _STEPS
        constraints = [LinearConstraint(one_each, 1.0, 1.0), LinearConstraint(steps, -np.inf, most)]
        objective = np.round(losses / max(float(losses.max()), 1e-30) * _STEPS) / _STEPS
        found = milp(objective, constraints=constraints, bounds=Bounds(0, 1), integrality=np.ones(len(losses)), options=_OPTIONS)
        if found.x is None:
            return None
        picks = np.split(found.x, np.cumsum(counts)[:-1])
        return [int(near[int(np.argmax(pick))]) for near, pick in zip(places, picks, strict=True)]


def _around(chosen: int, last: int, reach: int) -> np.ndarray:
    """Candidates around one: all of the nearest, then at distances that double."""
    steps = [0, 1, 2, 3]
    while steps[-1] < reach:
        steps.append(steps[-1] * 2 - (steps[-1] == 3) * 2)
    near = sorted({chosen + sign * step for step in steps if step <= reach for sign in (-1, 1) if 0 <= chosen + sign * step <= last})
    return np.array(near, dtype=np.int64)
