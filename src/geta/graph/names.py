"""The user's own tensor names, before and after quantizers are attached.

`torch.nn.utils.parametrize` renames `conv.weight` to `conv.parametrizations.weight.original`. A dependency graph speaks
only of `conv.weight`; these two functions translate, so that a graph made before quantization works after it and the reverse.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from geta.errors import BadModelError

_PARAMETRIZED = re.compile(r"(?:^|(?<=\.))parametrizations\.([^.]+)\.original$")


def canonical_name(name: str) -> str:
    """Return the user's name of a tensor: `a.parametrizations.weight.original` -> `a.weight`."""
    return _PARAMETRIZED.sub(r"\1", name)


def find_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """Return the stored parameter or buffer that `name` (canonical) stands for, before any parametrization is applied.

    Raises BadModelError when the model has no such tensor.
    """
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise BadModelError(
            f"the model has no module '{path}' (needed for tensor '{name}'): was the graph made from another model?"
        ) from None
    parametrized = getattr(module, "parametrizations", None)
    found: object
    if isinstance(parametrized, nn.ModuleDict) and leaf in parametrized:
        found = parametrized[leaf].original
    else:
        found = module._parameters.get(leaf, module._buffers.get(leaf))
    if not isinstance(found, torch.Tensor):
        raise BadModelError(f"module '{path or '(the model itself)'}' has no tensor '{leaf}': was the graph made from another model?")
    return found
