"""What all optimizers that remove groups share: the plan of the stages, exactly K groups, progress, checks and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from geta import ranks
from geta.cost.record import Cost
from geta.errors import CheckpointError, ConfigError, GetaError
from geta.graph.names import find_tensor
from geta.optim.bank import QuantizerBank
from geta.optim.budget import Budget, BudgetTarget, costs_by_kind
from geta.optim.forget import Forgetting
from geta.optim.groups import Graph, GroupIndex
from geta.optim.history import History
from geta.optim.pruner import Pruner, on_host
from geta.optim.saliency import Saliency, SaliencyLike
from geta.optim.schedule import Schedule, Stage
from geta.optim.selection import Selector
from geta.optim.setup import (
    check_sparsity,
    check_uniform,
    layer_share,
    quantizer_parameters,
    refuse_unprunable,
    ties_of,
    unevenly_prunable,
)
from geta.optim.shards import is_sharded, local
from geta.optim.wrapper import WrappingOptimizer, call_base
from geta.quant import Bits


class StructuredOptimizer(WrappingOptimizer):
    """Common part of QASSO, HESSO and HESSO-CRIC; subclasses implement `step`.

    base, graph, sparsity, layer_sparsity, schedule, multiple_of, saliency, uniform: as in `QASSO`.
    bank:       the quantizers whose weights are forgotten through their quantized value.
    forgetting: the rule of `geta.optim.forget`.
    target:     a budget instead of a sparsity (which is 0 then); bits: the final bounds of the bank's quantizers.

    Nothing of the base or the model is changed here. Raises ConfigError for impossible settings.
    """

    def __init__(  # noqa: PLR0913 - what three public interfaces hand on, keywords only
        self,
        base: Optimizer,
        graph: Graph,
        *,
        sparsity: float,
        schedule: Schedule,
        multiple_of: int | str,
        saliency: SaliencyLike,
        bank: QuantizerBank,
        forgetting: Forgetting,
        layer_sparsity: float | None = None,
        uniform: bool = False,
        target: Budget | None = None,
        bits: Sequence[Bits] = (),
    ) -> None:
        check_sparsity(sparsity)
        self.schedule = schedule
        self._graph = graph
        self._bank = bank
        self._uniform = check_uniform(uniform)
        self._index = self._compiled()
        layers = self._index.layers
        share = layer_share(graph, self._index, (layer_sparsity, sparsity), budget=target is not None, uniform=uniform)
        count = sum(map(len, layers))
        wanted, wanted_layers = int(sparsity * (self._index.num_groups - count)), int(share * count)
        if sparsity > 0.0 and not self._index.num_groups:
            refuse_unprunable(graph, sparsity)
        families = self._index.families
        ties = ties_of(graph, self._index) if uniform else []
        channels = [family.channels for family in families]
        branches: dict[str, Any] = {"layers": layers, "units": self._index.units, "wanted_layers": wanted_layers}
        selector = Selector(self._index.sizes, wanted, multiple_of, channels, ties=ties, **branches)
        if (selector.target or target) and not schedule.joint_steps:
            what = "a budget is to be met" if target else f"{selector.target} groups are to be removed"
            raise ConfigError(f"{what}, but the schedule has no joint stage: give schedule.joint > 0")
        self._target = BudgetTarget(target, graph, self._index, selector, quantizers=bank.quantizers, bits=bits) if target else None
        self._prunes = selector.target > 0 or target is not None
        pruner = self._new_pruner(selector, Saliency.of(saliency), forgetting)
        super().__init__(base)
        self._pruner = pruner
        self._trained = self._trained_names()
        self._unchecked = True
        self._step = 0
        self.history = History(schedule.total_steps, self._index.num_groups)
        self._observe_next()
        self.notes = [*self._index.notes, *([selector.note] if selector.note else [])]
        if sparsity > 0.0 and wanted + wanted_layers == 0:
            self.notes.append(f"sparsity {sparsity} of {self._index.num_groups} groups is less than one group: nothing is removed")
        elif share > 0.0 and layers and not wanted_layers:
            self.notes.append(f"a share of {share} of {count} residual branches is less than one: all of them stay")
        if uniform:
            self.notes += unevenly_prunable(graph)

    def _compiled(self) -> GroupIndex:
        """The groups in the model as it is now."""
        own = [p for quantizer in self._bank.quantizers for p in quantizer.parameters()]
        index = GroupIndex(self._graph, skip={id(p) for p in own}, uniform=self._uniform)
        sharded = any(is_sharded(p) for p in self._graph.model.parameters())
        replicated = quantizer_parameters(self._graph.model) if sharded else []
        if any(is_sharded(p) for p in (*own, *replicated)):
            raise ConfigError(
                "parameters of quantizers are sharded, but every rank needs all of them: call fully_shard(module, "
                "ignored_params=set(geta.optim.quantizer_parameters(model)))"
            )
        self._replicated = [p for p in replicated if p.requires_grad]
        return index

    def _new_pruner(self, selector: Selector, saliency: Saliency, forgetting: Forgetting) -> Pruner:
        observation = saliency.observation(self._index, self._graph) if self._prunes else None
        layers = self._bank.weights_of(self._graph.model)
        return Pruner(
            self._index, selector, saliency=saliency, bank=self._bank, layers=layers, forgetting=forgetting, observation=observation
        )

    def _follow_model(self) -> None:
        """Look the tensors up again where the model was moved, sharded or given other ones since; called before each step.

        Moves are noticed at once, other replaced tensors before the first step and at the start of each period.
        """
        entries = self._index.parameters
        moved = entries and entries[0].stored.device != self._index.device
        if not moved and not self._unchecked and not self.schedule.is_period_start(self._step):
            return
        self._unchecked = False
        stored = [*entries, *self._index.buffers]
        if moved or any(find_tensor(self._graph.model, entry.name) is not entry.stored for entry in stored):
            self._rebind()

    def _rebind(self) -> None:
        """Compile everything again for the tensors that the model has now; the state of the run stays."""
        state, old = self._extra_state(), self._pruner
        old.observation.follow(False)
        self._bank = QuantizerBank(self._bank.quantizers)
        self._index = self._compiled()
        lost = [name for name in self._trained if name not in self._trained_names()]
        if lost:
            raise ConfigError(
                f"the model's '{lost[0]}' was replaced after the optimizer was made, which still trains the old tensor: make the optimizer "
                f"last, after fully_shard and whatever else gives the model new parameters"
            )
        self._pruner = self._new_pruner(old.selector, old.saliency, old.forgetting)
        if self._target is not None:
            self._target.follow(self._index)
        self._rebound()
        self._load_extra_state(state)

    def _trained_names(self) -> list[str]:
        """The grouped parameters that the base optimizer trains."""
        known = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        return [entry.name for entry in self._index.parameters if id(entry.stored) in known]

    def _rebound(self) -> None:
        """Subclasses renew what they keep beside index and pruner."""

    @property
    def stage(self) -> Stage:
        """The stage that the next step belongs to."""
        return self.schedule.stage_at(self._step)

    @property
    def target_groups(self) -> int:
        """K: how many groups are zero in the end; with a budget 0 until the joint stage begins, where it is decided."""
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
            "target_groups": self.target_groups if self._decided else None,
            "pruned_groups": pruned,
            "redundant_groups": int(self._pruner.redundant.sum()),
            "groups_left": self.target_groups - pruned if self._decided else None,
            "group_sparsity": pruned / groups if groups else 0.0,
        }

    @property
    def cost_limits(self) -> dict[str, float]:
        """What the compact model may cost, by kind (macs, bops, params, bytes); empty without a budget."""
        return {} if self._target is None else dict(self._target.limits)

    def check_cost(self, cost: Cost) -> None:
        """Raise GetaError with the numbers when the counted cost of the compact model is above a limit of the budget."""
        if self._target is not None:
            self._target.check(costs_by_kind(cost))

    def report(self) -> list[str]:
        """What was reached, in words: groups, and every note (missed targets, alignment, families that can't be observed)."""
        budget = [] if self._target is None else self._target.lines(self._planned_costs())
        return [*self._headlines(), *budget, *self.notes, *self._pruner.observation.notes]

    def check(self) -> None:
        """Assert the result: exactly K zero groups, and costs within the budget.

        Raises GetaError with the numbers otherwise, also when the run stopped before the cool-down.
        """
        if self.stage != "cool-down":
            raise GetaError(
                f"the run stopped at step {self._step}, in {self.stage}; targets are met from step {self.schedule.cooldown_start} on: "
                f"train longer or shorten the schedule"
            )
        zero = int((self._index.zero_groups() & ~self._index.flags(self._gone_with_layers())).sum())
        if zero != self.target_groups:
            raise GetaError(
                f"{zero} groups are zero, but exactly {self.target_groups} should be: were parameters changed outside the optimizer?"
            )
        planned = self._planned_costs()
        if self._target is not None and planned is not None:
            self._target.check(planned)

    def _gone_with_layers(self) -> np.ndarray:
        """Groups that were not chosen, but are zero because all that makes them went with a residual branch (bool [G])."""
        index, pruned = self._index, self._pruner.pruned
        firsts = list(zip(index.families, index.starts.tolist(), strict=False))
        makers = {member.param for family, start in firsts if family.is_layer and pruned[start] for member in family.zeroed}
        found = np.zeros(index.num_groups, dtype=bool)
        for family, start in firsts if makers else ():
            if all(member.param in makers for member in family.zeroed):
                found[start : start + family.size] = True
        return found & ~pruned

    @property
    def _decided(self) -> bool:
        """Whether it is known how many groups go."""
        return self._target is None or self._target.plan is not None

    def _rehearses(self) -> bool:
        """Whether groups are marked before the base's step, from one that is taken back, so that nothing but their rows is copied.

        A budget's plan looks at weights after the step.
        """
        return self._decided and self._pruner.can_rehearse(self.base)

    def _mark_ahead(self, closure: Callable[[], float] | None) -> Callable[[], float] | None:
        """Mark the groups of the step to come; the closure that the base optimizer then gets."""
        closure = self._pruner.observation.watched(self._reducing(closure))
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            closure = partial(_constant, loss)
        with torch.no_grad():
            self._pruner.mark(lambda: self._pruner.rehearsed_scores(self.base), self._pruned_target())
            self._agree()
        return closure

    def _mark_behind(self, before: Mapping[int, Tensor]) -> None:
        """Mark the groups of a step that was taken. before: all grouped parameters as they were."""
        if self._target is not None and self._target.plan is None:
            self._plan_from(on_host(self._pruner.scores(before)) if self._index.num_groups else np.zeros(0))
        self._pruner.mark(lambda: self._pruner.scores(before), self._pruned_target())
        self._agree()

    def _pruned_target(self) -> int:
        """How many groups are to be gone when the present period ends; a budget decides that at the first marking of a run."""
        return self.schedule.pruned_target(self.schedule.joint_at(self._step).period, self.target_groups)

    def _plan_from(self, scores_G: np.ndarray) -> None:
        """Let the budget decide from these scores, on the first rank for all of them."""
        assert self._target is not None
        self._target.plan = self._target.make(scores_G)
        self._target.load({key: ranks.of_first(value) for key, value in self._target.state().items()})
        self._adopt_plan()

    def _adopt_plan(self) -> None:
        """Let everything follow the plan, or its absence."""
        assert self._target is not None
        self._pruner.selector.fix(None if self._target.plan is None else self._target.plan.removed)

    def _planned_costs(self) -> dict[str, float] | None:
        if self._target is None or self._target.plan is None:
            return None
        return self._target.costs(self._target.plan.removed, self._target.plan.bits)

    def _call_base(self, closure: Callable[[], float] | None) -> Any:
        """The base's own step, seen by the observers of the saliency; the closure's loss if there is one."""
        return call_base(self.base, self._pruner.observation.watched(self._reducing(closure)))

    def _reducing(self, closure: Callable[[], float] | None) -> Callable[[], float] | None:
        """In a sharded model, reduce the gradients of quantizers, which `fully_shard` leaves alone: now, or after each closure call."""
        if not self._replicated:
            return closure
        if closure is None:
            ranks.share_gradients_(self._replicated)
            return None

        def reducing() -> float:
            loss = closure()
            ranks.share_gradients_(self._replicated)
            return loss

        return reducing

    def _only_allocates(self, closure: Callable[[], float] | None) -> bool:
        """Whether this is no training step: learning rates and gradients are all zero.

        `torch.distributed.checkpoint` lets optimizers allocate their state by such a step. The schedule doesn't count it.
        """
        rates = [group.get("lr", 1.0) for group in self.param_groups]
        if closure is not None or any((isinstance(rate, Tensor) and rate.device.type != "cpu") or float(rate) != 0.0 for rate in rates):
            return False
        gradients = [local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        moved = (
            torch.stack([(grad.coalesce().values() if grad.is_sparse else grad).any().cpu() for grad in gradients]).any()
            if gradients
            else None
        )
        return moved is not None and not bool(self._index.over_shards(moved.to(self._index.device, torch.int32)))

    def _agree(self) -> None:
        """Raise GetaError unless all ranks have come to the same decision; called where one was taken."""
        if ranks.count() == 1:
            return
        plan = None if self._target is None else {key: value.tolist() for key, value in self._target.state().items()}
        settings = json.dumps([self._step, self.stage, self._settings(), plan, self._decided_bits()], sort_keys=True)
        decided = (self._pruner.redundant.tobytes(), self._pruner.pruned.tobytes(), settings.encode())
        ranks.require_same(decided, f"groups and bits at step {self._step} ({self.stage})", self._index.device)

    def _decided_bits(self) -> list[float] | None:
        """The final bit widths, once there are any."""
        return None

    def _advance(self) -> None:
        """The step is done."""
        self._note(self.stage, self.schedule.stage_at(self._step + 1))
        self._step += 1
        self._observe_next()

    def _note(self, stage: Stage, following: Stage) -> None:
        """Put the step of `stage` that was just taken into the history, if it is one of those; nothing here waits for the device."""
        done = self._step + 1
        if not self.history.due(done, ends=stage != following):
            return
        mean, bound = self._noted_bits()
        self.history.note(
            step=done,
            stage=stage,
            learning_rate=self.param_groups[0].get("lr"),
            pruned_groups=int(self._pruner.pruned.sum()),
            redundant_groups=int(self._pruner.redundant.sum()),
            mean_weight_bits=mean,
            upper_bound=bound,
        )

    def _noted_bits(self) -> tuple[Tensor | None, float | None]:
        """Mean bit width of the weights, still on its device, and the upper bound of this step."""
        return None, None

    def _observe_next(self) -> None:
        if self._pruner.observation.needed:
            self._pruner.observation.follow(self._observes(self._step))

    def _observes(self, step: int) -> bool:
        """Whether `step` lies in the window of steps that the next marking looks at."""
        window = range(step, min(step + self._pruner.saliency.window, self.schedule.cooldown_start))
        return any(self.schedule.stage_at(s) == "joint" and self.schedule.is_period_start(s) for s in window)

    def _period(self) -> int | None:
        return self.schedule.joint_at(self._step).period if self.stage == "joint" else None

    def _headlines(self) -> list[str]:
        now = self.progress()
        return [
            f"step {now['step']} of {now['total_steps']}, {now['stage']}",
            f"{now['pruned_groups']} of {now['groups']} groups removed, {self.target_groups if self._decided else 'as yet unknown'} wanted",
        ]

    def _check_finite(self) -> None:
        """One synchronisation, once per period."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        unfit = torch.stack([(~local(parameter).detach().isfinite().all()).to(self._index.device) for parameter in parameters])
        finite = self._index.over_shards(unfit.to(torch.int32)) == 0
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
            "uniform": self._uniform,
            "families": {family.name: family.size for family in self._index.families},
            "target_groups": self.target_groups if self._target is None else None,
            **({"target_layers": self._pruner.selector.layer_target} if self._index.layers and self._target is None else {}),
            "target": None if self._target is None else self._target.budget.to_dict(),
            "multiple_of": self._pruner.selector.alignment,
            "observers": dict.fromkeys(self._pruner.saliency.observers, self._pruner.saliency.window),
        }

    def _extra_state(self) -> dict[str, Any]:
        observed = {"observed": self._pruner.observation.state()} if self._pruner.observation.needed else {}
        return {
            **observed,
            **({} if self._target is None else {"plan": self._target.state()}),
            "settings": self._settings(),
            "step": self._step,
            "stage": self.stage,
            "noted": self.history.state(),
            "redundant": torch.from_numpy(self._pruner.redundant.copy()),
            "pruned": torch.from_numpy(self._pruner.pruned.copy()),
        }

    def _check_extra_state(self, extra: Mapping[str, Any]) -> None:
        for key, mine in self._settings().items():
            saved = extra["settings"].get(key) if "settings" in extra else mine
            if saved != mine:
                raise CheckpointError(f"the checkpoint was made with {key} = {saved}, this run has {mine}: resume with the same settings")
        newer = ("noted", "followed")  # which checkpoints of before haven't got
        missing = [key for key in self._extra_state() if key not in extra and key not in newer]
        if missing:
            raise CheckpointError(f"the optimizer state lacks {', '.join(missing)}: it is damaged or of another version")

    def _load_extra_state(self, extra: Mapping[str, Any]) -> None:
        self._step = int(extra["step"])
        self.history.load(extra.get("noted"))
        self._pruner.redundant = extra["redundant"].cpu().numpy().astype(bool)
        self._pruner.pruned = extra["pruned"].cpu().numpy().astype(bool)
        if self._target is not None:
            self._target.load(extra["plan"])
            self._adopt_plan()
        self._pruner.refresh()
        self._observe_next()
        if self._pruner.observation.needed:
            self._pruner.observation.load(extra["observed"])


def _constant(value: float) -> float:
    return value
