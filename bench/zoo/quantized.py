"""Does the analysis of a quantized model find the families of the float model? `same_families` says where it doesn't."""

from __future__ import annotations

import copy
import glob
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from geta.graph import DependencyGraph, Family, analyze
from geta.quant import Bits, quantize
from geta.quant.attach import Granularity
from geta.quant.targets import find_layers, find_weights


def same_families(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    granularity: Granularity = "tensor",
    group_size: int | None = None,
    exact: bool = True,
    plain: DependencyGraph | None = None,
) -> list[str]:
    """Differences, in words, between the families of `model` and those of a quantized copy; empty when there are none.

    Weights and activations are quantized; the activations' ranges come from the example inputs. What the quantizers add to a
    family (a step size per channel) is left out of the comparison; so is which one of several reasons a frozen family quotes.
    plain: the float model's graph, if it is at hand.
    """
    plain = plain or analyze(model, args, kwargs, exact=exact)
    excluded = [glob.escape(path) for path in unquantizable(model, args, dict(kwargs or {}))]
    if not find_weights(model, find_layers(model, excluded, strict=True)):
        return []  # e.g. every weight is computed by a parametrization
    quantized = quantize(
        copy.deepcopy(model),
        weights=Bits(4, 8),
        activations=Bits(8, 8),
        granularity=granularity,
        group_size=group_size,
        exclude=excluded,
        calibration=[_batch(model, args, dict(kwargs or {}))],
    )
    return differences(plain, analyze(quantized, args, kwargs, exact=exact))


def unquantizable(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Paths of the modules that `quantize` can't work on: parametrized already, or their forward never runs."""
    return sorted({*_parametrized(model), *_never_called(model, args, kwargs)})


def _parametrized(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if path and parametrize.is_parametrized(module)]


def _never_called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Modules whose forward does not run (their weights are used by other code): there is no input to put a quantizer on."""
    called: set[int] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(id(module))) for module in model.modules()]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [path for path, module in model.named_modules() if path and id(module) not in called and next(module.children(), None) is None]


def differences(plain: DependencyGraph, quantized: DependencyGraph) -> list[str]:
    """How the families of the second graph differ from those of the first, its quantizers' own tensors left out."""
    known = {member.param for family in plain.families for member in family.members}
    before = {family.name: family for family in plain.families}
    after = {family.name: family for family in quantized.families if any(member.param in known for member in family.members)}
    found = [f"family '{name}' is missing in the quantized model" for name in before if name not in after]
    found += [f"family '{name}' is only in the quantized model" for name in after if name not in before]
    return found + [text for name in before if name in after for text in _compared(before[name], after[name], known)]


def _compared(one: Family, other: Family, known: set[str]) -> list[str]:
    found = []
    for what in ("unit", "size", "prunable", "inexact"):
        left, right = getattr(one, what), getattr(other, what)
        if left != right:
            found.append(f"family '{one.name}': {what} is {left!r} in the float model and {right!r} in the quantized one")
    mine = {(member.param, member.dim): member for member in one.members}
    theirs = {(member.param, member.dim): member for member in other.members if member.param in known}
    for place in dict.fromkeys([*mine, *theirs]):
        left, right = mine.get(place), theirs.get(place)
        if left is None or right is None:
            found.append(f"family '{one.name}': {place} is a member only in the {'quantized' if left is None else 'float'} model")
        elif left != right or not torch.equal(left.index, right.index):
            found.append(f"family '{one.name}': {place} has another role, index map or need to be zero")
    return found


def _batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The example inputs as a calibration batch: a tuple, or a dict by the names that `forward` gives them."""
    if not kwargs:
        return args
    return dict(inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments) if args else kwargs
