"""Labels: which unit an element of a tensor belongs to.

A *label* is an integer id of one index of one parameter (or buffer) dimension. A *track* is an int64 tensor of the
labelled tensor's own shape: entry = `2 * label + zero`, where the bit `zero` says that this element is zero once its
unit's parameters are zero. Dimensions along which a track does not vary are stored with stride 0. A tensor has one track
for each independent way in which its elements belong to units: a weight [O, I] has one for its rows and one for its columns.
Label 0 means "belongs to no unit and must stay".
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

FIXED = 0


@dataclass(frozen=True)
class Owner:
    """A run of labels: dimension `dim` of tensor `tensor` (or of the tensor that graph node `node` creates)."""

    tensor: str
    node: str
    dim: int
    start: int
    size: int


class LabelSpace:
    """Hands out labels and remembers who owns them."""

    def __init__(self) -> None:
        self.owners: list[Owner] = []
        self.size = 1

    def new(self, size: int, dim: int, *, tensor: str = "", node: str = "") -> tuple[torch.Tensor, int]:
        """`size` fresh labels and the number of their owner."""
        start = self.size
        self.owners.append(Owner(tensor, node, dim, start, size))
        self.size += size
        return torch.arange(start, start + size, device="cpu"), len(self.owners) - 1

    def of_tensor(self, code: torch.Tensor) -> bool:
        """Whether a track's labels come from a parameter or buffer, judged by its first entry."""
        label = int(code[(0,) * code.dim()]) >> 1
        place = bisect.bisect_right(self.owners, label, key=lambda owner: owner.start) - 1
        return label != FIXED and bool(self.owners[place].tensor)


@dataclass(frozen=True)
class Track:
    """`code` = 2 * label + zero, with the tensor's shape; `origins` = owners it comes from while it depends on no input."""

    code: torch.Tensor
    origins: frozenset[int] = frozenset()

    @functools.cached_property
    def dims(self) -> tuple[int, ...]:
        return varying(self.code)

    @functools.cached_property
    def labels(self) -> torch.Tensor:
        """Nobody writes into them: rules that pass a track on share it, and so does what is worked out per tensor."""
        return (squeezed(self.code) >> 1).expand(self.code.shape)


@dataclass(frozen=True)
class Value:
    """What propagation knows of one tensor.

    derived: computed from parameters, buffers and constants alone, so that a consumer can ask for zeros in its origins.
    """

    shape: tuple[int, ...]
    tracks: tuple[Track, ...] = ()
    derived: bool = field(default=False)

    @property
    def rank(self) -> int:
        return len(self.shape)


def varying(code: torch.Tensor) -> tuple[int, ...]:
    """Dimensions along which a compressed track varies."""
    return tuple(dim for dim, (size, stride) in enumerate(zip(code.shape, code.stride(), strict=True)) if size > 1 and stride != 0)


def compress(code: torch.Tensor) -> torch.Tensor:
    """The same track with stride 0 along every dimension where it does not vary."""
    whole = small = squeezed(code).numpy()
    for dim in range(small.ndim if small.size else 0):
        if small.shape[dim] > 1 and not _varies(small, dim):
            small = small[(slice(None),) * dim + (slice(0, 1),)]
    return code if small is whole else torch.from_numpy(small).expand(code.shape)


def _varies(array: np.ndarray, dim: int) -> bool:
    """Whether any line along `dim` holds two values; the ends of the first line, or all of it, usually tell."""
    before, behind = (0,) * dim, (0,) * (array.ndim - dim - 1)
    if array.item(0) != array.item(*before, -1, *behind):
        return True
    line: tuple[int | slice, ...] = (*before, slice(None), *behind)
    corner = array[line]
    if (corner != corner[0]).any():
        return True
    return bool((array != array[(slice(None),) * dim + (slice(0, 1),)]).any())


def squeezed(code: torch.Tensor) -> torch.Tensor:
    """A compressed track with size 1 instead of stride 0: the smallest tensor that holds it."""
    strides = code.stride()
    if 0 not in strides:
        return code
    sizes = [1 if stride == 0 and size > 1 else size for size, stride in zip(code.shape, strides, strict=True)]
    return code.as_strided(sizes, strides, code.storage_offset())


def never_zero(code: torch.Tensor) -> torch.Tensor:
    """The same labels with the zero bit cleared; stride 0 stays stride 0."""
    return squeezed(code).bitwise_and(-2).expand(code.shape)


def along(code: torch.Tensor, shape: Sequence[int], dim: int) -> torch.Tensor:
    """A one-dimensional code laid along `dim` of `shape`."""
    view = [1] * len(shape)
    view[dim] = shape[dim]
    return code.reshape(view).expand(tuple(shape))


def make_value(shape: Sequence[int], tracks: Sequence[Track], derived: bool) -> Value:
    """A value whose tracks are compressed; tracks that vary nowhere say nothing and are dropped, twins are merged."""
    kept: list[Track] = []
    for track in tracks:
        code = compress(track.code)
        if not varying(code):
            continue
        origins = track.origins if derived else frozenset[int]()
        for place, other in enumerate(kept):
            if varying(other.code) == varying(code) and torch.equal(squeezed(other.code) >> 1, squeezed(code) >> 1):
                kept[place] = Track(other.code & code, other.origins | origins)
                break
        else:
            kept.append(Track(code, origins))
    return Value(tuple(shape), tuple(kept), derived)
