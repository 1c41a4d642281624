"""Running statistics of batch normalizations: how fast they follow the network, and first ones for those that have seen nothing."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from geta.errors import ConfigError
from geta.graph.preserve import mode_of
from geta.recipes.tasks.task import Call


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Share of the newest batch in the running statistics of every batch normalization, in (0, 1].

    With PyTorch's 0.1 they are of the network as it was some ten steps ago. At a large learning rate, and more so with weights of few
    bits, that is another network, and accuracy in evaluation mode falls for a few steps while that in training mode doesn't.
    Raises ConfigError if the network has no batch normalization with running statistics.
    """
    norms = _norms(model)
    if not norms:
        raise ConfigError(
            "train.norm_momentum has no effect: the network has no batch normalization with running statistics; leave the key out"
        )
    for norm in norms:
        norm.momentum = momentum


@torch.no_grad()
def warm_norms(model: nn.Module, calls: list[Call]) -> None:
    """Give batch norms that have seen nothing yet the mean statistics of these calls.

    Calibration sees the network in evaluation mode, and that of a fresh one is nothing like what training will see.
    """
    norms = [norm for norm in _norms(model) if norm.num_batches_tracked is not None and not norm.num_batches_tracked]
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    with mode_of(model, True):
        for norm in norms:
            norm.momentum = None  # a cumulative mean
        for args, kwargs in calls:
            model(*args, **kwargs)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch normalizations that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
