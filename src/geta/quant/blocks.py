"""Scales per block of columns: which columns of a matrix share the numbers of its quantizer.

A matrix [O, I] whose rows are cut into blocks has parameters [O, B], one number per row and block. `blocks` says how long the blocks are:

    ()                  there are none; the parameters broadcast against the matrix
    (g,)                g columns each, the last block may be shorter: B = ceil(I / g)
    (w_1, .., w_B)      as long as they are, for blocks that lost some of their columns; sum w_b = I

So the index column -> block, which a removal of columns would need, is kept in run lengths and only where blocks became uneven. The same
holds with the two dimensions exchanged (`transformers`' Conv1D stores [I, O] with parameters [B, O]): blocks run along the dimension in
which the shapes differ.

Quantizers work on matrices with one block per row, [R, W] with R = O B; blocks shorter than the longest are filled up with zeros, which
change no value and no gradient.

Legend: `O` rows, `I` columns, `B` blocks of a row, `R` blocks in all, `W` columns of the longest block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from geta.errors import ConfigError

SHORTEST = 8
Blocks = tuple[int, ...]


def blocks_of(size: int, group_size: int) -> Blocks:
    """Blocks of `group_size` out of `size` columns; none where one block holds them all."""
    return (group_size,) if group_size < size else ()


def widths_of(blocks: Sequence[int], size: int) -> list[int]:
    """The length of every block of `size` columns."""
    if len(blocks) != 1:
        return list(blocks) if blocks else [size]
    whole, rest = divmod(size, blocks[0])
    return [blocks[0]] * whole + [rest] * (rest > 0)


def shortest_form(widths: Sequence[int]) -> Blocks:
    """Blocks of these lengths, none of them zero, in as few numbers as possible."""
    if len(widths) == 1:
        return ()
    even = all(width == widths[0] for width in widths[:-1]) and widths[-1] <= widths[0]
    return (widths[0],) if even else tuple(widths)


def block_of_column(blocks: Sequence[int], size: int) -> np.ndarray:
    """The block that each column belongs to [I]."""
    widths = widths_of(blocks, size)
    found: np.ndarray = np.repeat(np.arange(len(widths)), widths)
    return found


def check_group_size(group_size: object) -> int:
    """A number of columns. Raises ConfigError."""
    if type(group_size) is not int or group_size < SHORTEST:
        raise ConfigError(
            f"group_size: {group_size!r} is impossible; it is how many columns of a weight share one scale, a whole number of at least "
            f"{SHORTEST}: use 32, 64 or 128"
        )
    return group_size


class Cutting(NamedTuple):
    """A matrix of `shape` whose dimension `axis` (the last or the first of two) is cut into blocks of `widths`."""

    shape: tuple[int, int]
    axis: int
    widths: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], parameter: Sequence[int], blocks: Sequence[int]) -> Cutting:
        """Find the axis from the shapes of the matrix and of a parameter. Raises RuntimeError where none fits."""
        for axis in (1, 0) if len(shape) == len(parameter) == 2 else ():
            widths = widths_of(blocks, shape[axis])
            if parameter[1 - axis] == shape[1 - axis] and parameter[axis] == len(widths) and sum(widths) == shape[axis]:
                return cls((shape[0], shape[1]), axis, tuple(widths))
        raise RuntimeError(
            f"geta: parameters of shape {list(parameter)} don't fit a tensor of shape {list(shape)} in blocks {list(blocks)}: there has to "
            "be one number for each block of each row"
        )

    @property
    def longest(self) -> int:
        return max(self.widths)

    @property
    def is_plain(self) -> bool:
        """Whether all blocks are equally long."""
        return len(set(self.widths)) == 1

    def rows(self, x: Tensor) -> Tensor:
        """One block per row [R, W], zeros behind the shorter ones; a view of x where it can be one."""
        turned = x if self.axis == 1 else x.t()
        if self.is_plain:
            return turned.reshape(-1, self.longest)
        padded = turned.new_zeros(turned.shape[0], len(self.widths) * self.longest)
        return padded.index_copy(1, self._places(x.device), turned).view(-1, self.longest)

    def back(self, rows: Tensor) -> Tensor:
        """The matrix of such rows."""
        turned = rows.reshape(self.shape[1 - self.axis], -1)
        if not self.is_plain:
            turned = turned.index_select(1, self._places(rows.device))
        return turned if self.axis == 1 else turned.t()

    def line(self, parameter: Tensor) -> Tensor:
        """A parameter as one number per row of `rows` [R, 1]."""
        return (parameter if self.axis == 1 else parameter.t()).reshape(-1, 1)

    def table(self, line: Tensor) -> Tensor:
        """The parameter of such a line."""
        turned = line.reshape(self.shape[1 - self.axis], -1)
        return turned if self.axis == 1 else turned.t()

    def expand(self, parameter: Tensor) -> Tensor:
        """One number per element, of the matrix's shape."""
        columns = torch.from_numpy(block_of_column(self.widths, self.shape[self.axis])) if len(self.widths) > 1 else None
        if columns is None:
            return parameter.expand(self.shape)
        return parameter.index_select(self.axis, columns.to(parameter.device))

    def counts(self, like: Tensor) -> Tensor:
        """How many columns each row of `rows` has [R, 1]."""
        widths = torch.tensor(self.widths, dtype=like.dtype, device=like.device)
        return widths.repeat(self.shape[1 - self.axis]).reshape(-1, 1)

    def _places(self, device: torch.device) -> Tensor:
        return torch.from_numpy(_places(self.widths)).to(device)


@lru_cache(maxsize=256)
def _places(widths: tuple[int, ...]) -> np.ndarray:
    """Where each column lies in a row of blocks that are filled up to the longest."""
    starts = np.arange(len(widths)) * max(widths)
    within = np.concatenate([np.arange(width) for width in widths])
    places: np.ndarray = np.repeat(starts, widths) + within
    return places


def expanded(parameter: Tensor, shape: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """A parameter that broadcasts against a tensor of `shape`, whatever its blocks."""
    return Cutting.of(shape, parameter.shape, blocks).expand(parameter) if blocks else parameter
