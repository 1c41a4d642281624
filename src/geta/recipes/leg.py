"""One of the two trainings of a run, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from geta.errors import CheckpointError
from geta.optim import HESSO, HESSOCRIC, QASSO

_PLAIN = ("rows", "step", "loss_sum", "losses", "seconds", "scaler")


@dataclass
class Leg:
    """A network, its optimizer, and how far they have come.

    number: 1 = dense, 2 = compact. step: optimizer steps done. loss_sum, losses: since the last evaluation. rows: of the history.
    rates:  learning rates of the parameter groups before the schedule. scaler: state of the GradScaler, if there is one.
    """

    number: int
    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    rows: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    loss_sum: float = 0.0
    losses: int = 0
    seconds: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def stage(self) -> str:
        """The compressing optimizer's stage; "" for a plain one."""
        return str(self.optimizer.stage) if isinstance(self.optimizer, QASSO | HESSO | HESSOCRIC) else ""

    def progress(self) -> dict[str, Any]:
        """The compressing optimizer's `progress()`; nothing of a plain one. May wait for the device."""
        return self.optimizer.progress() if isinstance(self.optimizer, QASSO | HESSO | HESSOCRIC) else {}

    @property
    def evaluated(self) -> bool:
        """Whether the history has a row of the present step."""
        return bool(self.rows) and bool(self.rows[-1]["step"] == self.step)

    def row(self, loss: float, score: float, steps_per_epoch: int) -> dict[str, Any]:
        """One row of the history: where the leg stands, with this mean loss and score."""
        now = self.progress()
        epoch = round(self.step / steps_per_epoch, 4)
        return {
            "run": self.name,
            "step": self.step,
            "epoch": int(epoch) if epoch == int(epoch) else epoch,
            "stage": now.get("stage", ""),
            "loss": loss,
            "score": score,
            "group_sparsity": now.get("group_sparsity", 0.0),
            "mean_weight_bits": now.get("mean_weight_bits"),
            "upper_bound": now.get("upper_bound"),
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "seconds": round(self.seconds, 3),
        }

    def state(self) -> dict[str, Any]:
        """For checkpoints: tensors and plain data."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{key: getattr(self, key) for key in _PLAIN},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises CheckpointError when the state is of another network."""
        try:
            self.model.load_state_dict(state["model"])
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(f"the checkpoint is of another network than the recipe's: {str(error).splitlines()[0]}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        for key in _PLAIN:
            setattr(self, key, state[key])
