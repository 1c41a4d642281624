"""Counting bytes of tensors exactly, by their storages: what lives, and the most that ever lived."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class TensorBytes(TorchDispatchMode):
    """While active, `now` is the bytes of tensors made inside and still alive, `peak` the largest `now`; storages count once."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._seen:
                    self._watch(storage)
        return out

    def _watch(self, storage: Any) -> None:
        size = storage.nbytes()
        self._seen[storage._cdata] = storage
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def reachable(root: Any, without: Iterable[torch.Tensor] = ()) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """Tensors and arrays that an object holds in attributes, containers and their members, but not `without` (nor what shares their
    memory) and nothing that belongs to a module.
    """
    skipped = {tensor.untyped_storage()._cdata for tensor in without}
    seen: set[int] = set()
    tensors: list[torch.Tensor] = []
    arrays: list[np.ndarray] = []
    pending = [root]
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, torch.nn.Module | type | str | bytes):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.untyped_storage()._cdata not in skipped:
                tensors.append(value)
        elif isinstance(value, np.ndarray):
            arrays.append(value)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            pending += value
        elif type(value).__module__.startswith("geta."):
            slots = [getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)]
            pending += [*vars(value).values(), *slots] if hasattr(value, "__dict__") else slots
    return tensors, arrays
