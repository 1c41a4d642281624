"""What all optimizers that remove groups share: the plan of the stages, exactly K groups, progress, checks and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geta.errors import CheckpointError, ConfigError, GetaError
from geta.optim.bank import QuantizerBank
from geta.optim.forget import Forgetting
from geta.optim.groups import Graph, GroupIndex
from geta.optim.pruner import Pruner
from geta.optim.saliency import Saliency, SaliencySpec
from geta.optim.schedule import Schedule, Stage
from geta.optim.selection import Selector
from geta.optim.setup import check_sparsity, refuse_unprunable
from geta.optim.wrapper import WrappingOptimizer


class StructuredOptimizer(WrappingOptimizer):
    """Common part of QASSO, HESSO and HESSO-CRIC; subclasses implement `step`.

    base, graph, sparsity, schedule, multiple_of, saliency: as in `QASSO`.
    bank:       the quantizers whose weights are forgotten through their quantized value.
    forgetting: the rule of `geta.optim.forget`.

    Nothing of the base or the model is changed here. Raises ConfigError for impossible settings.
    """

    def __init__(
        self,
        base: Optimizer,
        graph: Graph,
        *,
        sparsity: float,
        schedule: Schedule,
        multiple_of: int,
        saliency: SaliencySpec,
        bank: QuantizerBank,
        forgetting: Forgetting,
    ) -> None:
        check_sparsity(sparsity)
        self.schedule = schedule
        self._graph = graph
        self._index = GroupIndex(graph, skip={id(p) for quantizer in bank.quantizers for p in quantizer.parameters()})
        wanted = int(sparsity * self._index.num_groups)
        if sparsity > 0.0 and not self._index.num_groups:
            refuse_unprunable(graph, sparsity)
        selector = Selector(self._index.sizes, wanted, multiple_of)
        if selector.target and not schedule.joint_steps:
            raise ConfigError(f"{selector.target} groups are to be removed, but the schedule has no joint stage: give schedule.joint > 0")
        criteria = Saliency(saliency)
        super().__init__(base)
        self._pruner = Pruner(
            self._index, selector, saliency=criteria, bank=bank, layers=bank.weights_of(graph.model), forgetting=forgetting
        )
        self._prunes = selector.target > 0
        self._step = 0
        self.notes = [*self._index.notes, *([selector.note] if selector.note else [])]
        if sparsity > 0.0 and wanted == 0:
            self.notes.append(f"sparsity {sparsity} of {self._index.num_groups} groups is less than one group: nothing is removed")

    @property
    def stage(self) -> Stage:
        """The stage that the next step belongs to."""
        return self.schedule.stage_at(self._step)

    @property
    def target_groups(self) -> int:
        """K: how many groups are zero in the end."""
        return self._pruner.selector.target

    @property
    def selection(self) -> dict[str, Tensor]:
        """The groups removed so far: {family name: BoolTensor[n]}, as `geta.compact` takes it."""
        return self._index.selection(torch.from_numpy(self._pruner.pruned))

    @property
    def redundant(self) -> dict[str, Tensor]:
        """The groups on their way to zero in the current period: {family name: BoolTensor[n]}."""
        return self._index.selection(torch.from_numpy(self._pruner.redundant))

    def progress(self) -> dict[str, Any]:
        """Where the run stands, as plain data. May wait for the device: call it when you print, not at every step."""
        groups, pruned = self._index.num_groups, int(self._pruner.pruned.sum())
        step, stage = self._step, self.stage
        return {
            "step": step,
            "total_steps": self.schedule.total_steps,
            "stage": stage,
            "period": self._period(),
            "groups": groups,
            "target_groups": self.target_groups,
            "pruned_groups": pruned,
            "redundant_groups": int(self._pruner.redundant.sum()),
            "groups_left": self.target_groups - pruned,
            "group_sparsity": pruned / groups if groups else 0.0,
        }

    def report(self) -> list[str]:
        """What was reached, in words: groups, and every note (missed targets, alignment)."""
        return [*self._headlines(), *self.notes]

    def check(self) -> None:
        """Assert the result: exactly K zero groups.

        Raises GetaError with the numbers otherwise, also when the run stopped before the cool-down.
        """
        if self.stage != "cool-down":
            raise GetaError(
                f"the run stopped at step {self._step}, in {self.stage}; targets are met from step {self.schedule.cooldown_start} on: "
                f"train longer or shorten the schedule"
            )
        zero = int(self._index.zero_groups().sum())
        if zero != self.target_groups:
            raise GetaError(
                f"{zero} groups are zero, but exactly {self.target_groups} should be: were parameters changed outside the optimizer?"
            )

    def _period(self) -> int | None:
        return self.schedule.joint_at(self._step).period if self.stage == "joint" else None

    def _headlines(self) -> list[str]:
        now = self.progress()
        return [
            f"step {now['step']} of {now['total_steps']}, {now['stage']}",
            f"{now['pruned_groups']} of {now['groups']} groups removed, {now['target_groups']} wanted",
        ]

    def _check_finite(self) -> None:
        """One synchronisation, once per period."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        finite = torch.stack([parameter.detach().isfinite().all().cpu() for parameter in parameters])
        if bool(finite.all()):
            return
        broken = {id(parameter) for parameter, fine in zip(parameters, finite.tolist(), strict=True) if not fine}
        names = [name for name, parameter in self._graph.model.named_parameters() if id(parameter) in broken]
        raise GetaError(
            f"before step {self._step} ({self.stage}) {len(broken)} parameters are no longer finite (first: "
            f"'{names[0] if names else 'unnamed'}'): resume from an earlier checkpoint with a lower learning rate or clipped gradients"
        )

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree with, as plain data."""
        return {
            "schedule": self.schedule.to_dict(),
            "families": {family.name: family.size for family in self._index.families},
            "target_groups": self.target_groups,
            "multiple_of": self._pruner.selector.multiple_of,
        }

    def _extra_state(self) -> dict[str, Any]:
        return {
            "settings": self._settings(),
            "step": self._step,
            "stage": self.stage,
            "redundant": torch.from_numpy(self._pruner.redundant.copy()),
            "pruned": torch.from_numpy(self._pruner.pruned.copy()),
        }

    def _check_extra_state(self, extra: Mapping[str, Any]) -> None:
        missing = [key for key in self._extra_state() if key not in extra]
        if missing:
            raise CheckpointError(f"the optimizer state lacks {', '.join(missing)}: it is damaged or of another version")
        for key, mine in self._settings().items():
            saved = extra["settings"].get(key)
            if saved != mine:
                raise CheckpointError(f"the checkpoint was made with {key} = {saved}, this run has {mine}: resume with the same settings")

    def _load_extra_state(self, extra: Mapping[str, Any]) -> None:
        self._step = int(extra["step"])
        self._pruner.redundant = extra["redundant"].cpu().numpy().astype(bool)
        self._pruner.pruned = extra["pruned"].cpu().numpy().astype(bool)
        self._pruner.refresh()
