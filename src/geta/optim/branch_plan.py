"""Which whole residual branches go: units of one branch, or of all branches of a block, in sets of which at least one unit stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Branches that go together. size: how many. cost: the sum of the scores of those that are still there. begun: one of them is gone."""

    size: int
    cost: float
    begun: bool = False


def reachable(sizes: Sequence[Sequence[int]]) -> int:
    """How many branches may go in all, as bits: bit i = i of them. sizes: of the units of each set."""
    found = 1
    for together in sizes:
        own = 1
        for size in together:
            own |= own << size
        own &= (1 << sum(together)) - 1  # without "all of them"
        found = sum_of(found, own)
    return found


def sum_of(one: int, other: int) -> int:
    """All sums of a number of the one and a number of the other, as bits."""
    found, place = 0, 0
    while other >> place:
        if other >> place & 1:
            found |= one << place
        place += 1
    return found


def nearest(possible: int, wanted: int) -> int:
    """The number (a bit of `possible`) that is nearest to `wanted`; the smaller one of two equally near."""
    below = possible & ((1 << (wanted + 1)) - 1)
    lower = below.bit_length() - 1
    above = possible >> (wanted + 1)
    if not above:
        return lower
    upper = wanted + (above & -above).bit_length()
    return lower if wanted - lower <= upper - wanted else upper


def cheapest(sets: Sequence[Sequence[Unit]], total: int) -> list[list[int]]:
    """The units of each set (by place) that have `total` branches in all, at the smallest sum of costs; those begun are among them."""
    best: dict[int, tuple[float, tuple[tuple[int, int], ...]]] = {0: (0.0, ())}
    for number, together in enumerate(sets):
        own = _within(number, together)
        joined: dict[int, tuple[float, tuple[tuple[int, int], ...]]] = {}
        for had, (cost, chosen) in best.items():
            for more, (extra, units) in own.items():
                if had + more <= total and (had + more not in joined or cost + extra < joined[had + more][0]):
                    joined[had + more] = (cost + extra, (*chosen, *units))
        best = joined
    assert total in best, "the number was found possible, and nothing is begun that isn't part of a plan"
    found: list[list[int]] = [[] for _ in sets]
    for number, place in best[total][1]:
        found[number].append(place)
    return found


def _within(number: int, together: Sequence[Unit]) -> dict[int, tuple[float, tuple[tuple[int, int], ...]]]:
    """The same for one set: {branches: (costs, units)}, without all of them."""
    best: dict[int, tuple[float, tuple[tuple[int, int], ...]]] = {0: (0.0, ())}
    for place, unit in enumerate(together):
        taken = {size + unit.size: (cost + unit.cost, (*chosen, (number, place))) for size, (cost, chosen) in best.items()}
        if unit.begun:
            best = taken
            continue
        for size, option in taken.items():
            if size not in best or option[0] < best[size][0]:
                best[size] = option
    best.pop(sum(unit.size for unit in together), None)
    return best
