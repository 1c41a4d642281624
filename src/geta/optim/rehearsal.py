"""What a base optimizer's next step would do to some parameters, without taking it: so that scores need no copy of all of them.

Groups are scored by the step that the base optimizer proposes, and the rows that were marked are needed as they were before it. Instead of
copying every parameter first, the step is taken on a few parameters at a time, looked at, and taken back; what is copied meanwhile is
these parameters, their gradients and their optimizer state alone. Then the real step follows.

That is exact for optimizers that update each parameter by itself from its own gradient and state, as those listed here do.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geta.optim.groups import GroupedTensor
from geta.optim.shards import local

_ALONE = frozenset(
    getattr(torch.optim, name)
    for name in ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
)
"""These very types; a subclass may do anything."""


def can_rehearse(base: Optimizer) -> bool:
    """Whether a step of `base` can be taken on some parameters alone, and taken back."""
    untouched = "step" not in vars(base) and getattr(base, "grad_scale", None) is None
    special = any(group.get(key) for group in base.param_groups for key in ("differentiable", "capturable"))
    return type(base) in _ALONE and untouched and not special


def chunks(entries: Sequence[GroupedTensor]) -> Iterator[list[GroupedTensor]]:
    """The entries in order, in runs that together have no more elements than the largest of them."""
    most = max((entry.stored.numel() for entry in entries), default=0)
    run: list[GroupedTensor] = []
    size = 0
    for entry in entries:
        numel = entry.stored.numel()  # of the whole tensor, so that all ranks of a sharded model cut alike
        if run and size + numel > most:
            yield run
            run, size = [], 0
        run.append(entry)
        size += numel
    if run:
        yield run


@contextmanager
def rehearsed(base: Optimizer, entries: Sequence[GroupedTensor]) -> Iterator[list[Tensor]]:
    """In the body the base has stepped on these parameters alone; given is what they were. Afterwards they and their state are that again.

    Parameters that the base doesn't train stay what they are. Hooks on the step don't run.
    """
    before = [entry.tensor.detach().clone() for entry in entries]
    wanted = {id(entry.stored) for entry in entries}
    groups = [{**group, "params": [p for p in group["params"] if id(p) in wanted]} for group in base.param_groups]
    own = [parameter for group in groups for parameter in group["params"]]
    gradients = [(p.grad, p.grad.detach().clone()) for p in own if p.grad is not None]  # Nesterov's momentum changes them in place
    states = {parameter: _copied(base.state[parameter]) for parameter in own if parameter in base.state}
    all_groups = base.param_groups
    try:
        base.param_groups = [group for group in groups if group["params"]]
        with torch.no_grad():
            inspect.unwrap(type(base).step)(base)
        yield before
    finally:
        base.param_groups = all_groups
        with torch.no_grad():
            for entry, values in zip(entries, before, strict=True):
                entry.tensor.copy_(values)
            for gradient, values in gradients:
                gradient.copy_(values)
            for parameter in own:
                if parameter in states:
                    _restore_(base.state[parameter], states[parameter])
                else:
                    base.state.pop(parameter, None)


def _copied(state: dict[str, Any]) -> dict[str, tuple[Any, Tensor | None]]:
    """Each value of a parameter's state, and a copy of what it holds if it is a tensor."""
    return {key: (value, local(value).detach().clone() if isinstance(value, Tensor) else None) for key, value in state.items()}


def _restore_(state: dict[str, Any], saved: dict[str, tuple[Any, Tensor | None]]) -> None:
    for value, values in saved.values():
        if values is not None:
            local(value).copy_(values)
    state.clear()
    state.update({key: value for key, (value, _) in saved.items()})
