"""When each stage of QASSO happens: pure functions of the step number, fixed by one frozen record.

The run's steps `0 .. total_steps - 1` are cut into four consecutive stages; steps beyond the plan stay in cool-down.

    warm-up | projection (B periods) | joint (P periods) | cool-down

Source: GETA (arXiv 2502.16638) section 5, "QASSO". Stage lengths are our choice: the papers leave them to the user.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from geta.errors import ConfigError

Stage = Literal["warm-up", "projection", "joint", "cool-down"]

MAX_BITS = 16
DEFAULT_PROJECTION_PERIODS = 6
DEFAULT_JOINT_PERIODS = 5


class JointPosition(NamedTuple):
    """A step of the joint stage: period `period` (from 0), its step `k` of `length` steps, `length` = K_p."""

    period: int
    k: int
    length: int


@dataclass(frozen=True)
class Schedule:
    """The stage plan of one training run.

    total_steps:        planned optimizer steps.
    warmup:             length of the warm-up; an int is steps, a float is a fraction of `total_steps`.
    projection:         length of the projection stage, same convention.
    joint:              length of the joint stage, same convention. Cool-down is what remains.
    projection_periods: B, in how many equal reductions the upper bound falls; None = 6, or one per step if fewer.
    joint_periods:      P, in how many portions the K groups are pruned; None = 5, or one per step if fewer.
    initial_bits:       upper bound of every bit width before the projection stage.
    bit_step:           b_r, bits that the bound falls by at each period; None = exactly (initial_bits - b_u) / B,
                        which lands on b_u in the last period for any B.

    Raises ConfigError when the stages don't fit into `total_steps`, or a stage has fewer steps than periods.
    """

    total_steps: int
    warmup: int | float = 0.10
    projection: int | float = 0.15
    joint: int | float = 0.35
    projection_periods: int | None = None
    joint_periods: int | None = None
    initial_bits: int = MAX_BITS
    bit_step: float | None = None

    def __post_init__(self) -> None:
        if not _is_int(self.total_steps) or self.total_steps < 1:
            raise ConfigError(f"schedule.total_steps is {self.total_steps!r}: it must be a whole number of steps, at least 1")
        for name in ("warmup", "projection", "joint"):
            _check_length(name, getattr(self, name))
        if self.joint_start + self.joint_steps > self.total_steps:
            raise ConfigError(
                f"the schedule is longer than the run: warmup {self.warmup_steps} + projection {self.projection_steps} + "
                f"joint {self.joint_steps} steps exceed schedule.total_steps = {self.total_steps}; shorten a stage or train longer"
            )
        _check_periods("projection_periods", self.projection_periods, "projection", self.projection_steps)
        _check_periods("joint_periods", self.joint_periods, "joint", self.joint_steps)
        if not _is_int(self.initial_bits) or not 2 <= self.initial_bits <= MAX_BITS:
            raise ConfigError(f"schedule.initial_bits is {self.initial_bits!r}: it must be a whole number from 2 to {MAX_BITS}")
        if self.bit_step is not None and not self.bit_step > 0:
            raise ConfigError(f"schedule.bit_step is {self.bit_step!r}: it must be a positive number of bits, or None")

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return _steps(self.warmup, self.total_steps)

    @property
    def projection_steps(self) -> int:
        """Steps of the projection stage."""
        return _steps(self.projection, self.total_steps)

    @property
    def joint_steps(self) -> int:
        """Steps of the joint stage."""
        return _steps(self.joint, self.total_steps)

    @property
    def joint_start(self) -> int:
        """First step of the joint stage."""
        return self.warmup_steps + self.projection_steps

    @property
    def cooldown_start(self) -> int:
        """First step of the cool-down; groups and bits are final from here on."""
        return self.joint_start + self.joint_steps

    @property
    def num_projection_periods(self) -> int:
        """B after defaults (0 when there is no projection stage)."""
        return _periods(self.projection_periods, DEFAULT_PROJECTION_PERIODS, self.projection_steps)

    @property
    def num_joint_periods(self) -> int:
        """P after defaults (0 when there is no joint stage)."""
        return _periods(self.joint_periods, DEFAULT_JOINT_PERIODS, self.joint_steps)

    def stage_at(self, step: int) -> Stage:
        """The stage that step `step` (from 0) belongs to; everything after the plan is cool-down."""
        if step < self.warmup_steps:
            return "warm-up"
        if step < self.joint_start:
            return "projection"
        return "joint" if step < self.cooldown_start else "cool-down"

    def upper_bits_at(self, step: int, target: int) -> float:
        """Upper bound in bits at `step` for a tensor whose own upper bound is `target` (b_u).

            period j of B:  bound = max(target, initial_bits - (j + 1) * b_r),   b_r = (initial_bits - target) / B by default

        `initial_bits` during warm-up, exactly `target` in the last projection period and ever after.
        """
        if step < self.warmup_steps:
            return float(self.initial_bits)
        periods, elapsed = self.num_projection_periods, step - self.warmup_steps
        if elapsed >= self.projection_steps:
            return float(target)
        period = _period_of(elapsed, self.projection_steps, periods)
        if period == periods - 1:
            return float(target)
        fall = (self.initial_bits - target) / periods if self.bit_step is None else self.bit_step
        return max(float(target), self.initial_bits - (period + 1) * fall)

    def joint_at(self, step: int) -> JointPosition:
        """Where in the joint stage `step` is. Period p covers `[J p // P, J (p + 1) // P)` of the stage's J steps."""
        assert self.stage_at(step) == "joint", step
        elapsed, length, periods = step - self.joint_start, self.joint_steps, self.num_joint_periods
        period = _period_of(elapsed, length, periods)
        start, end = length * period // periods, length * (period + 1) // periods
        return JointPosition(period, elapsed - start, end - start)

    def left_to_settle(self, step: int) -> int:
        """Steps until bit widths are fixed, this one included, within the last period before the cool-down; 0 before it and after."""
        left = self.cooldown_start - step
        length, periods = (
            (self.joint_steps, self.num_joint_periods) if self.joint_steps else (self.projection_steps, self.num_projection_periods)
        )
        last = length - length * (periods - 1) // periods if length else 0
        return left if 0 < left <= last else 0

    def pruned_target(self, period: int, groups: int) -> int:
        """Groups marked by the end of joint period `period` (from 0) out of `groups` = K: `floor(K (period + 1) / P)`."""
        return groups * (period + 1) // self.num_joint_periods

    def is_period_start(self, step: int) -> bool:
        """True at the first step of every projection and joint period and of the cool-down."""
        stage = self.stage_at(step)
        if stage == "joint":
            return self.joint_at(step).k == 0
        if stage == "projection":
            elapsed, length, periods = step - self.warmup_steps, self.projection_steps, self.num_projection_periods
            return elapsed == 0 or _period_of(elapsed, length, periods) != _period_of(elapsed - 1, length, periods)
        return stage == "cool-down" and step == self.cooldown_start

    def check_bits(self, target: int, where: str) -> None:
        """Raise ConfigError when the bound can't get from `initial_bits` to exactly `target` (b_u of setting `where`)."""
        if target > self.initial_bits:
            raise ConfigError(
                f"{where} has the upper bound {target} bits, above schedule.initial_bits = {self.initial_bits}: "
                f"raise initial_bits to at least {target} or lower the bound"
            )
        periods = self.num_projection_periods
        if self.bit_step is not None and periods and self.initial_bits - self.bit_step * periods > target:
            raise ConfigError(
                f"schedule.bit_step = {self.bit_step} over projection_periods = {periods} falls from {self.initial_bits} only to "
                f"{self.initial_bits - self.bit_step * periods:g} bits, not to the upper bound {target} of {where}: use bit_step >= "
                f"{(self.initial_bits - target) / periods:g}, more periods, or bit_step=None (always lands exactly)"
            )

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data, for checkpoints."""
        return asdict(self)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_length(name: str, value: int | float) -> None:
    if _is_int(value):
        if value < 0:
            raise ConfigError(f"schedule.{name} is {value} steps: it can't be negative")
    elif not isinstance(value, float) or not 0.0 <= value <= 1.0:
        raise ConfigError(f"schedule.{name} is {value!r}: give steps as an int >= 0 or a fraction of the run as a float in [0, 1]")


def _steps(length: int | float, total: int) -> int:
    """A stage's steps; a fraction above 0 is at least one step."""
    if isinstance(length, int):
        return length
    return 0 if length == 0.0 else max(1, int(length * total + 0.5))


def _check_periods(name: str, periods: int | None, stage: str, steps: int) -> None:
    if periods is None or (_is_int(periods) and 1 <= periods <= max(steps, 1)):
        return
    raise ConfigError(
        f"schedule.{name} is {periods!r}: it must be a whole number from 1 to the {steps} steps of the {stage} stage; "
        f"use fewer periods or a longer stage"
    )


def _periods(periods: int | None, default: int, steps: int) -> int:
    return min(periods or default, steps)


def _period_of(elapsed: int, length: int, periods: int) -> int:
    """The p with `length * p // periods <= elapsed < length * (p + 1) // periods`."""
    return ((elapsed + 1) * periods - 1) // length
