"""Rows of many parameters at once, by the compiled kernels of `geta.quant`: what the joint stage does in one pass instead of dozens.

An optimizer step looks at every redundant row of every parameter three times: to copy it before the base optimizer's step, to sum
over the step, and to move it. PyTorch's operators take about twenty passes for that and several dispatches per parameter; here it is one
call for all of them. Sums are taken row by row, in doubles over the rows, so they depend on neither threads nor timing.

Covered are rows along dimension 0 of dense CPU tensors that aren't sharded, with linear quantizers or none; the pruner does the
rest by PyTorch's operators. A row with a scale for each block of columns is as many rows as blocks to the kernels.

Legend: `R` rows, `N` pairs (parameter, family), `F` families, `L` quantizers, `E` scalars of one parameter over all of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geta.errors import GetaError
from geta.optim.bank import QuantizerBank, Steps
from geta.optim.groups import GroupedTensor
from geta.quant import native
from geta.quant.blocks import Cutting, widths_of
from geta.quant.quantizer import Quantizer

_KINDS = {torch.float32: "f32", torch.float64: "f64"}
_ELEMENTS_PER_THREAD = 32_768
_ARRAYS = ("owner", "offset", "length", "start", "pair", "family", "setting", "layer", "is_signed")


class _Table(ctypes.Structure):
    """`geta_rows` of native_rows.c."""

    _fields_ = (
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
        ("pairs", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Chosen:
    """Some rows of one parameter: `rows` along dimension 0, the family and the pair of each, and its quantizer in the bank or -1."""

    entry: GroupedTensor
    rows: Tensor
    families: Tensor
    pairs: Tensor
    layer: int


def library() -> Any:
    """The compiled kernels, or None."""
    return native._library()[0]


def covered(entry: GroupedTensor) -> bool:
    """Whether the kernels can reach the rows of this tensor."""
    tensor = entry.stored
    plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    if not plain or entry.part is not None or entry.dims != (0,) or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return False
    return native.is_dense(tensor) and not tensor.is_neg() and tensor.numel() > 0 and library() is not None


def forgettable(entry: GroupedTensor, layer: int, bank: QuantizerBank, dtype: torch.dtype) -> bool:
    """Whether the kernels can forget rows of this parameter; dtype: in which sums are taken."""
    if dtype not in _KINDS or entry.stored.dtype != dtype or not covered(entry):
        return False
    if layer < 0:
        return True
    quantizer = bank.quantizers[layer]
    d, size = quantizer.d, entry.stored.shape[0]
    per_row = (d.numel() == size or bool(quantizer.blocks)) and d.dim() == entry.stored.dim() and d.shape[0] == size
    if quantizer.blocks and Cutting.of(entry.stored.shape, d.shape, quantizer.blocks).axis != 1:
        return False
    return quantizer.linear and d.dtype == dtype and d.device.type == "cpu" and (d.numel() == 1 or per_row)


class _Rows:
    """Rows of several tensors, as the kernels take them. arrays: by the names of `_ARRAYS`, in elements or bytes."""

    def __init__(self, entries: Sequence[GroupedTensor], arrays: dict[str, np.ndarray], pairs: int = 0) -> None:
        self._tensors = [entry.stored for entry in entries]
        self._names = [entry.name for entry in entries]
        self._kinds = [_kind(tensor) for tensor in self._tensors]
        self._pointers: list[int] = []
        self._addresses = np.zeros(0, np.int64)
        self._arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        self.count, self.elements = len(arrays["owner"]), int(arrays["length"].sum())
        self._table = _Table(self.count, *(values.ctypes.data for values in self._arrays.values()), pairs, 1)
        self._library = library()

    def _call(self, name: str, data: int, *arguments: Any) -> None:
        threads = torch.get_num_threads() if native.native_status().threads else 1
        self._table.threads = min(threads, max(1, self.elements // _ELEMENTS_PER_THREAD))
        getattr(self._library, name)(ctypes.addressof(self._table), data, *arguments)

    def _data(self) -> int:
        """Where the tensors are now. Raises GetaError when one of them was replaced by another kind of tensor."""
        pointers = [tensor.data_ptr() for tensor in self._tensors]
        if pointers != self._pointers:
            for name, tensor, kind in zip(self._names, self._tensors, self._kinds, strict=True):
                if _kind(tensor) != kind:
                    raise GetaError(
                        f"'{name}' changed its shape, type, device or memory layout while its groups are being removed: convert the model "
                        f"before the optimizer is made"
                    )
            self._pointers, self._addresses = pointers, np.array(pointers, np.int64)
        return int(self._addresses.ctypes.data)

    def _changed(self) -> None:
        torch.autograd.graph.increment_version(self._tensors)


class RedundantRows(_Rows):
    """The redundant rows of one period. chosen: at least one parameter; pairs: how many (parameter, family) there are in all."""

    def __init__(self, chosen: Sequence[Chosen], bank: QuantizerBank, pairs: int) -> None:
        super().__init__([one.entry for one in chosen], _arrays(chosen, bank), pairs)
        self.dtype = chosen[0].entry.stored.dtype
        self._kind = _KINDS[self.dtype]
        self._partial = torch.empty(4 * self.count, dtype=torch.float64)
        self._removed = RemovedRows([(one.entry, one.rows) for one in chosen])

    def copied(self, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """All rows one after another, of the parameters or of copies of them."""
        flat = torch.empty(self.elements, dtype=self.dtype)
        if tensors is None:
            self._call(f"geta_rows_copy_{self._kind}", self._data(), flat.data_ptr())
            return flat
        assert [_kind(tensor) for tensor in tensors] == self._kinds
        addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        self._call(f"geta_rows_copy_{self._kind}", int(addresses.ctypes.data), flat.data_ptr())
        return flat

    def sums(self, before: Tensor, steps: Steps | None, unit_E: Tensor | None) -> Tensor:
        """The four sums of `geta.optim.forget.PairSums` [4, N]. before: `copied()` before the step; unit_E: d(b_l)."""
        found = torch.empty(4, self._table.pairs, dtype=torch.float64)
        settings, keep = self._settings(steps, unit_E)
        arguments = (before.data_ptr(), *settings, self._partial.data_ptr(), found.data_ptr())
        self._call(f"geta_rows_sums_{self._kind}", self._data(), *arguments)
        del keep
        return found.to(self.dtype)

    def move_(self, before: Tensor, steps: Steps | None, unit_E: Tensor | None, rates: tuple[Tensor, Tensor]) -> None:
        """`x_R <- x_R - gamma (c + ratio v)`. rates: gamma per family [F] and ratio per quantizer [L]."""
        gamma_F, ratio_L = (rate.to(self.dtype).contiguous() for rate in rates)
        settings, keep = self._settings(steps, unit_E)
        arguments = (before.data_ptr(), *settings, gamma_F.data_ptr(), ratio_L.data_ptr())
        self._call(f"geta_rows_move_{self._kind}", self._data(), *arguments)
        del keep
        self._changed()

    def scale_(self, factor: float) -> None:
        """`x_R <- x_R * factor`."""
        self._call(f"geta_rows_scale_{self._kind}", self._data(), factor)
        self._changed()

    def zero_(self) -> None:
        """`x_R <- 0`, exactly, whatever is there now."""
        self._removed.zero_()

    def _settings(self, steps: Steps | None, unit_E: Tensor | None) -> tuple[list[int], list[Tensor]]:
        """Addresses of d, q_m and unit, and the tensors that must live until the call is over."""
        if steps is None or unit_E is None:
            return [0, 0, 0], []
        tensors = [tensor.to(self.dtype).contiguous() for tensor in (steps.d, steps.q_m, unit_E)]
        return [tensor.data_ptr() for tensor in tensors], tensors


class RemovedRows(_Rows):
    """Rows that stay at zero. chosen: tensors of any type and which of their rows."""

    def __init__(self, chosen: Sequence[tuple[GroupedTensor, Tensor]]) -> None:
        found: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
        for owner, (entry, rows) in enumerate(chosen):
            index, stride = rows.cpu().numpy(), entry.stored.numel() // entry.stored.shape[0] * entry.stored.element_size()
            for name in _ARRAYS:
                found[name].append(np.zeros(len(index), np.int64))
            found["owner"][-1][:] = owner
            found["offset"][-1][:] = index * stride
            found["length"][-1][:] = stride
        super().__init__([entry for entry, _ in chosen], {name: np.concatenate(parts) for name, parts in found.items()})

    def zero_(self) -> None:
        """Set all of them to zero."""
        self._call("geta_rows_zero", self._data())
        self._changed()


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _arrays(chosen: Sequence[Chosen], bank: QuantizerBank) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
    signed = bank.signed_L.tolist()
    first_E = np.concatenate([[0], np.cumsum([quantizer.d.numel() for quantizer in bank.quantizers])])
    start = 0
    for owner, one in enumerate(chosen):
        rows = one.rows.cpu().numpy().astype(np.int64)
        inner = one.entry.stored.numel() // one.entry.stored.shape[0]
        quantized = one.layer >= 0
        widths = np.array(_widths(bank.quantizers[one.layer], inner) if quantized else [inner], np.int64)
        blocks, starts = len(widths), np.cumsum(widths) - widths
        places = np.arange(len(rows) * blocks)
        per_row = quantized and bank.quantizers[one.layer].d.numel() != 1
        index, block = rows[places // blocks], places % blocks
        setting = (first_E[one.layer] + (index * blocks + block if per_row else 0)) if quantized else -1
        offsets, lines = index * inner + starts[block], start + places // blocks * inner + starts[block]
        pairs, families = (flags.cpu().numpy()[places // blocks] for flags in (one.pairs, one.families))
        columns = (owner, offsets, widths[block], lines, pairs, families, setting, one.layer, quantized and signed[one.layer])
        for name, values in zip(_ARRAYS, columns, strict=True):
            kind = np.uint8 if name == "is_signed" else np.int64
            found[name].append(np.broadcast_to(np.asarray(values, kind), index.shape))
        start += len(rows) * inner
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _widths(quantizer: Quantizer, columns: int) -> list[int]:
    """How many elements of a row share a step size, block by block."""
    return widths_of(quantizer.blocks, columns) if quantizer.blocks else [columns]
