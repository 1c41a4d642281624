"""The stage plan: stages, periods and the path of the upper bound."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geta.errors import ConfigError
from geta.optim import Schedule


@st.composite
def schedules(draw):
    warmup, projection, joint, rest = (draw(st.integers(0, 40)) for _ in range(4))
    total = warmup + projection + joint + rest
    if total == 0:
        rest = total = 1
    return Schedule(
        total,
        warmup=warmup,
        projection=projection,
        joint=joint,
        projection_periods=draw(st.none() | st.integers(1, max(projection, 1))),
        joint_periods=draw(st.none() | st.integers(1, max(joint, 1))),
        initial_bits=draw(st.integers(8, 16)),
    )


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_stages_follow_each_other_with_the_given_lengths(schedule):
    order = ["warm-up", "projection", "joint", "cool-down"]
    stages = [schedule.stage_at(step) for step in range(schedule.total_steps + 3)]
    assert sorted(stages, key=order.index) == stages
    assert stages.count("warm-up") == schedule.warmup
    assert stages.count("projection") == schedule.projection
    assert stages.count("joint") == schedule.joint
    assert stages[-1] == "cool-down"


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(2, 8))
def test_the_bound_falls_from_the_initial_bits_to_exactly_the_target(schedule, target):
    bounds = [schedule.upper_bits_at(step, target) for step in range(schedule.total_steps + 3)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[: schedule.warmup] == [schedule.initial_bits] * schedule.warmup
    assert all(bound == target for bound in bounds[schedule.joint_start :])
    falling = bounds[schedule.warmup : schedule.joint_start]
    if falling:
        assert falling[-1] == target
        expected = schedule.num_projection_periods if target < schedule.initial_bits else 1
        assert len(set(falling)) == expected


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(0, 1000))
def test_joint_periods_cover_the_stage_and_end_at_the_target(schedule, groups):
    positions = [schedule.joint_at(step) for step in range(schedule.joint_start, schedule.cooldown_start)]
    periods = schedule.num_joint_periods
    assert sorted({position.period for position in positions}) == list(range(periods))
    for period in range(periods):
        mine = [position for position in positions if position.period == period]
        assert [position.k for position in mine] == list(range(len(mine)))
        assert {position.length for position in mine} == {len(mine)}
        assert schedule.pruned_target(period, groups) == groups * (period + 1) // periods
    if periods:
        assert schedule.pruned_target(periods - 1, groups) == groups


@settings(max_examples=40, deadline=None)
@given(schedules())
def test_period_starts(schedule):
    starts = [step for step in range(schedule.total_steps) if schedule.is_period_start(step)]
    begins_cooldown = 1 if schedule.cooldown_start < schedule.total_steps else 0
    assert len(starts) == schedule.num_projection_periods + schedule.num_joint_periods + begins_cooldown


@pytest.mark.parametrize("total", [3, 5, 8, 20, 100, 12345])
def test_the_defaults_work_for_any_length(total):
    schedule = Schedule(total)
    assert min(schedule.warmup_steps, schedule.projection_steps, schedule.joint_steps) >= 1
    assert schedule.cooldown_start <= total
    assert schedule.upper_bits_at(schedule.joint_start, 8) == 8.0


def test_fractions_and_steps_mean_what_they_say():
    schedule = Schedule(200, warmup=7, projection=0.25, joint=0.5)
    assert (schedule.warmup_steps, schedule.projection_steps, schedule.joint_steps) == (7, 50, 100)
    assert Schedule(200, joint=1).joint_steps == 1
    assert Schedule(200, warmup=0.0, projection=0.0, joint=1.0).joint_steps == 200


def test_an_explicit_bit_step_stops_at_the_target():
    schedule = Schedule(40, warmup=0, projection=20, projection_periods=5, bit_step=3.0)
    schedule.check_bits(8, "here")
    assert [schedule.upper_bits_at(step, 8) for step in (0, 4, 8, 12, 16)] == [13.0, 10.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"total_steps": 0}, "total_steps is 0"),
        ({"total_steps": 10.0}, "total_steps is 10.0"),
        ({"total_steps": 10, "joint": 20}, "longer than the run"),
        ({"total_steps": 10, "warmup": 0.5, "joint": 0.6}, "longer than the run"),
        ({"total_steps": 10, "warmup": -1}, "negative"),
        ({"total_steps": 10, "warmup": 1.5}, "fraction"),
        ({"total_steps": 10, "warmup": True}, "fraction"),
        ({"total_steps": 100, "joint": 5, "joint_periods": 6}, "joint_periods is 6"),
        ({"total_steps": 100, "joint_periods": 0}, "joint_periods is 0"),
        ({"total_steps": 100, "projection_periods": 16}, "projection_periods is 16"),
        ({"total_steps": 100, "initial_bits": 17}, "initial_bits is 17"),
        ({"total_steps": 100, "bit_step": 0}, "bit_step is 0"),
    ],
)
def test_impossible_schedules_are_refused(settings_, words):
    with pytest.raises(ConfigError, match=words):
        Schedule(**settings_)


def test_bounds_that_the_path_can_not_reach_are_refused():
    with pytest.raises(ConfigError, match=r"falls from 16 only to 11 bits.*bit_step >= 1.6"):
        Schedule(100, projection_periods=5, bit_step=1.0).check_bits(8, "quantizer 'conv.weight'")
    with pytest.raises(ConfigError, match=r"above schedule.initial_bits = 8"):
        Schedule(100, initial_bits=8).check_bits(9, "quantizer 'conv.weight'")
