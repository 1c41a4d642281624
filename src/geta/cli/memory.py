"""`geta analyze TARGET --memory`: what training the model takes on each GPU."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from geta.errors import ConfigError
from geta.hints import did_you_mean

if TYPE_CHECKING:
    import torch

    from geta.cli.targets import Target
    from geta.graph import DependencyGraph
    from geta.report.memory import MemoryPlan

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class MemoryOptions:
    """The options of `geta analyze` that say how the model is trained, as they were written; None = not given."""

    gpus: int | None = None
    batch: int | None = None
    sequence: int | None = None
    dtype: str | None = None
    compute_dtype: str | None = None
    optimizer: str | None = None
    weight_bits: str | None = None
    activation_bits: str | None = None

    def refuse(self) -> None:
        """Raise ConfigError for an option that was given although no memory is planned."""
        given = next((field.name for field in fields(self) if getattr(self, field.name) is not None), None)
        if given is not None:
            raise ConfigError(f"--{given.replace('_', '-')} has no effect without --memory: add it, or leave the option out")

    def check(self) -> None:
        """Raise ConfigError for what can be told to be wrong without torch."""
        for name in ("gpus", "batch", "sequence"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"--{name} is {number}; it must be at least 1")
        for name in ("dtype", "compute_dtype"):
            if getattr(self, name) not in (None, *_DTYPES, *_DTYPES.values()):
                known = ", ".join(_DTYPES)
                raise ConfigError(f"--{name.replace('_', '-')} '{getattr(self, name)}' is unknown; write one of {known}")

    def plan(self, graph: DependencyGraph, found: Target) -> MemoryPlan:
        """The plan for the target's model with inputs of this size."""
        from geta.cli.targets import resized
        from geta.report.memory import memory_plan

        sized = resized(found, self.batch, self.sequence)
        return memory_plan(
            graph,
            _optimizer(self.optimizer or "adamw"),
            args=sized.args,
            kwargs=sized.kwargs,
            gpus=self.gpus or 1,
            weight_bits=_bits("weight-bits", self.weight_bits),
            activation_bits=_bits("activation-bits", self.activation_bits),
            dtype=_dtype(self.dtype),
            compute_dtype=_dtype(self.compute_dtype),
        )


def _optimizer(name: str) -> type[torch.optim.Optimizer]:
    """A class of `torch.optim`, whatever the case of the name."""
    import torch

    known = {key.lower(): value for key, value in vars(torch.optim).items() if isinstance(value, type)}
    known = {key: value for key, value in known.items() if issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer}
    if name.lower() not in known:
        raise ConfigError(f"--optimizer '{name}' is none of torch.optim: {', '.join(sorted(known))}{did_you_mean(name, known)}")
    return known[name.lower()]


def _bits(option: str, text: str | None) -> tuple[int, int] | int | None:
    if text is None:
        return None
    numbers = text.split(",")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise ConfigError(f"--{option} '{text}' is no range of bits: write 8 or 4,8")
    return int(numbers[0]) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, _DTYPES.get(name, name))
