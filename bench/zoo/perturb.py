"""Make wrong cuts visible: random initialisation hides them behind zeros, ones and tiny gates.

A LayerScale of 1e-6, a zero-initialised last layer or weights of standard deviation 0.02 leave outputs nearly independent of the
inner blocks, so a wrong removal there would stay below any tolerance. Everything is redrawn deterministically, in place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_SMALLEST = 0.5
"""Matrices whose standard deviation is below this share of 1 / sqrt(fan in) are scaled up to it."""
_MASK_VALUES = 2


def perturb(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 0) -> None:
    """Redraw constant and tiny parameters, then give BatchNorms statistics that fit the model's own activations."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 0:
                _redraw(parameter, generator)
        _set_statistics(model, args, kwargs, generator)


def _redraw(parameter: Tensor, generator: torch.Generator) -> None:
    def noise(low: float, high: float) -> Tensor:
        drawn = torch.rand(parameter.shape, generator=generator) * (high - low) + low
        return drawn.to(parameter.dtype)

    value = float(parameter.flatten()[0])
    constant = bool((parameter == value).all())
    if constant and abs(value) > 0.05:
        parameter.mul_(noise(0.6, 1.4))
    elif constant and parameter.dim() == 1 and value != 0:  # LayerScale and its kin
        parameter.copy_(noise(0.3, 0.9))
    elif constant and parameter.dim() <= 1:
        parameter.copy_(noise(-0.3, 0.3))
    elif parameter.dim() > 1:
        least = _SMALLEST / math.sqrt(max(1, parameter[0].numel()))
        spread = float(parameter.float().std())
        if constant or spread == 0:
            parameter.copy_(noise(-1.7, 1.7) * least)
        elif spread < least:
            parameter.mul_(least / spread)


def _set_statistics(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], generator: torch.Generator) -> None:
    """One training forward fills the running statistics, which are then jittered; where it fails they are random."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    try:
        model(*args, **kwargs)
    except (RuntimeError, ValueError):
        for norm in norms:
            norm.reset_running_stats()
    model.eval()
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        variance.mul_(torch.rand(variance.shape, generator=generator) * 0.3 + 0.9).clamp_(min=1e-2)
        mean.add_(variance.sqrt() * (torch.rand(mean.shape, generator=generator) - 0.5) * 0.3)


def fresh_inputs(args: tuple[Any, ...], kwargs: dict[str, Any], seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Other inputs of the same shapes and kinds: floats redrawn with their own spread, ids permuted within each row, masks kept.

    Permuting keeps how often each id occurs, which matters for image placeholders and end-of-text tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def redraw(leaf: Tensor) -> Tensor:
        if leaf.dim() == 0 or leaf.dtype == torch.bool:
            return leaf
        if leaf.is_floating_point():
            if bool(((leaf == 0) | (leaf == 1)).all()):
                return leaf
            shift = torch.randn(leaf.shape[0], *[1] * (leaf.dim() - 1), generator=generator)
            noise = torch.randn(leaf.shape, generator=generator) + 0.3 * shift
            return (noise * leaf.std() + leaf.mean()).clamp(leaf.min(), leaf.max()).to(leaf.dtype)
        if leaf.is_complex() or len(leaf.unique()) <= _MASK_VALUES:
            return leaf
        order = torch.rand(leaf.shape, generator=generator).argsort(-1)
        return leaf.gather(-1, order)

    changed: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(torch.Tensor, redraw, (args, kwargs))
    return changed
