"""The range of bit widths that a quantized tensor must end up in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from geta.errors import ConfigError

SMALLEST, LARGEST = 2, 16


@dataclass(frozen=True)
class Bits:
    """Bit widths `lower` to `upper`, both included, in bits per element.

    Raises ConfigError unless both are integers with 2 <= lower <= upper <= 16.
    """

    lower: int
    upper: int

    def __post_init__(self) -> None:
        for value in (self.lower, self.upper):
            if type(value) is not int:
                raise ConfigError(f"bits: {value!r} is not a whole number of bits; write e.g. Bits(4, 8)")
        if not SMALLEST <= self.lower <= self.upper <= LARGEST:
            raise ConfigError(
                f"bits: ({self.lower}, {self.upper}) is impossible; needed is {SMALLEST} <= lower <= upper <= {LARGEST}, "
                "e.g. Bits(4, 8), or Bits(8, 8) for exactly 8 bits"
            )

    @classmethod
    def of(cls, value: Bits | Sequence[int] | int) -> Bits:
        """Bits from what users write: Bits(4, 8), (4, 8), or 8 for exactly 8 bits."""
        if isinstance(value, Bits):
            return value
        if isinstance(value, int):
            return cls(value, value)
        if isinstance(value, list | tuple) and len(value) == 2:
            return cls(value[0], value[1])
        raise ConfigError(f"bits: {value!r} is not a range of bit widths; write e.g. Bits(4, 8), (4, 8) or 8")
