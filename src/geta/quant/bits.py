"""The bit widths that a quantized tensor may end up with."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geta.errors import ConfigError

SMALLEST, LARGEST = 2, 16
_DESCENDING = range(LARGEST, SMALLEST - 1, -1)


@dataclass(frozen=True)
class Bits:
    """Bit widths from `lower` to `upper`, both included, in bits per element; with `only`, no others than these.

    only: ascending, from `lower` to `upper`: what a device has integers for, e.g. `Bits.of({4, 8})` = Bits(4, 8, (4, 8)). None = every
        whole number of bits.

    Raises ConfigError unless all are integers with 2 <= lower <= upper <= 16.
    """

    lower: int
    upper: int
    only: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for value in (self.lower, self.upper, *(self.only or ())):
            if type(value) is not int:
                raise ConfigError(f"bits: {value!r} is not a whole number of bits; write e.g. Bits(4, 8)")
        if not SMALLEST <= self.lower <= self.upper <= LARGEST:
            raise ConfigError(
                f"bits: ({self.lower}, {self.upper}) is impossible; needed is {SMALLEST} <= lower <= upper <= {LARGEST}, "
                "e.g. Bits(4, 8), or Bits(8, 8) for exactly 8 bits"
            )
        if self.only is None:
            return
        if list(self.only) != sorted(set(self.only)) or (self.only[:1], self.only[-1:]) != ((self.lower,), (self.upper,)):
            raise ConfigError(f"bits: only={self.only!r} must rise from lower = {self.lower} to upper = {self.upper}; write e.g. {{4, 8}}")
        if len(self.only) == self.upper - self.lower + 1:
            object.__setattr__(self, "only", None)

    @property
    def widths(self) -> tuple[int, ...]:
        """All of them, ascending."""
        return tuple(range(self.lower, self.upper + 1)) if self.only is None else self.only

    def to_json(self) -> Any:
        """Plain data: [lower, upper], or {"only": [...]}."""
        return [self.lower, self.upper] if self.only is None else {"only": [*self.only]}

    def __str__(self) -> str:
        return f"{self.lower}-{self.upper}" if self.only is None else " or ".join(map(str, self.only))

    @classmethod
    def of(cls, value: BitsLike) -> Bits:
        """Bits from what users write: Bits(4, 8), (4, 8), {4, 8} for one of these two, or 8 for exactly 8 bits."""
        if isinstance(value, Bits):
            return value
        if isinstance(value, int):
            return cls(value, value)
        if isinstance(value, AbstractSet) and value and all(type(width) is int for width in value):
            return cls(min(value), max(value), tuple(sorted(value)))
        if isinstance(value, list | tuple) and len(value) == 2:
            return cls(value[0], value[1])
        raise ConfigError(f"bits: {value!r} is not a range of bit widths; write e.g. Bits(4, 8), (4, 8), {{4, 8}} or 8")


def allowed_widths(bits: Sequence[Bits], device: torch.device) -> Tensor:
    """Which widths from LARGEST down to SMALLEST each of these allows [L, 15]."""
    return torch.tensor([[width in one.widths for width in _DESCENDING] for one in bits], dtype=torch.bool, device=device)


def nearest(bits: Tensor, allowed: Tensor) -> Tensor:
    """The allowed width nearest to each of `bits`, the wider one of two that are equally near.

    allowed: rows of `allowed_widths` that broadcast against `bits` [..., 15].
    """
    widths = torch.arange(LARGEST, SMALLEST - 1, -1, dtype=bits.dtype, device=bits.device)
    distance = (bits.unsqueeze(-1) - widths).abs().masked_fill(~allowed, torch.inf)
    return widths[distance.argmin(dim=-1)]


BitsLike = Bits | Sequence[int] | AbstractSet[int] | int
"""What users may write for bit widths, see `Bits.of`."""
