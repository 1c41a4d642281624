"""The logic of HESSO-CRIC on host arrays: how its part of a run is laid out, which groups a cycle examines, when cycles end.

Source: HESSO-CRIC (arXiv 2409.09085), the corrective redundancy identification cycle.

Legend: `G` groups, `F` families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from geta.errors import ConfigError

PROBE_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class CyclePlan:
    """How the joint stage is spent: `probe_steps`, then at most `max_cycles` of `sampling_steps`, then `hybrid_steps`.

    tolerance: cycles end as soon as at most this many groups are left to examine.
    """

    probe_steps: int
    max_cycles: int
    sampling_steps: int
    hybrid_steps: int
    tolerance: int

    @classmethod
    def fit(
        cls,
        joint_steps: int | None,
        *,
        probe_steps: int,
        max_cycles: int,
        sampling_steps: int | None,
        hybrid_steps: int | None,
        tolerance: int,
    ) -> CyclePlan:
        """Check the settings against the length of the joint stage and fill in those left to us.

        joint_steps None: nothing is pruned, so that any length fits.
        hybrid_steps None: a third of what the probe leaves. sampling_steps None: what then remains, in `max_cycles` equal parts.
        Raises ConfigError when a setting is out of range or the parts don't fit.
        """
        _check("max_cycles", max_cycles, 1)
        _check("tolerance", tolerance, 0)
        left = 0 if joint_steps is None else joint_steps - probe_steps
        hybrid = max(1, left // 3) if hybrid_steps is None else _check("hybrid_steps", hybrid_steps, 1)
        sampling = (left - hybrid) // max_cycles if sampling_steps is None else _check("sampling_steps", sampling_steps, 1)
        if joint_steps is None:
            return cls(0, max_cycles, 0, 0, tolerance)
        needed = probe_steps + max_cycles * max(sampling, 1) + hybrid
        if needed > joint_steps:
            raise ConfigError(
                f"the joint stage has {joint_steps} steps, but {probe_steps} of the probe + max_cycles {max_cycles} * sampling_steps "
                f"{max(sampling, 1)} + hybrid_steps {hybrid} are {needed}: give schedule.joint more steps, or use fewer or shorter cycles"
            )
        return cls(probe_steps, max_cycles, sampling, hybrid, tolerance)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data, for checkpoints."""
        return asdict(self)


@dataclass(frozen=True)
class Cycle:
    """One cycle: number c from 1, the violating set V_c that it decays, and the history V_1 | ... | V_(c-1), both bool [G]."""

    number: int
    violating: np.ndarray
    history: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Groups that can't join the trial set: V_c and the history."""
        known: np.ndarray = self.violating | self.history
        return known

    def following(self, trial: np.ndarray, scores: np.ndarray, starts: np.ndarray, layers: Sequence[Sequence[int]] = ()) -> Cycle:
        """The next cycle: it examines the trial set, but never all groups of a family at once (see `spared`)."""
        return Cycle(self.number + 1, spared(trial & ~self.known, scores, starts, layers), self.known)

    def ending(self, following: Cycle, plan: CyclePlan) -> str:
        """Why cycles end after this one, in words; "" when `following` is to be done."""
        left = int(following.violating.sum())
        if left <= plan.tolerance:
            return f"after cycle {self.number} {left} groups were left to examine, at most tolerance = {plan.tolerance}"
        return f"max_cycles = {plan.max_cycles} cycles are done, {left} groups were not examined" if self.number >= plan.max_cycles else ""


def spared(chosen: np.ndarray, scores: np.ndarray, starts: np.ndarray, layers: Sequence[Sequence[int]] = ()) -> np.ndarray:
    """`chosen` without the highest-scored group of each family that it covers whole: an empty family would cut the network.

    layers: sets of families (by place) that are whole residual branches, of which a set counts as one family.
    """
    kept = chosen.copy()
    layered = {family for together in layers for family in together}
    blocks = [np.arange(start, end) for family, (start, end) in enumerate(pairwise(starts)) if family not in layered]
    for ids in [*blocks, *(starts[list(together)] for together in layers)]:
        if len(ids) and chosen[ids].all():
            kept[ids[int(np.argmax(scores[ids]))]] = False
    return kept


class Probe(NamedTuple):
    """One trial: the `groups` lowest groups of family number `family` are zero for one step."""

    family: int
    groups: int


def probes(sizes: Sequence[int], options: Sequence[Sequence[int]]) -> list[Probe]:
    """The trials of all families: a quarter, a half and three quarters of their groups, but no more than may be removed.

    sizes: groups per family. options: per family how many groups may be removed, ascending from 0.
    """
    found = []
    for family, (size, counts) in enumerate(zip(sizes, options, strict=True)):
        for share in PROBE_SHARES:
            trial = Probe(family, min(int(share * size), counts[-1]))
            if trial.groups and trial not in found:
                found.append(trial)
    return found


def probe_terms(losses: np.ndarray, trials: Sequence[Probe], sizes: Sequence[int]) -> np.ndarray:
    """Mean over a family's trials of loss / reference loss, divided by the size of the family [F]; 0 for families without a trial.

    losses: [1 + number of trials], the reference loss first.
    Raises ConfigError when the ratio makes no sense: a reference loss that isn't positive, or a loss that isn't finite.
    """
    if not (np.isfinite(losses).all() and losses[0] > 0):
        raise ConfigError(
            f"the probe compares losses by their ratio, but the reference loss is {losses[0]:g} and "
            f"{int((~np.isfinite(losses)).sum())} of {len(losses)} losses are not finite: use a positive loss, or probe_weight=0"
        )
    totals, counts = np.zeros(len(sizes)), np.zeros(len(sizes))
    for trial, loss in zip(trials, losses[1:], strict=True):
        totals[trial.family] += loss / losses[0]
        counts[trial.family] += 1
    terms: np.ndarray = totals / np.maximum(counts, 1) / np.maximum(np.asarray(sizes, dtype=np.float64), 1)
    return terms


def _check(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}: it must be a whole number, at least {least}")
    return value
