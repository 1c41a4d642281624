"""What a criterion may learn over time: one number per group, collected over the steps before groups are marked.

An observer is opened for a window of steps and closed between windows; a run whose criteria observe nothing has none at all.

    fisher        F_g = mean over the window's steps of <x_g, dL/dx_g>^2           dL/dx = p.grad of that step
    activation    how much the layers that read group g depend on it                    (`geta.optim.activations`)

Under gradient accumulation a step has one (accumulated) gradient and several forward passes; all of them are seen. Forward passes
without gradients (validation, the first pass of activation checkpointing) are not looked at.

With several ranks every rank reports the same: activations are shared in each observed step, gradients are reduced by whoever reduces
them for the training (a local gradient would be a wrong one there as well).

Source: Fisher criterion after Theis et al. (arXiv 1801.05787).

Legend: `G` groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from geta.errors import CheckpointError, ConfigError
from geta.optim.groups import Graph, GroupedTensor, GroupIndex, row_sums
from geta.optim.shards import local

UNSEEN = -1.0
"""What an observer reports for a group that it can't observe."""


class Observer(Protocol):
    """Collects one number per group over a window of steps."""

    notes: list[str]

    def start(self) -> None:
        """Begin a window: forget what was seen, attach what is needed if it isn't yet."""
        ...

    def stop(self) -> None:
        """End the window: detach everything."""
        ...

    def observe(self) -> None:
        """Called once per optimizer step, when gradients are there and parameters have not moved yet; by all ranks at once."""
        ...

    def read(self) -> Tensor:
        """What the window has shown so far [G], on the device of the groups."""
        ...

    def state(self) -> dict[str, Any]:
        """What was seen so far, as tensors and plain data, detached from later changes."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        ...


ObserverFactory = Callable[[GroupIndex, Graph], Observer]

OBSERVERS: dict[str, ObserverFactory] = {}
"""All observers by name; `register_observer` adds to it."""


def register_observer(name: str) -> Callable[[ObserverFactory], ObserverFactory]:
    """Make an observer usable by name: a class or function (GroupIndex, Graph) -> Observer."""

    def register(factory: ObserverFactory) -> ObserverFactory:
        if name in OBSERVERS:
            raise ConfigError(f"an observer named '{name}' exists already: choose another name")
        OBSERVERS[name] = factory
        return factory

    return register


class Observation:
    """All observers of one run, opened and closed together.

    observers: by name. A criterion finds what they report under the same names in `GroupStatistics.observed`.
    """

    def __init__(self, observers: Mapping[str, Observer]) -> None:
        self._observers = dict(observers)
        self._open = False

    @property
    def needed(self) -> bool:
        """False when there is nothing to observe."""
        return bool(self._observers)

    @property
    def notes(self) -> list[str]:
        """What can't be observed, in words."""
        return [note for observer in self._observers.values() for note in observer.notes]

    def follow(self, wanted: bool) -> None:
        """Open a new window, close the current one, or go on as it is."""
        if wanted and not self._open:
            for observer in self._observers.values():
                observer.start()
        elif self._open and not wanted:
            for observer in self._observers.values():
                observer.stop()
        self._open = wanted

    def restart(self) -> None:
        """Forget what was seen; an open window goes on as a new one."""
        if self._open:
            for observer in self._observers.values():
                observer.start()

    def watched(self, closure: Callable[[], float] | None) -> Callable[[], float] | None:
        """Observe this step: now, or, where the gradient comes from a closure, after its first call."""
        if not self._open or not self._observers:
            return closure
        if closure is None:
            self._observe()
            return None
        fresh = iter([True])

        def observing() -> float:
            loss = closure()
            if next(fresh, False):
                self._observe()
            return loss

        return observing

    def read(self) -> dict[str, Tensor]:
        """What each observer reports [G]."""
        return {name: observer.read() for name, observer in self._observers.items()}

    def state(self) -> dict[str, Any]:
        """For checkpoints: tensors and plain data."""
        return {name: observer.state() for name, observer in self._observers.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; raises CheckpointError when it is of other observers."""
        if sorted(state) != sorted(self._observers):
            raise CheckpointError(
                f"the checkpoint observed {sorted(state) or 'nothing'}, this run observes {sorted(self._observers) or 'nothing'}: "
                f"resume with the same saliency"
            )
        for name, observer in self._observers.items():
            observer.load(state[name])

    def _observe(self) -> None:
        with torch.no_grad():
            for observer in self._observers.values():
                observer.observe()


@register_observer("fisher")
class FisherObserver:
    """F_g = mean over steps of <x_g, dL/dx_g>^2; a parameter without a gradient counts as gradient zero."""

    def __init__(self, index: GroupIndex, graph: Graph) -> None:  # noqa: ARG002 - one signature for all observers
        self.notes: list[str] = []
        self._index = index
        self._steps = 0
        self._sum_G = torch.zeros(index.num_groups, dtype=index.dtype, device=index.device)

    def start(self) -> None:
        """Forget all gradients."""
        self._steps = 0
        self._sum_G = torch.zeros_like(self._sum_G)

    def stop(self) -> None:
        """Nothing is attached."""

    def observe(self) -> None:
        """Add this step's squared inner products."""
        rows = [row_sums(entry, self._products(entry)) for entry in self._index.parameters]
        mean_G = self._index.average(self._index.per_group(self._index.reduce_rows(rows)))
        self._sum_G = self._sum_G + mean_G.square()
        self._steps += 1

    def read(self) -> Tensor:
        """F [G]. Raises ConfigError when no step was seen."""
        if not self._steps:
            raise ConfigError("saliency 'fisher' has seen no gradient: does the base optimizer call the closure it is given?")
        return self._sum_G / self._steps

    def state(self) -> dict[str, Any]:
        """The sum over steps and their number."""
        return {"sum": self._sum_G.clone(), "steps": self._steps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._steps = int(state["steps"])
        self._sum_G = state["sum"].to(self._sum_G).clone()

    def _products(self, entry: GroupedTensor) -> Tensor:
        parameter = entry.tensor
        if entry.stored.grad is None:
            return torch.zeros_like(parameter, dtype=self._index.dtype)
        grad = local(entry.stored.grad).detach()
        return parameter.detach().to(self._index.dtype) * (grad.to_dense() if grad.is_sparse else grad).to(self._index.dtype)
