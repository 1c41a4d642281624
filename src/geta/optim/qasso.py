"""QASSO: any torch optimizer plus two hard constraints, exactly K groups at zero and every bit width in its range.

Legend: `G` groups, `L` quantizers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geta import ranks
from geta.errors import GetaError
from geta.graph.names import find_tensor
from geta.optim.bank import QuantizerBank, Steps
from geta.optim.budget import Budget, sparsity_or_budget
from geta.optim.following import RangeFollower
from geta.optim.forget import Forgetting, check_forgetting, step_share
from geta.optim.groups import Graph
from geta.optim.saliency import SaliencyLike
from geta.optim.schedule import Schedule, Stage
from geta.optim.setup import as_schedule, check_quant_lr, replaced_bits, trained_parameters
from geta.optim.structured import StructuredOptimizer
from geta.optim.wrapper import call_base, move_to_own_group
from geta.quant import BitsLike, quantizers

_BITS_TOLERANCE = 1e-3


class QASSO(StructuredOptimizer):
    """Quantization-aware structured sparse optimizer over `base`: prunes and quantizes while it trains.

        min f(x, d, q_m, t)   s.t.   exactly K groups are zero,  b_l <= b_i <= b_u and integer

    Four stages (lengths from `schedule`); delta is the step that `base` proposes, with momentum, weight decay and all:

        warm-up     x <- x + delta;  d, q_m, t likewise
        projection  the same, then only d is projected so that b_l <= b <= an upper bound that falls to b_u
        joint       every period marks the least important groups; important groups as before; redundant ones
                    x_R <- x_R + delta_R - gamma [x_Q]_R, zero in the period's last step (`geta.optim.forget`)
        cool-down   zeros stay zero, each b is an integer, d = d(b) follows q_m and t

    base:            any torch optimizer over the model's parameters; `param_groups` and `state` stay its own, so that
                     learning-rate schedulers work. Quantizer parameters move to a group of their own.
    graph:           the model's DependencyGraph.
    sparsity:        K = floor(sparsity * number of prunable groups), in [0, 1); 0.5 if neither it nor `target` is given.
    layer_sparsity:  the share of whole residual branches (`geta.analyze(depth=True)`) that goes, counted apart from the other
                     groups; None = as `sparsity`. At least one branch of each set stays (`geta.graph.families.layer_sets`).
    target:          a `geta.Budget` of costs instead: the joint stage's first step decides how many groups each family loses and which
                     bits each quantizer gets; upper bounds fall to these bits over the periods (`geta.optim.budget`).
    weight_bits, activation_bits: bit widths that replace those stored in the model's quantizers; None keeps those. (b_l, b_u) is a range;
                     {4, 8} allows these two alone: the last period before the cool-down brings each quantizer to the nearer one.
    schedule:        a `Schedule`, or the planned number of steps.
    multiple_of:     each family keeps a multiple of this many groups, or all; or the name of a `geta.device_profile`: of so many channels.
    uniform:         families that repeat across layers (`geta.graph.families.repeated`: the MLPs of all decoder layers, say) and those
                     that one number of a Hugging Face configuration sizes (`geta.graph.configured.tied`) lose equal numbers of groups,
                     which ones may differ: then one configuration describes the result, where it has words for it. Of whole residual
                     branches those of a block (`Family.block`) go together, the nearest number to `layer_sparsity` of them.
    saliency:        see `geta.optim.saliency.Saliency`.
    quant_lr:        learning rate of d, q_m and t (their group's `lr`, weight decay 0).
    forgetting:      "descent" (as published), "uniform", "cosine" or "blend", see `geta.optim.forget`.
    follow:          set ranges of activations anew that the values have outgrown, see `geta.optim.following`.
    tighten:         at every period's start (and the cool-down's) set q_m of each weight to min(q_m, max|w|) at the same bit width.
                     The loss has no gradient to a range that nothing reaches, so without it weight decay leaves codes unused.

    Raises ConfigError for impossible settings. Source: GETA (arXiv 2502.16638) section 5.
    Deviation: ranges are tightened (see `tighten`), set anew where values have outgrown them (see `follow`), and a step of the base
    optimizer at most doubles or halves them (see `QuantizerBank.guard_`).
    Deviation: bit widths lie in [b_l, schedule.initial_bits] during warm-up as well, because a step size outside makes a layer's
    output zero; a frozen parameter of a redundant group is forgotten with delta = 0.
    """

    def __init__(  # noqa: PLR0913 - the fixed public interface, keywords only
        self,
        base: Optimizer,
        graph: Graph,
        *,
        sparsity: float | None = None,
        target: Budget | None = None,
        weight_bits: BitsLike | None = None,
        activation_bits: BitsLike | None = None,
        schedule: Schedule | int,
        layer_sparsity: float | None = None,
        multiple_of: int | str = 1,
        uniform: bool = False,
        saliency: SaliencyLike = None,
        quant_lr: float = 1e-3,
        forgetting: Forgetting = "blend",
        tighten: bool = True,
        follow: bool = True,
    ) -> None:
        check_quant_lr(quant_lr)
        plan, rule = as_schedule(schedule), check_forgetting(forgetting)
        found = list(quantizers(graph.model).values())
        bounds = {"weight": replaced_bits("weight_bits", weight_bits, "weight", found)}
        bounds["activation"] = replaced_bits("activation_bits", activation_bits, "activation", found)
        for quantizer in found:
            plan.check_bits((bounds[quantizer.kind] or quantizer.bits).upper, f"quantizer '{quantizer.name}'")
        self._follows = follow
        self._follower = RangeFollower(found if follow else [])
        super().__init__(
            base,
            graph,
            sparsity=sparsity_or_budget(sparsity, target),
            schedule=plan,
            layer_sparsity=layer_sparsity,
            multiple_of=multiple_of,
            uniform=uniform,
            saliency=saliency,
            bank=QuantizerBank(found),
            forgetting=rule,
            target=target,
            bits=[bounds[quantizer.kind] or quantizer.bits for quantizer in found],
        )
        move_to_own_group(base, trained_parameters(graph, found), quant_lr)
        for quantizer in found:
            quantizer.bits = bounds[quantizer.kind] or quantizer.bits
        self._bank.read_settings()
        self._rule = rule
        self._tightens = tighten
        self._bits: Tensor | None = None
        self._rebound()

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One optimizer step; returns the closure's loss if a closure is given.

        Raises GetaError at the start of a period when parameters are no longer finite.
        """
        self._follow_model()
        if self._only_allocates(closure):
            return self.base.step()
        if not self._prunes and not len(self._bank):
            loss = self._call_base(closure)
            self._advance()
            return loss
        stage = self.schedule.stage_at(self._step)
        if self.schedule.is_period_start(self._step):
            self._check_finite()
            with torch.no_grad():
                self._bank.tighten_(self._tightened)
        joint = stage == "joint" and self._prunes
        marking = joint and self.schedule.joint_at(self._step).k == 0
        ahead = marking and self._rehearses()
        if ahead:
            closure = self._mark_ahead(closure)
        before = self._pruner.snapshot(everything=marking and not ahead) if joint else {}
        steps = self._bank.read() if joint and len(self._bank) else None
        ranges = self._bank.ranges() if steps is None else steps.q_m
        loss = call_base(self.base, closure) if ahead else self._call_base(closure)
        with torch.no_grad():
            self._pruner.enforce_()
            if marking and not ahead:
                self._mark_behind(before)
                before = self._pruner.part_of(before)
            ruled = self._joint(before, steps) if joint else None
            if len(self._bank):
                self._constrain_bits(stage, ruled, steps, ranges)
            if self._follower.follow_() and self._bits is not None:
                self._bank.write_d_(self._bank.step_size_of(self._bits, self._bank.read()))
        self._advance()
        return loss

    def _rebound(self) -> None:
        weights = {i: q.name for i, q in enumerate(self._bank.quantizers) if q.kind == "weight" and self._tightens}
        self._tightened = {i: find_tensor(self._graph.model, name) for i, name in weights.items()}
        self._upper: tuple[tuple[float, ...], Tensor] | None = None
        of_weights = [i for i, quantizer in enumerate(self._bank.quantizers) if quantizer.kind == "weight"]
        self._weights = torch.tensor(of_weights, device=self._bank.device) if of_weights else None

    @property
    def bits(self) -> dict[str, float]:
        """Bit width of every quantized tensor now, by its name. Waits for the device."""
        if not len(self._bank):
            return {}
        widths = self._bank.bit_widths() if self._bits is None else self._bits
        return {quantizer.name: value for quantizer, value in zip(self._bank.quantizers, widths.tolist(), strict=True)}

    def progress(self) -> dict[str, Any]:
        """Where the run stands, as plain data. Waits for the device, so call it when you print, not at every step.

        `mean_*bits` and `upper_bound` (of the widest tensor, in bits) are None without quantizers.
        """
        bits = self.bits
        return {
            **super().progress(),
            "mean_bits": _mean(list(bits.values())),
            "mean_weight_bits": _mean([bits[q.name] for q in self._bank.quantizers if q.kind == "weight"]),
            "mean_activation_bits": _mean([bits[q.name] for q in self._bank.quantizers if q.kind == "activation"]),
            "upper_bound": max(self._bounds(), default=None),
        }

    def check(self) -> None:
        """Assert the result: exactly K zero groups, every bit width an integer in its range, costs within the budget.

        Raises GetaError with the numbers otherwise, also when the run stopped before the cool-down.
        """
        super().check()
        if self._bits is None:
            return
        actual = self._bank.bit_widths().tolist()
        for quantizer, value, bits in zip(self._bank.quantizers, actual, self._bits.tolist(), strict=True):
            if abs(value - bits) > _BITS_TOLERANCE or bits not in quantizer.bits.widths:
                raise GetaError(
                    f"'{quantizer.name}' has {value:.4f} bits where {bits:g}, one of {', '.join(map(str, quantizer.bits.widths))}, was "
                    f"fixed: were d, q_m or t changed outside the optimizer?"
                )

    def _headlines(self) -> list[str]:
        lines, mean = super()._headlines(), self.progress()["mean_bits"]
        if self._bits is None:
            lines += [] if mean is None else [f"{mean:.2f} bits on average, not yet rounded"]
        else:
            counts = Counter((q.kind, self.bits[q.name]) for q in self._bank.quantizers)
            lines += [f"{count} {kind} tensors with {bits:g} bits" for (kind, bits), count in sorted(counts.items())]
        return [*lines, *self._follower.lines()]

    def _joint(self, before: Mapping[int, Tensor], steps: Steps | None) -> tuple[Tensor, Tensor, Tensor]:
        """Forget, prune; returns d / d(b_l) by the rule, which quantizers it is for and which of them go straight there (all [L])."""
        _, k, length = self.schedule.joint_at(self._step)
        ratio = self._pruner.forget_(before, steps, (k, length))
        owners, waiting = self._pruner.owner_L, self._pruner.waiting_L
        if k == length - 1:
            self._pruner.finish_period_()
        return ratio, owners, waiting

    def _constrain_bits(self, stage: Stage, ruled: tuple[Tensor, Tensor, Tensor] | None, before: Steps | None, ranges: Tensor) -> None:
        """Guard q_m, project d (cool-down: d follows the integer bits). before, ranges: the bank and its q_m before the base's step."""
        bank, left = self._bank, self.schedule.left_to_settle(self._step)
        if stage != "cool-down" and ruled is None and not left and self._step + 1 < self.schedule.cooldown_start:
            bank.constrain_(ranges, self._upper_bits())
            return
        bank.guard_(ranges)
        now = bank.read()
        if stage != "cool-down":
            if ruled is not None and before is not None:
                ratio, owners, waiting = (part[bank.layer_E] for part in ruled)
                d_rule = ratio.to(now.d.dtype) * bank.step_size_of(bank.lower_L, now)
                _, k, length = self.schedule.joint_at(self._step)
                share = step_share(self._rule, k, length)
                # a rule that doesn't change is followed alone: what the base optimizer adds on the way would come back at the end at once
                proposed = now._replace(d=torch.where(waiting, bank.kept(before, now), now.d))
                start = bank.projected(self._upper_bits(), proposed)  # the base optimizer's own step may leave d below zero
                d_next = d_rule if share == 1.0 else start * (d_rule / start).pow(share)
                now = now._replace(d=torch.where(owners, d_next, now.d))
            now = now._replace(d=bank.projected(self._upper_bits(), now))
            bank.write_d_(bank.settled(now, left) if left else now.d)
            if self._step + 1 < self.schedule.cooldown_start:
                return
        if self._bits is None:
            self._bits = ranks.of_first(bank.rounded_bits())
            self._agree()
        bank.write_d_(bank.step_size_of(self._bits, now))

    def _adopt_plan(self) -> None:
        super()._adopt_plan()
        self._bank.read_settings()
        if self._target is not None and self._target.plan is not None:
            self._bank.fix(self._target.plan.bits)

    def _bounds(self) -> list[float]:
        """This step's upper bound of every quantizer; a plan's bits are reached in the joint stage's last period."""
        targets = [quantizer.bits.upper for quantizer in self._bank.quantizers]
        bounds = {target: self.schedule.upper_bits_at(self._step, target) for target in dict.fromkeys(targets)}
        uppers = [bounds[target] for target in targets]
        if self._target is None or self._target.plan is None:
            return uppers
        period = self._period()
        return self._target.narrowed(uppers, 1.0 if period is None else (period + 1) / self.schedule.num_joint_periods)

    def _observe_next(self) -> None:
        super()._observe_next()
        self._follower.watch(self._step)

    @torch.no_grad()
    def _noted_bits(self) -> tuple[Tensor | None, float | None]:
        if not len(self._bank):
            return None, None
        widths = self._bank.bit_widths() if self._bits is None else self._bits
        return None if self._weights is None else widths[self._weights].mean(), max(self._bounds())

    def _upper_bits(self) -> Tensor:
        """This step's upper bound per quantizer [L]; made anew only when it changes."""
        bounds = tuple(self._bounds())
        if self._upper is None or self._upper[0] != bounds:
            self._upper = (bounds, torch.tensor(bounds, dtype=self._bank.lower_L.dtype, device=self._bank.device))
        return self._upper[1]

    def _decided_bits(self) -> list[float] | None:
        return None if self._bits is None else self._bits.tolist()

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "forgetting": self._rule,
            "tighten": bool(self._tightened),
            **({} if self._follows else {"follow": False}),
            "bits": {q.name: q.bits.to_json() for q in self._bank.quantizers},
        }

    def _extra_state(self) -> dict[str, Any]:
        bits = torch.zeros(0, dtype=torch.int64) if self._bits is None else self._bits.to("cpu", torch.int64)
        return {**super()._extra_state(), "bits": bits, "followed": self._follower.times.cpu()}

    def _load_extra_state(self, extra: Mapping[str, Any]) -> None:
        self._bank.read_settings()
        super()._load_extra_state(extra)
        saved = extra["bits"]
        self._bits = saved.to(self._bank.device, self._bank.lower_L.dtype) if saved.numel() else None
        self._follower.load(extra.get("followed"))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
