"""Views of tensors with one symbolic size: see `geta.graph.shortcuts`.

A view of a tensor is other sizes, strides and an offset on the same memory; these are computed here with plain integers, the symbolic size
being passed on. Whatever would need a comparison or a division of symbolic sizes is declined, which is `None`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor

_aten = torch.ops.aten

Size = Any
Layout = tuple[Sequence[Size], Sequence[Size], Size]
"""Sizes, strides, offset."""


def plain(size: Size) -> bool:
    return type(size) is int


def same(one: Size, two: Size) -> bool:
    """Whether two sizes are surely equal; False also where that would have to be found out."""
    if plain(one) and plain(two):
        return bool(one == two)
    if not isinstance(one, SymInt) or not isinstance(two, SymInt):
        return False
    return one is two or bool(one.node.expr == two.node.expr)


def all_same(one: Sequence[Size], two: Sequence[Size]) -> bool:
    return len(one) == len(two) and all(map(same, one, two))


def contiguous(sizes: Sequence[Size]) -> list[int] | None:
    """Strides of a contiguous tensor; None unless all sizes but the first are plain and above zero."""
    if not all(plain(size) and size > 0 for size in sizes[1:]):
        return None
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * sizes[dim + 1]
    return strides


def is_contiguous(x: Tensor) -> bool:
    """Whether it surely is."""
    expected = contiguous(x.shape)
    return expected is not None and all(plain(stride) for stride in x.stride()) and list(x.stride()) == expected


def axis_of(x: Tensor, dim: int) -> int | None:
    return dim % x.dim() if plain(dim) and -x.dim() <= dim < x.dim() else None


def view(x: Tensor, sizes: Sequence[Size]) -> Layout | None:
    """One size may be symbolic, wherever it stands, before and after."""
    found = list(sizes)
    unknown = [dim for dim, size in enumerate(found) if plain(size) and size == -1]
    if (
        x.dim() == 0
        or not found
        or len(unknown) > 1
        or not _one_symbol(x.shape)
        or not _one_symbol(size for dim, size in enumerate(found) if dim not in unknown)
    ):
        return None
    if unknown:
        missing = _missing(x.shape, [size for dim, size in enumerate(found) if dim != unknown[0]])
        if missing is None or not (plain(missing) or unknown == [0]):
            return None
        found[unknown[0]] = missing
    batch_first = not plain(x.shape[0]) and same(found[0], x.shape[0]) and all(map(plain, x.stride()[1:]))
    if not batch_first and any(map(_is_one, (*x.shape, *found))) and not lies_in_order(x):
        return None  # strides along one element are of no account, and PyTorch's depend on how it got there
    strides = _regrouped(x.shape, x.stride(), found)
    return None if strides is None else (found, strides, x.storage_offset())


def _one_symbol(sizes: Iterable[Size]) -> bool:
    """Whether all sizes are above zero and at most one of them is symbolic."""
    symbolic = 0
    for size in sizes:
        if not plain(size):
            symbolic += 1
        elif size <= 0:
            return False
    return symbolic <= 1


def _missing(shape: Sequence[Size], others: Sequence[Size]) -> Size | None:
    """The size that together with the others makes as many elements as `shape` has; None where that isn't a whole number for sure."""
    symbolic = [next((size for size in sizes if not plain(size)), None) for sizes in (shape, others)]
    total, known = (math.prod(size for size in sizes if plain(size)) for sizes in (shape, others))
    if symbolic[1] is not None:
        return total // known if symbolic[0] is not None and same(*symbolic) and total % known == 0 else None
    if total % known:
        return None
    return total // known if symbolic[0] is None else _times(symbolic[0], total // known)


def lies_in_order(x: Tensor) -> bool:
    """Whether it surely is contiguous, wherever the symbolic size stands."""
    expected: Size = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if not same(stride, expected):
            return False
        expected = _times(expected, size)
    return True


def _times(one: Size, two: Size) -> Size:
    if plain(one) and one == 1:
        return two
    return one if plain(two) and two == 1 else one * two


def _regrouped(sizes: Sequence[Size], strides: Sequence[Size], wanted: Sequence[Size]) -> list[Size] | None:
    """Strides of a view with the sizes `wanted`; None where neighbouring dimensions that don't lie together would have to be joined."""
    found: list[Size] = []
    place = len(wanted) - 1
    end = len(sizes) - 1
    while end >= 0:
        first, count = end, sizes[end]
        while first > 0 and (_is_one(sizes[first - 1]) or same(strides[first - 1], _times(strides[end], count))):
            first -= 1
            count = _times(sizes[first], count)
        step, taken = strides[end], 1
        while place >= 0 and (not same(taken, count) or _is_one(wanted[place])):
            if plain(taken) and plain(count) and taken > count:
                return None
            found.append(_times(step, taken))
            taken = _times(wanted[place], taken)
            place -= 1
        if not same(taken, count):
            return None
        end = first - 1
    return found[::-1] if place < 0 else None


def _is_one(size: Size) -> bool:
    return plain(size) and bool(size == 1)


def permute(x: Tensor, dims: Sequence[int]) -> Layout | None:
    axes = [axis_of(x, dim) for dim in dims]
    if None in axes or sorted(axes) != list(range(x.dim())):  # type: ignore[type-var]
        return None
    shape, strides = x.shape, x.stride()
    return [shape[axis] for axis in axes if axis is not None], [strides[axis] for axis in axes if axis is not None], x.storage_offset()


def transpose(x: Tensor, one: int, two: int) -> Layout | None:
    first, second = axis_of(x, one), axis_of(x, two)
    if first is None or second is None:
        return None
    order = list(range(x.dim()))
    order[first], order[second] = second, first
    return permute(x, order)


def matrix_transpose(x: Tensor) -> Layout | None:
    return permute(x, (1, 0)) if x.dim() == 2 else None


def expand(x: Tensor, sizes: Sequence[Size], *, implicit: bool = False) -> Layout | None:
    new = len(sizes) - x.dim()
    if new < 0 or implicit:
        return None
    shape, strides = x.shape, x.stride()
    found: list[Size] = []
    steps: list[Size] = []
    if any(plain(size) and size < 0 for size in sizes[:new]):
        return None
    for size, wanted, stride in zip(shape, sizes[new:], strides, strict=True):
        if (plain(wanted) and wanted == -1) or same(size, wanted):
            found.append(size)
            steps.append(stride)
        elif plain(size) and size == 1 and not (plain(wanted) and wanted < 0):
            found.append(wanted)
            steps.append(0)
        else:
            return None
    outer = shape[0] * strides[0] if x.dim() else 1
    steps = [outer if plain(size) and size == 1 else 0 for size in sizes[:new]] + steps
    return [*sizes[:new], *found], steps, x.storage_offset()


def unsqueeze(x: Tensor, dim: int) -> Layout | None:
    if not plain(dim) or not -x.dim() - 1 <= dim <= x.dim():
        return None
    axis = dim % (x.dim() + 1)
    shape, strides = list(x.shape), list(x.stride())
    stride = shape[axis] * strides[axis] if axis < x.dim() else 1
    return [*shape[:axis], 1, *shape[axis:]], [*strides[:axis], stride, *strides[axis:]], x.storage_offset()


def select(x: Tensor, dim: int, index: Size) -> Layout | None:
    axis = axis_of(x, dim)
    if axis is None or not plain(index) or not plain(x.shape[axis]) or not -x.shape[axis] <= index < x.shape[axis]:
        return None
    shape, strides = list(x.shape), list(x.stride())
    offset = x.storage_offset() + (index % shape[axis]) * strides[axis] if index % shape[axis] else x.storage_offset()
    del shape[axis], strides[axis]
    return shape, strides, offset


def cut(x: Tensor, dim: int = 0, start: Size = None, end: Size = None, step: Size = 1) -> Layout | None:
    """aten::slice."""
    axis = axis_of(x, dim)
    if axis is None or not plain(step) or step < 1 or not all(bound is None or plain(bound) for bound in (start, end)):
        return None
    size = x.shape[axis]
    shape, strides, offset = list(x.shape), list(x.stride()), x.storage_offset()
    if not plain(size):
        whole = start in (None, 0) and (end is None or end == sys.maxsize) and step == 1
        return (shape, strides, offset) if whole else None
    first, last, _ = slice(start, end).indices(size)
    shape[axis] = max(0, -(-(last - first) // step))
    if first:
        offset = offset + first * strides[axis]
    if step != 1:
        strides[axis] = strides[axis] * step
    return shape, strides, offset


def unbind(x: Tensor, dim: int = 0) -> list[Layout] | None:
    axis = axis_of(x, dim)
    return None if axis is None or not plain(x.shape[axis]) else _all([select(x, axis, index) for index in range(x.shape[axis])])


def split_with_sizes(x: Tensor, sizes: Sequence[Size], dim: int = 0) -> list[Layout] | None:
    axis = axis_of(x, dim)
    if axis is None or not plain(x.shape[axis]) or not all(plain(size) and size > 0 for size in sizes) or sum(sizes) != x.shape[axis]:
        return None
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return _all([cut(x, axis, start, start + size) for start, size in zip(starts, sizes, strict=True)])


def split(x: Tensor, size: Size, dim: int = 0) -> list[Layout] | None:
    axis = axis_of(x, dim)
    if axis is None or not plain(size) or size < 1 or not plain(x.shape[axis]) or x.shape[axis] == 0:
        return None
    whole = x.shape[axis]
    return split_with_sizes(x, [min(size, whole - start) for start in range(0, whole, size)], axis)


def _all(layouts: list[Layout | None]) -> list[Layout] | None:
    found = [layout for layout in layouts if layout is not None]
    return found if len(found) == len(layouts) else None


VIEWS: dict[Any, Callable[..., Layout | list[Layout] | None]] = {
    _aten.view.default: view,
    _aten._unsafe_view.default: view,
    _aten.permute.default: permute,
    _aten.transpose.int: transpose,
    _aten.t.default: matrix_transpose,
    _aten.expand.default: expand,
    _aten.unsqueeze.default: unsqueeze,
    _aten.select.int: select,
    _aten.slice.Tensor: cut,
    _aten.unbind.int: unbind,
    _aten.split_with_sizes.default: split_with_sizes,
    _aten.split.Tensor: split,
}
"""Operators -> the layout, or layouts, of the result on the first argument's memory."""
