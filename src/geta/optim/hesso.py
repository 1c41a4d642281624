"""HESSO: any torch optimizer plus one hard constraint, exactly K groups at zero; no quantizers, no learning-rate of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from geta.errors import ConfigError
from geta.optim.bank import QuantizerBank
from geta.optim.budget import Budget, sparsity_or_budget
from geta.optim.groups import Graph
from geta.optim.saliency import SaliencyLike
from geta.optim.schedule import Schedule
from geta.optim.setup import as_schedule
from geta.optim.structured import StructuredOptimizer
from geta.optim.wrapper import call_base
from geta.quant import quantizers


class HESSO(StructuredOptimizer):
    """Hybrid efficient structured sparse optimizer over `base`: prunes while it trains.

    With delta the step that `base` proposes, every period of the joint stage marks the least important groups R and

        x   <- x + delta                                     important groups
        x_R <- (x_R + delta_R) (K_p - k - 1) / (K_p - k)     redundant groups, zero in the period's last step k = K_p - 1

    Removed groups stay at zero to the end.

    base:        any torch optimizer over the model's parameters; `param_groups` and `state` stay its own.
    graph:       the model's DependencyGraph.
    sparsity:    K = floor(sparsity * number of prunable groups), in [0, 1); 0.5 if neither it nor `target` is given.
    layer_sparsity: the share of whole residual branches (`geta.analyze(depth=True)`) that goes, counted apart from the other
                 groups; None = as `sparsity`. At least one branch of each set stays (`geta.graph.families.layer_sets`).
    target:      a `geta.Budget` of costs instead: the joint stage's first step decides how many groups each family loses.
    schedule:    a `Schedule`, or the planned number of steps. There is nothing to project, so that a projection stage counts
                 as warm-up.
    multiple_of: each family keeps a multiple of this many groups, or all; or the name of a `geta.device_profile`: of so many channels.
    uniform:     families that repeat across layers lose equal numbers of groups, and whole blocks go, see `QASSO`.
    saliency:    see `geta.optim.saliency.Saliency`.

    Raises ConfigError for impossible settings, and for a model with quantizers, whose bit widths only `QASSO` keeps in range.
    Source: HESSO (arXiv 2409.09085), section 3.
    Deviation: rows that a batch normalization scales wait for the period's last step (`geta.optim.forget`).
    """

    def __init__(
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
    ) -> None:
        refuse_quantizers(graph, type(self).__name__)
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

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One optimizer step; returns the closure's loss if a closure is given.

        Raises GetaError at the start of a period when parameters are no longer finite.
        """
        self._follow_model()
        if self._only_allocates(closure):
            return self.base.step()
        joint = self._prunes and self.stage == "joint"
        _, k, length = self.schedule.joint_at(self._step) if joint else (0, -1, 0)
        if self._prunes and self.schedule.is_period_start(self._step):
            self._check_finite()
        ahead = k == 0 and self._rehearses()
        if ahead:
            closure = self._mark_ahead(closure)
        before = self._pruner.snapshot(everything=True) if k == 0 and not ahead else {}
        loss = call_base(self.base, closure) if ahead else self._call_base(closure)
        with torch.no_grad():
            self._pruner.enforce_()
            if k == 0 and not ahead:
                self._mark_behind(before)
            if joint:
                self._pruner.decay_((k, length))
            if joint and k == length - 1:
                self._pruner.finish_period_()
        self._advance()
        return loss


def refuse_quantizers(graph: Graph, name: str) -> None:
    """Raise ConfigError when the model has quantizers with learned bit widths."""
    found = quantizers(graph.model)
    if found:
        raise ConfigError(
            f"the model has {len(found)} quantizers (first: '{next(iter(found))}'), but {name} only prunes and would let their bit widths "
            f"leave the range: use geta.QASSO, or prune first and quantize afterwards"
        )


def without_projection(schedule: Schedule) -> Schedule:
    """The same plan with the projection stage as a part of the warm-up."""
    if not schedule.projection_steps:
        return schedule
    return dataclasses.replace(schedule, warmup=schedule.joint_start, projection=0, projection_periods=None, bit_step=None)
