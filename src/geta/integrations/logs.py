"""What the callbacks of training frameworks tell about a run."""

from __future__ import annotations

from typing import Any

from geta.errors import ConfigError
from geta.integrations.compressor import Compressor
from geta.optim import QASSO


def facts(compressor: Compressor) -> dict[str, Any]:
    """`stage`, `group_sparsity` (a share) and, with quantizers, `mean_bits`; empty before there is an optimizer."""
    now = compressor.progress()
    if now is None:
        return {}
    found = {name: now[name] for name in ("stage", "group_sparsity", "mean_bits")}
    return {name: value for name, value in found.items() if value is not None}


def unfinished(compressor: Compressor) -> str | None:
    """What to say when training ended and the network isn't compact; None if all is well."""
    now = compressor.progress()
    if now is None:
        return "training ended without a step of the compressor's optimizer: nothing was pruned or quantized"
    if now["stage"] == "cool-down":
        return None
    return (
        f"training ended at step {now['step']} of {now['total_steps']}, in {now['stage']}: groups and bit widths are final only in the "
        "cool-down, so that there is no compact model; train on from a checkpoint, or plan fewer steps"
    )


def check_length(optimizer: QASSO, left: float) -> None:
    """Raise ConfigError when `left` more optimizer steps don't reach the cool-down."""
    now, start = optimizer.progress()["step"], optimizer.schedule.cooldown_start
    if now + left < start:
        raise ConfigError(
            f"{left:g} steps are left in this run and the schedule stands at step {now}, so that its cool-down, which begins at step "
            f"{start}, isn't reached: train longer, or plan a shorter schedule"
        )
