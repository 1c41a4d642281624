"""The logic of the cycle on plain arrays: plan, history, trial sets, termination, probes."""

from __future__ import annotations

import numpy as np
import pytest

from geta.errors import ConfigError
from geta.optim.cycle import Cycle, CyclePlan, Probe, probe_terms, probes, spared


def flags(*chosen: int, size: int = 6) -> np.ndarray:
    return np.isin(np.arange(size), chosen)


def plan(joint: int | None = 60, **options) -> CyclePlan:
    defaults = {"probe_steps": 0, "max_cycles": 3, "sampling_steps": None, "hybrid_steps": None, "tolerance": 0}
    return CyclePlan.fit(joint, **{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0, 3, 13, 20)),
        ({"probe_steps": 10}, (10, 3, 11, 16)),
        ({"max_cycles": 1, "hybrid_steps": 59}, (0, 1, 1, 59)),
        ({"sampling_steps": 5}, (0, 3, 5, 20)),
        ({"joint": None, "sampling_steps": 500}, (0, 3, 0, 0)),
    ],
)
def test_what_is_left_open_fills_the_joint_stage(options, expected):
    made = plan(**options)
    assert (made.probe_steps, made.max_cycles, made.sampling_steps, made.hybrid_steps) == expected
    assert made.probe_steps + made.max_cycles * made.sampling_steps + made.hybrid_steps <= 60


@pytest.mark.parametrize("options", [{"joint": 3}, {"hybrid_steps": 58}, {"sampling_steps": 14}, {"probe_steps": 60}, {"max_cycles": True}])
def test_what_does_not_fit_is_refused(options):
    with pytest.raises(ConfigError):
        plan(**options)


def test_history_grows_and_nothing_is_examined_twice():
    starts, scores = np.array([0, 6]), np.arange(6.0)
    one = Cycle(1, flags(0, 1), flags())
    two = one.following(flags(1, 2, 3), scores, starts)
    assert (two.number, two.violating.tolist(), two.history.tolist()) == (2, flags(2, 3).tolist(), flags(0, 1).tolist())
    three = two.following(flags(0, 2, 4), scores, starts)
    assert (three.violating.tolist(), three.history.tolist()) == (flags(4).tolist(), flags(0, 1, 2, 3).tolist())
    assert three.known.tolist() == flags(0, 1, 2, 3, 4).tolist()


def test_cycles_end_by_tolerance_or_by_number():
    starts, scores = np.array([0, 6]), np.arange(6.0)
    one = Cycle(1, flags(0, 1), flags())
    two = one.following(flags(2), scores, starts)
    assert one.ending(two, plan()) == ""
    assert one.ending(two, plan(tolerance=1)) == "after cycle 1 1 groups were left to examine, at most tolerance = 1"
    assert one.ending(two, plan(max_cycles=1)) == "max_cycles = 1 cycles are done, 1 groups were not examined"
    assert "0 groups were left" in one.ending(one.following(flags(), scores, starts), plan())


def test_no_family_is_examined_whole():
    starts = np.array([0, 2, 2, 6])
    kept = spared(flags(0, 1, 3, 4), np.array([5.0, 4.0, 0, 0, 0, 0]), starts)
    assert kept.tolist() == flags(1, 3, 4).tolist()
    assert not spared(flags(0, size=1), np.zeros(1), np.array([0, 1])).any()


def test_probes_are_shares_that_may_be_removed():
    found = probes([8, 1, 2, 5], [list(range(8)), [0], [0, 1], [0, 1]])
    assert found == [Probe(0, 2), Probe(0, 4), Probe(0, 6), Probe(2, 1), Probe(3, 1)]


def test_the_probe_term_is_the_mean_relative_loss_by_size():
    trials = [Probe(0, 1), Probe(0, 2), Probe(2, 1)]
    terms = probe_terms(np.array([2.0, 4.0, 8.0, 2.0]), trials, [3, 5, 4])
    assert terms.tolist() == pytest.approx([(2 + 4) / 2 / 3, 0.0, 1 / 4])


@pytest.mark.parametrize("losses", [[0.0, 1.0], [-1.0, 1.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_losses_without_a_sensible_ratio_are_refused(losses):
    with pytest.raises(ConfigError, match="the probe compares losses by their ratio"):
        probe_terms(np.array(losses), [Probe(0, 1)], [2])
