"""Small tensors of a saved model, put together: safetensors spends a hundred bytes on the name and place of each.

Tensors of up to 1 KiB are laid end to end, in the order in which the model's description lists them, into one tensor per dtype called
`*float32` and so on, names that no tensor of a model can have. Shapes and dtypes are in the description anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from geta.errors import CheckpointError

_LARGEST = 1024  # bytes
_MARK = "*"

Layout = tuple[torch.dtype, tuple[int, ...]]


def bundled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to write for these, given in the order of the description."""
    alone: dict[str, Tensor] = {}
    small: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() <= _LARGEST:
            small.setdefault(_bundle(tensor.dtype), []).append(tensor.reshape(-1))
        else:
            alone[name] = tensor
    return alone | {name: torch.cat(parts) for name, parts in small.items()}


def unbundled(stored: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """The tensors by name. layouts: dtype and shape of each in the file, in the order of the description.

    Raises CheckpointError when the file holds others than the described ones.
    """
    found = {name: tensor for name, tensor in stored.items() if not name.startswith(_MARK)}
    bundles = {name: tensor.reshape(-1) for name, tensor in stored.items() if name.startswith(_MARK)}
    used = dict.fromkeys(bundles, 0)
    for name, (dtype, shape) in layouts.items():
        if name in found:
            continue
        bundle, numel = _bundle(dtype), math.prod(shape)
        start = used.get(bundle, 0)
        if bundle not in bundles or bundles[bundle].dtype != dtype or start + numel > len(bundles[bundle]):
            raise CheckpointError(f"tensor '{name}' is described but not saved: the file is damaged")
        try:
            found[name] = bundles[bundle][start : start + numel].reshape(shape).clone()
        except (RuntimeError, OverflowError, TypeError) as error:
            raise CheckpointError(f"tensor '{name}' can't have the shape {list(shape)}: the file is damaged") from error
        used[bundle] = start + numel
    if sorted(found) != sorted(layouts) or any(len(bundles[name]) != end for name, end in used.items()):
        raise CheckpointError("the saved tensors are not those that the saved model describes: the file is damaged")
    return found


def _bundle(dtype: torch.dtype) -> str:
    return f"{_MARK}{str(dtype).removeprefix('torch.')}"
