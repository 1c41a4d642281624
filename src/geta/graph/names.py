"""The user's own tensor names, before and after quantizers are attached.

`torch.nn.utils.parametrize` renames `conv.weight` to `conv.parametrizations.weight.original`. A dependency graph speaks
only of `conv.weight`; `canonical_name` and `find_tensor` translate, so that a graph made before quantization works after it and
the reverse. What `torch.compile`, `DistributedDataParallel` and torch's checkpoint wrapper put around modules is no part of the user's
names either.
Several stored tensors of one parametrization (`original0`, `original1` of a weight norm) keep their own names.
"""

from __future__ import annotations

import re
import sys

import torch
from torch import nn

from geta.errors import BadModelError

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)(?:\.|$)")
_SLICED = re.compile(r"(?:^|(?<=\.))slice\((None|\d+), (?:None|-?\d+), (None|\d+)\)\.(\d+)(?=\.|$)")
_PARAMETRIZED = re.compile(r"(?:^|(?<=\.))parametrizations\.([^.]+)\.original$")


def canonical_name(name: str) -> str:
    """Return the user's name of a tensor: `a.parametrizations.weight.original` -> `a.weight`."""
    return _WRAPPERS.sub("", _PARAMETRIZED.sub(r"\1", name))


def without_wrappers(name: str) -> str:
    """A name as it was before `torch.compile` and torch's checkpoint wrapper: `_orig_mod.a._checkpoint_wrapped_module.b` -> `a.b`."""
    return _WRAPPERS.sub("", name).rstrip(".")


def canonical_module(path: str) -> str:
    """The user's module path: `conv.parametrizations.weight.0` -> `conv`, `_orig_mod.conv` -> `conv`.

    `torch.export` names a module reached through a slice of its list by that slice: `layers.slice(1, None, None).0` -> `layers.1`.
    """
    head, marker, _ = path.partition("parametrizations.")
    return _SLICED.sub(_position, without_wrappers(head if marker else path))


def _position(found: re.Match[str]) -> str:
    start, step, index = (None if part == "None" else int(part) for part in found.groups())
    return str((start or 0) + (index or 0) * (step or 1))


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside `DistributedDataParallel`, `DataParallel`, `torch.compile` and checkpoint wrappers, in any order."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif _is_compiled(model):
            model = model._orig_mod  # type: ignore[assignment]
        elif _is_checkpointed(model):
            model = model._checkpoint_wrapped_module  # type: ignore[assignment]
        else:
            return model


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` wrapped it; torch's compiler is loaded only where something was compiled."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def _is_checkpointed(module: nn.Module) -> bool:
    """Whether torch's `checkpoint_wrapper` is around it; loaded only where something was wrapped."""
    wrapper = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    return wrapper is not None and isinstance(module, wrapper.ActivationWrapper)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = unwrap(model)
    for part in path.split(".") if path else ():
        module = module._modules.get(part) if module is not None else None
        if module is not None and (_is_compiled(module) or _is_checkpointed(module)):
            module = unwrap(module)
    return module


def find_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """Return the stored parameter or buffer that `name` (canonical) stands for, before any parametrization is applied.

    `model` may be the user's module or a wrapper around it (see `unwrap`).
    Raises BadModelError when the model has no such tensor.
    """
    path, _, leaf = name.rpartition(".")
    module = _submodule(model, path)
    if module is None:
        raise BadModelError(f"the model has no module '{path}' (needed for tensor '{name}'): was the graph made from another model?")
    parametrized = getattr(module, "parametrizations", None)
    found: object
    if isinstance(parametrized, nn.ModuleDict) and leaf in parametrized and hasattr(parametrized[leaf], "original"):
        found = parametrized[leaf].original
    else:
        found = module._parameters.get(leaf, module._buffers.get(leaf))
    if not isinstance(found, torch.Tensor):
        raise BadModelError(f"module '{path or '(the model itself)'}' has no tensor '{leaf}': was the graph made from another model?")
    return found


def first_names(model: nn.Module) -> dict[str, str]:
    """Canonical name of every parameter and buffer -> the first canonical name under which the same tensor is registered."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names[canonical_name(name)] = first.setdefault(id(tensor), canonical_name(name))
    return names
