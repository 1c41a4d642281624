"""Many small parameters as one flat vector: gathered and written back by one call each, whatever their number.

Legend: `E` numbers in all parameters together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geta.quant import native

_KINDS = {torch.float32: "f32", torch.float64: "f64"}


class Stacked:
    """Reads and writes `tensors` as one vector. Where the compiled kernels can't reach them, PyTorch's operators do it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self._numels = [tensor.numel() for tensor in self.tensors]
        self._pointers: list[int] | None = None
        self._addresses: np.ndarray | None = None

    def reachable(self) -> bool:
        """Whether the compiled kernels can read and write all of them where they are now: on the CPU, so that nothing has to wait."""
        if not all(type(tensor) is Tensor or type(tensor) is torch.nn.Parameter for tensor in self.tensors):
            return False
        pointers = [tensor.data_ptr() for tensor in self.tensors]
        if pointers != self._pointers:
            self._pointers, self._addresses = pointers, self._found(pointers)
        return self._addresses is not None

    def read(self) -> Tensor:
        """A copy of all of them [E]."""
        if not self.reachable():
            return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])
        assert self._addresses is not None
        flat = torch.empty(len(self._addresses), dtype=self.tensors[0].dtype)
        _library().geta_gather(self._addresses.ctypes.data, flat.data_ptr(), len(self._addresses), flat.element_size())
        return flat

    def write_(self, flat_E: Tensor) -> None:
        """Store new values."""
        if not self.reachable():
            parts = [part.view_as(tensor) for part, tensor in zip(torch.split(flat_E, self._numels), self.tensors, strict=True)]
            torch._foreach_copy_(self.tensors, parts)
            return
        assert self._addresses is not None
        flat = flat_E.to(self.tensors[0]).contiguous()
        _library().geta_scatter(flat.data_ptr(), self._addresses.ctypes.data, len(self._addresses), flat.element_size())
        torch.autograd.graph.increment_version(self.tensors)

    def clamp_(self, lowest: float, highest: float) -> None:
        """Clamp all of them; waits for no device."""
        if not self.tensors:
            return
        if not self.reachable():
            torch._foreach_clamp_min_(self.tensors, lowest)
            torch._foreach_clamp_max_(self.tensors, highest)
            return
        self.write_(self.read().clamp_(lowest, highest))

    def constrain_(
        self, ranges: Stacked, before_E: Tensor, levels: tuple[Tensor, Tensor], factor: float, domain: tuple[float, float]
    ) -> bool:
        """Step sizes and their `ranges` by `geta_constrain`; levels: the most and the fewest. False where the kernels can't reach them."""
        flats = (before_E, *levels)
        if not self.reachable() or not ranges.reachable() or any(flat.dtype != self.tensors[0].dtype for flat in flats):
            return False
        assert self._addresses is not None
        assert ranges._addresses is not None
        call = getattr(_library(), f"geta_constrain_{_KINDS[self.tensors[0].dtype]}")
        addresses = (self._addresses.ctypes.data, ranges._addresses.ctypes.data)
        call(*addresses, *(flat.data_ptr() for flat in flats), len(before_E), factor, *domain)
        torch.autograd.graph.increment_version([*self.tensors, *ranges.tensors])
        return True

    def _found(self, pointers: Sequence[int]) -> np.ndarray | None:
        if not self.tensors or _library() is None:
            return None
        dtype = self.tensors[0].dtype
        fits = all(t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous() and not t.is_neg() for t in self.tensors)
        if not fits or dtype not in _KINDS:
            return None
        size = self.tensors[0].element_size()
        parts = [pointer + size * np.arange(count) for pointer, count in zip(pointers, self._numels, strict=True)]
        return np.concatenate(parts).astype(np.int64)


def _library() -> Any:
    return native._library()[0]
