"""An optimizer around another optimizer, sharing its parameter groups and state.

Learning-rate schedulers, gradient scalers and everything else that works on `param_groups` see the real thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from geta.errors import CheckpointError, ConfigError
from geta.optim.packed import pack, unpack

SECTION = "geta"
"""Key of our part in `state_dict()`, beside torch's own "state" and "param_groups"; packed into one string, also in the first group."""


class WrappingOptimizer(Optimizer):
    """Common part of the optimizers that add constraints to a base optimizer.

    `param_groups`, `state` and `defaults` are the base's own objects. Subclasses implement `step`, `_extra_state` and
    `_load_extra_state` (plain data and tensors only).
    """

    def __init__(self, base: Optimizer) -> None:
        if not isinstance(base, Optimizer):
            raise ConfigError(f"base is {type(base).__name__}: it must be a torch.optim.Optimizer over the model's parameters")
        if isinstance(base, WrappingOptimizer):
            raise ConfigError(f"base is already a {type(base).__name__}: wrap a plain torch optimizer")
        self._base: Optimizer | None = None
        super().__init__([dict(group) for group in base.param_groups], base.defaults)
        self._base = base
        self._share()

    @property
    def base(self) -> Optimizer:
        """The wrapped optimizer."""
        assert self._base is not None
        return self._base

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the base optimizer."""
        if self._base is None:
            super().add_param_group(param_group)
        else:
            self._base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all optimized parameters."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base's state plus our own under "geta": tensors and plain data only, enough for a bit-exact resume.

        The first parameter group holds our part a second time, as a string (`geta.optim.packed`).
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = self.base.state_dict()
        state[SECTION] = self._extra_state()
        state["param_groups"][0][SECTION] = pack(state[SECTION])
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Load the model's own state dict first: it says which activations are signed.

        Raises CheckpointError, with nothing changed, when it comes from another kind of optimizer or other settings.
        """
        state: dict[str, Any] = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state)
            state = state if replaced is None else replaced
        packed = [group[SECTION] for group in state.get("param_groups", ()) if SECTION in group]
        if SECTION not in state and not packed:
            raise CheckpointError(
                f"this optimizer state has no '{SECTION}' part: it was saved by a plain optimizer, not by {type(self).__name__}, or by a "
                f"saver that flattens parameter groups (don't)"
            )
        extra = state[SECTION] if SECTION in state else unpack(packed[0])
        self._check_extra_state(extra)
        groups = [{key: value for key, value in group.items() if key != SECTION} for group in state.get("param_groups", ())]
        try:
            self.base.load_state_dict({**{key: value for key, value in state.items() if key != SECTION}, "param_groups": groups})
        except ValueError as error:
            raise CheckpointError(f"the saved state of {type(self.base).__name__} doesn't fit: {error}") from error
        self._share()
        self._load_extra_state(extra)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _share(self) -> None:
        """Point at the base's groups and state, which loading replaces."""
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def _extra_state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _check_extra_state(self, extra: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _load_extra_state(self, extra: Mapping[str, Any]) -> None:
        raise NotImplementedError


def move_to_own_group(base: Optimizer, named: Sequence[tuple[str, nn.Parameter]], lr: float) -> None:
    """Take the parameters out of the groups of `base` that hold them and put them into one group with `lr` and no weight decay.

    Raises ConfigError for base optimizers that can hold only one group.
    """
    if not named:
        return
    if isinstance(base, torch.optim.LBFGS):
        raise ConfigError(
            "torch.optim.LBFGS holds a single parameter group, but quantizers need one with their own learning rate: "
            "use another base optimizer, or train without quantizers"
        )
    if type(base).__name__ == "Muon":
        raise ConfigError(
            "Muon updates matrices only, but the quantizers' d, q_m and t are scalars: use another base optimizer, or train "
            "without quantizers"
        )
    moved = {id(parameter) for _, parameter in named}
    with_names = any("param_names" in group for group in base.param_groups)
    for group in base.param_groups:
        keep = [id(parameter) not in moved for parameter in group["params"]]
        for key in ("params", "param_names") if "param_names" in group else ("params",):
            group[key] = [value for value, kept in zip(group[key], keep, strict=True) if kept]
    group = {"params": list(named) if with_names else [parameter for _, parameter in named], "lr": lr}
    if "weight_decay" in base.defaults:
        group["weight_decay"] = 0.0
    base.add_param_group({**group, **_implementation(base, [parameter for _, parameter in named])})


def _implementation(base: Optimizer, parameters: Sequence[nn.Parameter]) -> dict[str, bool]:
    """Which of PyTorch's implementations updates many tiny parameters fastest on the CPU, where its default is a loop over them.

    SGD's fused one is left out: it fails when parameters get their first gradient in different steps.
    """
    chosen = {torch.optim.SGD: "foreach", torch.optim.Adam: "fused", torch.optim.AdamW: "fused"}.get(type(base))
    decided = any(base.defaults.get(key) for key in ("capturable", "differentiable"))
    decided = decided or any(base.defaults.get(key) is not None for key in ("foreach", "fused"))
    plain = all(type(p) is nn.Parameter and p.device.type == "cpu" and p.is_floating_point() for p in parameters)
    return {chosen: True} if chosen is not None and plain and not decided else {}


def call_base(base: Optimizer, closure: Callable[[], float] | None) -> Any:
    """The base's own step, and the closure's loss if there is one."""
    return base.step() if closure is None else base.step(closure)
