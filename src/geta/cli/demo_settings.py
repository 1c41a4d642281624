"""The settings of the demo, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from geta.errors import ConfigError


class DemoSettings(BaseModel):
    """What a run of the demo depends on; two runs with equal settings give equal numbers.

    out:      folder of the results. epochs: passes over the training images, for the dense and the compact network alike.
    sparsity: share of the groups to remove. bits: lower and upper bit width of the weights.
    activation_bits: bit width of the activations. quantizer_learning_rate: of step sizes and ranges.
    saliency: weights of the criteria by which groups are chosen. First-order Taylor estimates how much the loss changes without a
    group, so it compares the small groups of early layers fairly with the large ones of late layers; a little average magnitude
    leans towards removing large groups, which saves more bytes. The library's default, five criteria alike, leaves the early
    layers at full width, and they do most of the operations.
    The other settings are common to both networks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: Path = Path("runs/demo")
    epochs: int = Field(default=40, ge=1, le=10_000)
    seed: int = Field(default=0, ge=0, lt=2**32)
    sparsity: float = Field(default=0.5, ge=0.0, lt=1.0)
    bits: tuple[int, int] = (4, 8)
    activation_bits: int = 8
    batch_size: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=0.1, gt=0.0)
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=5e-4, ge=0.0)
    saliency: dict[str, float] = {"taylor_first": 1.0, "average_magnitude": 0.2}
    quantizer_learning_rate: float = Field(default=1e-4, ge=0.0)

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> DemoSettings:
        """Build the settings; raises ConfigError that names the option, the value found and the rule it breaks."""
        from geta.quant import Bits

        try:
            settings = cls(**values)
        except ValidationError as error:
            problems = [f"--{'.'.join(map(str, e['loc'])).replace('_', '-')} {e['input']}: {e['msg']}" for e in error.errors()]
            raise ConfigError("; ".join(problems)) from None
        Bits.of(settings.bits)
        return settings


def parse_bits(text: str) -> tuple[int, int]:
    """Read `4,8` (a range) or `8` (exactly that); raises ConfigError for anything else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ConfigError(f"--bits '{text}' is no range of bit widths: write e.g. --bits 4,8, or --bits 8 for exactly 8 bits")
    return numbers[0], numbers[-1]
