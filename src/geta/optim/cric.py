"""HESSO-CRIC: HESSO that looks again before it prunes, so that one low snapshot of a score can't remove what the network needs.

Legend: `G` groups, `F` families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from geta import ranks
from geta.errors import ConfigError
from geta.optim.bank import QuantizerBank
from geta.optim.budget import Budget, sparsity_or_budget
from geta.optim.cycle import Cycle, CyclePlan, probe_terms, probes
from geta.optim.groups import Graph
from geta.optim.hesso import refuse_quantizers, without_projection
from geta.optim.lowest import Lowest
from geta.optim.pruner import on_host
from geta.optim.rewind import Rewind
from geta.optim.saliency import SaliencyLike
from geta.optim.schedule import Schedule, Stage
from geta.optim.setup import as_schedule
from geta.optim.structured import StructuredOptimizer

Phase = Literal["warm-up", "probe", "cycle", "hybrid", "cool-down"]


class HESSOCRIC(StructuredOptimizer):
    """HESSO with the corrective redundancy identification cycle (CRIC).

    HESSO marks what one snapshot of the scores calls redundant. Here the joint stage first finds out what happens when it is missing:

        probe    (only with probe_weight > 0) one reference step; then, one step each, the lowest quarter, half and three quarters of
                 every family's groups are zero and the loss of that step is recorded. Nothing is learned in these steps.
        cycles   cycle c decays its violating set V_c to zero over T steps, x_V <- (x_V + delta_V) (T - k - 1) / (T - k). V_1 are the
                 K lowest groups. Every step records all scores; a group that falls among the K lowest and was in no violating set so
                 far joins the trial set. The cycle's end restores the training state of the warm-up's end; the trial set is V_(c+1).
                 Cycles end with a trial set of at most `tolerance` groups, or after `max_cycles`.
        hybrid   the K groups with the lowest  mean of all recorded scores + probe_weight * (mean of the family's loss / reference
                 loss) / size of the family  are driven to zero from the restored state, in one period of T_h steps as in HESSO.

    Then zeros are kept to the end of training. When cycles end early, the hybrid period starts early and the cool-down is longer.
    During probe and cycles the model is an experiment: don't judge it by validation then.
    Scores can only be corrected by criteria that look at gradients: a magnitude never rises while its group is decayed.

    base, graph, sparsity, layer_sparsity, multiple_of, uniform, saliency: as in `HESSO`; residual branches have no probe.
    target:         a `geta.Budget` of costs instead of a sparsity: the first scores decide how many groups of each family are examined,
                    the corrected ones how many go in the end.
    schedule:       a `Schedule`, or the planned number of steps. A projection stage counts as warm-up; joint_periods has no effect.
    max_cycles:     most cycles. sampling_steps: T, None = an equal part of what probe and hybrid period leave of the joint stage.
    tolerance:      cycles end when at most this many groups are left to examine.
    hybrid_steps:   T_h, None = a third of the joint stage (less the probe).
    probe_weight:   weight of the probe's term, 0 = no probe. The probe needs the loss: `step(loss=loss)`, or a closure.

    Memory: one copy of the parameters, buffers and the base optimizer's state during the joint stage, also in `state_dict`.
    Learning rates and random numbers are not set back, so that schedulers and data loaders go on as usual.

    Raises ConfigError for impossible settings, for parts that don't fit into the joint stage, and for a model with quantizers.
    Source: HESSO-CRIC (arXiv 2409.09085), section 4.
    Deviation: with `multiple_of` > 1 or `uniform` membership in a trial set looks only at how many groups each family may lose; V_1 and
    the final K are aligned and even exactly. V_(c+1) leaves the best group of a family that it would cover whole.
    """

    def __init__(  # noqa: PLR0913 - the fixed public interface, keywords only
        self,
        base: Optimizer,
        graph: Graph,
        *,
        sparsity: float | None = None,
        target: Budget | None = None,
        schedule: Schedule | int,
        layer_sparsity: float | None = None,
        multiple_of: int | str = 1,
        uniform: bool = False,
        saliency: SaliencyLike = None,
        max_cycles: int = 3,
        sampling_steps: int | None = None,
        tolerance: int = 0,
        hybrid_steps: int | None = None,
        probe_weight: float = 0.0,
    ) -> None:
        refuse_quantizers(graph, type(self).__name__)
        if isinstance(probe_weight, bool) or not isinstance(probe_weight, int | float) or not 0.0 <= probe_weight < float("inf"):
            raise ConfigError(f"probe_weight is {probe_weight!r}: it must be finite and not negative")
        self._phase: Phase = "warm-up"
        super().__init__(
            base,
            graph,
            sparsity=sparsity_or_budget(sparsity, target),
            schedule=without_projection(as_schedule(schedule)),
            layer_sparsity=layer_sparsity,
            multiple_of=multiple_of,
            uniform=uniform,
            saliency=saliency,
            bank=QuantizerBank([]),
            forgetting="uniform",
            target=target,
        )
        index, selector = self._index, self._pruner.selector
        self._probe_weight = float(probe_weight)
        self._trials = probes(index.sizes, selector.options) if self._prunes and probe_weight else []
        self._plan = CyclePlan.fit(
            self.schedule.joint_steps if self._prunes else None,
            probe_steps=1 + len(self._trials) if self._trials else 0,
            max_cycles=max_cycles,
            sampling_steps=sampling_steps,
            hybrid_steps=hybrid_steps,
            tolerance=tolerance,
        )
        if self.schedule.joint_periods is not None:
            self.notes.append(f"schedule.joint_periods = {self.schedule.joint_periods} has no effect: the hybrid period is a single one")
        self._k = 0
        self._origin: Rewind | None = None
        self._cycle: Cycle | None = None
        self._ended = ""
        self._records = 0
        self._first_scores = np.zeros(0)
        self._terms_F = np.zeros(len(index.sizes))
        self._rebound()

    def _rebound(self) -> None:
        index = self._index
        if index.shards is not None:
            raise ConfigError(
                "HESSOCRIC goes back to a copy of the training state, which it can't keep of sharded parameters: use HESSO, or "
                "DistributedDataParallel instead of fully_shard"
            )
        self._lowest = Lowest(index, self._pruner.selector)
        self._known_G = torch.zeros(index.num_groups, dtype=torch.bool, device=index.device)
        self._trial_G = torch.zeros_like(self._known_G)
        self._score_sum_G = torch.zeros(index.num_groups, dtype=index.dtype, device=index.device)
        self._losses = torch.zeros(self._plan.probe_steps, dtype=index.dtype, device=index.device)

    @property
    def stage(self) -> Stage:
        """The stage that the next step belongs to; the joint stage is over when the hybrid period is."""
        if self._phase == "warm-up":
            return self.schedule.stage_at(self._step)
        return "cool-down" if self._phase == "cool-down" else "joint"

    def step(self, closure: Callable[[], float] | None = None, *, loss: float | Tensor | None = None) -> Any:
        """One optimizer step; returns the closure's loss if a closure is given, else `loss`.

        loss: the loss of this step. Only a probe reads it; otherwise it may be given or not.

        Raises ConfigError when both are given, or none with probe_weight > 0 before the probe is done; GetaError at the start of
        a cycle when parameters are no longer finite.
        """
        self._follow_model()
        if self._only_allocates(closure):
            return self.base.step()
        self._check_loss(closure, loss)
        stage = self.stage
        if self._step == self.schedule.joint_start == 0:
            self._enter_joint()
        if self._phase == "probe":
            value = self._probe(closure, loss)
        elif self._phase == "cycle":
            value = self._sample(closure)
        else:
            value = self._call_base(closure)
            with torch.no_grad():
                self._drive()
        self._note(stage, self.schedule.stage_at(self._step + 1) if self._phase == "warm-up" else self.stage)
        self._step += 1
        if self._step == self.schedule.joint_start:
            self._enter_joint()
        self._observe_next()
        return loss if closure is None else value

    def progress(self) -> dict[str, Any]:
        """Where the run stands, as plain data; see `StructuredOptimizer.progress`.

        phase: "warm-up", "probe", "cycle", "hybrid" or "cool-down". cycle: its number from 1, the last one after the cycles, or None.
        trial_groups: groups that the next cycle would examine. cycles_ended: why, in words, or None.
        """
        return {
            **super().progress(),
            "phase": self._phase,
            "cycle": None if self._cycle is None else self._cycle.number,
            "trial_groups": int(self._trial_G.sum()),
            "cycles_ended": self._ended or None,
        }

    def _period(self) -> int | None:
        return self._cycle.number - 1 if self._phase == "cycle" and self._cycle is not None else None

    def _headlines(self) -> list[str]:
        lines = super()._headlines()
        if self._phase == "cycle" and self._cycle is not None:
            examined, trial = int(self._cycle.violating.sum()), int(self._trial_G.sum())
            lines.append(
                f"cycle {self._cycle.number} of at most {self._plan.max_cycles}: {examined} groups examined, {trial} in the trial set"
            )
        elif self._phase == "probe":
            lines.append(f"probe: {self._k} of {self._plan.probe_steps} losses recorded")
        return [*lines, *([f"cycles ended: {self._ended}"] if self._ended else [])]

    def _check_loss(self, closure: Callable[[], float] | None, loss: float | Tensor | None) -> None:
        if closure is not None and loss is not None:
            raise ConfigError("step got a closure and loss=: the closure brings the loss, give one of them")
        if self._trials and closure is None and loss is None and self._phase in ("warm-up", "probe"):
            raise ConfigError(
                f"probe_weight = {self._probe_weight:g} compares losses: call optimizer.step(loss=loss) or step(closure) until the probe "
                f"is done, or set probe_weight=0"
            )
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ConfigError(f"loss has shape {tuple(loss.shape)}: give the scalar that backward() was called on")

    def _enter_joint(self) -> None:
        """The warm-up has ended (a run without one starts here): keep what the experiments go back to."""
        if self._prunes and self._phase == "warm-up":
            self._check_finite()
            self._origin = Rewind(self._graph.model, self.base)
            self._phase = "probe" if self._trials else "cycle"

    def _probe(self, closure: Callable[[], float] | None, loss: float | Tensor | None) -> Any:
        """Record the loss of the trial that this step ran with, restore, and set up the next one."""
        assert self._origin is not None
        if self._k == 0:
            before = self._pruner.snapshot(everything=True)
            value = self._call_base(closure)
            with torch.no_grad():
                self._first_scores = on_host(self._pruner.scores(before))
            self._origin.restore_()
        else:
            with torch.enable_grad():
                value = None if closure is None else closure()
            self._origin.restore_tensors_()
        seen = value if loss is None else loss
        self._losses[self._k] = seen.detach() if isinstance(seen, Tensor) else float(seen)
        self._losses[self._k] = ranks.mean(self._losses[self._k])
        self._k += 1
        if self._k < self._plan.probe_steps:
            self._zero_lowest_()
        else:
            self._terms_F = probe_terms(self._losses.double().cpu().numpy(), self._trials, self._index.sizes)
            self._start_cycle(self._first_cycle(self._first_scores))
        return value

    @torch.no_grad()
    def _zero_lowest_(self) -> None:
        """Zero the groups of the trial that the next step runs with."""
        family, count = self._trials[self._k - 1]
        start, end = self._index.starts[family], self._index.starts[family + 1]
        chosen = np.zeros(self._index.num_groups, dtype=bool)
        chosen[start + np.argsort(self._first_scores[start:end], kind="stable")[:count]] = True
        flags = self._index.flags(chosen)
        for entry in [*self._index.parameters, *self._index.buffers]:
            entry.tensor.masked_fill_(entry.element_mask(flags), 0)

    def _sample(self, closure: Callable[[], float] | None) -> Any:
        """One step of a cycle: learn, record all scores, find new candidates, decay the violating set."""
        before = self._pruner.snapshot(everything=True)
        value = self._call_base(closure)
        with torch.no_grad():
            scores = self._pruner.scores(before)
            if self._cycle is None:
                self._start_cycle(self._first_cycle(on_host(scores)))
            self._score_sum_G += scores
            self._records += 1
            self._trial_G |= self._lowest(scores) & ~self._known_G
            self._pruner.decay_((self._k, self._plan.sampling_steps))
        self._k += 1
        if self._k == self._plan.sampling_steps:
            self._end_cycle()
        return value

    def _adopt_plan(self) -> None:
        super()._adopt_plan()
        self._lowest = Lowest(self._index, self._pruner.selector)

    def _first_cycle(self, scores: np.ndarray) -> Cycle:
        if self._target is not None:
            self._plan_from(scores)
        nothing = np.zeros(self._index.num_groups, dtype=bool)
        return Cycle(1, self._pruner.selector.mark(scores, nothing, self.target_groups), nothing)

    def _start_cycle(self, cycle: Cycle) -> None:
        self._phase, self._k, self._cycle = "cycle", 0, cycle
        self._known_G = self._index.flags(cycle.known)
        self._trial_G = torch.zeros_like(self._known_G)
        self._pruner.redundant = cycle.violating
        self._pruner.refresh()
        self._agree()

    def _end_cycle(self) -> None:
        """Restore the warm-up's end; go on with the trial set, or start the hybrid period. Waits for the device once."""
        assert self._cycle is not None
        assert self._origin is not None
        self._check_finite()
        mean = on_host(self._score_sum_G / self._records)
        following = self._cycle.following(self._trial_G.cpu().numpy(), mean, self._index.starts, self._index.layers)
        self._origin.restore_()
        self._ended = self._cycle.ending(following, self._plan)
        if not self._ended:
            self._pruner.observation.restart()
            self._start_cycle(following)
            return
        mean = mean + self._probe_weight * np.repeat(self._terms_F, self._index.sizes)
        if self._target is not None:
            self._plan_from(mean)
        self._phase, self._k, self._origin = "hybrid", 0, None
        self._pruner.redundant = self._pruner.selector.mark(mean, np.zeros_like(following.violating), self.target_groups)
        self._pruner.refresh()
        self._agree()

    def _drive(self) -> None:
        """After the base's step outside the experiments: keep zeros, and in the hybrid period make them."""
        self._pruner.enforce_()
        if self._phase != "hybrid":
            return
        self._pruner.decay_((self._k, self._plan.hybrid_steps))
        self._k += 1
        if self._k == self._plan.hybrid_steps:
            self._pruner.finish_period_()
            self._phase = "cool-down"

    def _observes(self, step: int) -> bool:
        start = self.schedule.joint_start
        return self._phase == "cycle" or start - self._pruner.saliency.window < step <= start

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "cycles": {**self._plan.to_dict(), "probe_weight": self._probe_weight}}

    def _extra_state(self) -> dict[str, Any]:
        nothing = np.zeros(0, dtype=bool)
        cycle = Cycle(0, nothing, nothing) if self._cycle is None else self._cycle
        return {
            **super()._extra_state(),
            "phase": self._phase,
            "k": self._k,
            "cycle": cycle.number,
            "violating": torch.from_numpy(cycle.violating.copy()),
            "history": torch.from_numpy(cycle.history.copy()),
            "trial": self._trial_G.clone(),
            "score_sum": self._score_sum_G.clone(),
            "records": self._records,
            "losses": self._losses.clone(),
            "first_scores": torch.from_numpy(self._first_scores.copy()),
            "probe_terms": torch.from_numpy(self._terms_F.copy()),
            "ended": self._ended,
            "origin": {} if self._origin is None else self._origin.state(),
        }

    def _check_extra_state(self, extra: Mapping[str, Any]) -> None:
        super()._check_extra_state(extra)
        if extra["origin"]:
            Rewind(self._graph.model, self.base, extra["origin"])

    def _load_extra_state(self, extra: Mapping[str, Any]) -> None:
        self._phase, self._k, self._ended, self._records = extra["phase"], int(extra["k"]), extra["ended"], int(extra["records"])
        number = int(extra["cycle"])
        self._cycle = Cycle(number, _bools(extra["violating"]), _bools(extra["history"])) if number else None
        self._known_G = torch.zeros_like(self._known_G) if self._cycle is None else self._index.flags(self._cycle.known)
        self._trial_G = extra["trial"].to(self._trial_G.device).clone()
        self._score_sum_G = extra["score_sum"].to(self._score_sum_G).clone()
        self._losses = extra["losses"].to(self._losses).clone()
        self._first_scores, self._terms_F = (extra[key].cpu().numpy().copy() for key in ("first_scores", "probe_terms"))
        self._origin = Rewind(self._graph.model, self.base, extra["origin"]) if extra["origin"] else None
        super()._load_extra_state(extra)


def _bools(flags: Tensor) -> np.ndarray:
    found: np.ndarray = flags.cpu().numpy().astype(bool)
    return found
