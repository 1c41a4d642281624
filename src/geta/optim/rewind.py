"""One copy of a training state, to go back to: parameters, buffers, and the base optimizer's state.

Not part of it: `param_groups` (learning rates belong to the user's schedulers) and random number generators.
Cost: as much memory as the parameters, the buffers and the base optimizer's state take.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geta.errors import CheckpointError
from geta.graph.names import canonical_name, unwrap


class Rewind:
    """What `model` and `base` were when this was made. Never changed afterwards.

    saved: what `state` of another one returned, in place of what they are now. Raises CheckpointError when it has other tensors.
    """

    def __init__(self, model: nn.Module, base: Optimizer, saved: Mapping[str, Any] | None = None) -> None:
        self._model, self._base = unwrap(model), base
        if saved is None:
            saved = {"tensors": {name: tensor.detach().clone() for name, tensor in self._live().items()}, "state": self._packed_state()}
        self._tensors: dict[str, Tensor] = dict(saved["tensors"])
        self._state: dict[int, Any] = dict(saved["state"])
        other = sorted(self._tensors.keys() ^ self._live().keys())
        if other:
            raise CheckpointError(
                f"the checkpoint keeps another model's tensors for the end of the cycle: {len(other)} names differ (first: '{other[0]}')"
            )

    def state(self) -> dict[str, Any]:
        """For checkpoints: {"tensors": {name: tensor}, "state": {position of a parameter: its state}}."""
        return {"tensors": dict(self._tensors), "state": dict(self._state)}

    @torch.no_grad()
    def restore_tensors_(self) -> None:
        """Give parameters and buffers their old values."""
        for name, tensor in self._live().items():
            tensor.copy_(self._tensors[name])

    def restore_(self) -> None:
        """Give parameters, buffers and the base optimizer's state their old values."""
        self.restore_tensors_()
        self._base.state.clear()
        for position, parameter in enumerate(self._parameters()):
            if position in self._state:
                self._base.state[parameter] = _moved(copy.deepcopy(self._state[position]), parameter.device)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._base.param_groups for parameter in group["params"]]

    def _live(self) -> dict[str, Tensor]:
        """All tensors by name, each once; parameters that only the optimizer knows have their position as name."""
        named: list[tuple[str, Tensor]] = [*self._model.named_parameters(), *self._model.named_buffers()]
        named = [(canonical_name(name), tensor) for name, tensor in named]
        known = {id(tensor) for _, tensor in named}
        others = [(f"param_groups.{i}", p) for i, p in enumerate(self._parameters()) if id(p) not in known]
        return dict([*named, *others])

    def _packed_state(self) -> dict[int, Any]:
        state = self._base.state
        return {i: copy.deepcopy(dict(state[parameter])) for i, parameter in enumerate(self._parameters()) if parameter in state}


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors of a parameter's state beside it again, after a checkpoint was read elsewhere; 0-dimensional ones stay where they are."""
    if isinstance(value, Tensor):
        return value.to(device) if value.dim() else value
    if isinstance(value, dict):
        return {key: _moved(inner, device) for key, inner in value.items()}
    return [_moved(inner, device) for inner in value] if isinstance(value, list) else value
