"""Sizes of contiguous results with one symbolic size: see `geta.graph.shortcuts`.

Every function gets the operator's arguments and gives the sizes of a result that is contiguous and of the type and on the device of the
first tensor among them, or None where that isn't sure or where sizes would have to be compared or divided symbolically. The tensors among
the arguments are strided floating-point ones of one type on one device; whoever calls makes sure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geta.graph.shortcut_views import Size, all_same, axis_of, contiguous, is_contiguous, lies_in_order, plain, same

_aten = torch.ops.aten


def matrix_product(a: Tensor, b: Tensor) -> list[Size] | None:
    """mm and bmm."""
    if a.dim() != b.dim() or not same(a.shape[-1], b.shape[-2]) or not all_same(a.shape[:-2], b.shape[:-2]):
        return None
    return [*a.shape[:-1], b.shape[-1]]


def added_matrix_product(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> list[Size] | None:
    """addmm."""
    ordinary = bias.dim() == 1 and plain(beta) and plain(alpha) and a.dim() == 2
    found = matrix_product(a, b) if ordinary else None
    return found if found is not None and same(bias.shape[0], found[-1]) else None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> list[Size] | None:
    """Of one and two spatial dimensions, not transposed."""
    stride, padding, dilation, transposed, _, groups = how
    spatial, steps = x.dim() - 2, (stride, padding, dilation)
    if transposed or spatial not in (1, 2) or weight.dim() != x.dim() or not all(len(values) == spatial for values in steps):
        return None
    numbers = (*x.shape[1:], *weight.shape, *stride, *padding, *dilation)
    if not all(plain(number) and number >= 0 for number in numbers) or not is_contiguous(x) or not is_contiguous(weight):
        return None
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups or not (bias is None or all_same(bias.shape, weight.shape[:1])):
        return None
    found = [
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1 if step > 0 else 0
        for size, kernel, step, pad, spread in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return [x.shape[0], weight.shape[0], *found] if all(size > 0 for size in found) else None


def cat(tensors: Sequence[Tensor], dim: int = 0) -> list[Size] | None:
    axis = axis_of(tensors[0], dim)
    if axis is None or not all(lies_in_order(tensor) and tensor.dim() == tensors[0].dim() for tensor in tensors):
        return None
    shapes = [list(tensor.shape) for tensor in tensors]
    joined = [shape.pop(axis) for shape in shapes]
    if not all(all_same(shape, shapes[0]) for shape in shapes) or not all(plain(size) and size > 0 for size in joined):
        return None
    return [*shapes[0][:axis], sum(joined), *shapes[0][axis:]]


def reduced(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> list[Size] | None:
    """mean, sum, amax and amin; without dimensions over all."""
    if dtype is not None or not is_contiguous(x) or x.dim() == 0:
        return None
    axes = [axis_of(x, dim) for dim in (dims or range(x.dim()))]
    if None in axes or len(set(axes)) < len(axes):
        return None
    kept = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    return kept if keepdim else [size for axis, size in enumerate(x.shape) if axis not in axes]


def broadcast(x: Tensor, other: Any) -> list[Size] | None:
    """add, sub, mul and div of contiguous tensors; sizes of one in the result leave its strides open."""
    if not isinstance(other, Tensor) or not is_contiguous(x) or not is_contiguous(other):
        return None
    rank = max(x.dim(), other.dim())
    one, two = ([1] * (rank - tensor.dim()) + list(tensor.shape) for tensor in (x, other))
    found: list[Size] = []
    for a, b in zip(one, two, strict=True):
        if same(a, b) or (plain(b) and b == 1):
            found.append(a)
        elif plain(a) and a == 1:
            found.append(b)
        else:
            return None
    return None if 1 in found[1:] or contiguous(found) is None else found


def norm(x: Tensor, _: Any = 2, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> list[Size] | None:
    """linalg_vector_norm, of any order."""
    return reduced(x, dims, keepdim, dtype=dtype)


SIZES: dict[Any, Callable[..., list[Size] | None]] = {
    _aten.mm.default: matrix_product,
    _aten.bmm.default: matrix_product,
    _aten.addmm.default: added_matrix_product,
    _aten.convolution.default: convolution,
    _aten.cat.default: cat,
    _aten.mean.dim: reduced,
    _aten.sum.dim_IntList: reduced,
    _aten.amax.default: reduced,
    _aten.amin.default: reduced,
    _aten.linalg_vector_norm.default: norm,
}

BINARY = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)
SCALAR = (_aten.add.Scalar, _aten.sub.Scalar, _aten.mul.Scalar, _aten.div.Scalar)


def leads(x: Tensor, other: Any) -> bool:
    """Whether `x` alone decides how the result of an operation on it and `other` (a number, or a tensor) is laid out.

    It does where both are laid out in the same way, and where it has all of the result's sizes and its strides put its dimensions in order.
    """
    if not isinstance(other, Tensor):
        return type(other) in (int, float)
    if all_same(x.shape, other.shape) and all_same(x.stride(), other.stride()):
        return True
    strides, lacking = x.stride(), x.dim() - other.dim()
    ordered = all(plain(stride) and stride > 0 for stride in strides) and len(set(strides)) == len(strides)
    return (
        ordered and lacking >= 0 and all(same(a, b) or (plain(b) and b == 1) for a, b in zip(x.shape[lacking:], other.shape, strict=True))
    )
