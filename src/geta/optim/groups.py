"""The prunable groups of a graph compiled into flat index maps, so that no step ever loops over groups.

A *row* is one index along one zeroed dimension of one tensor: row (conv1.weight, dim 0, 5) is the sixth filter. Each row
belongs to at most one group. Per tensor everything is reduced to its rows; then one `index_add_` over all rows of all tensors
gives one number per group (`reduce_rows`, `GroupIndex.per_group`).

Consumer members with `zero=False` are only cut away: they are not part of x_g and don't appear here.

Legend: `G` groups, `F` families, `R` rows of all parameters, `N` pairs (parameter, family).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from geta.errors import BadModelError
from geta.graph.families import Family, Member
from geta.graph.names import find_tensor


class Graph(Protocol):
    """What the optimizer reads of a dependency graph."""

    @property
    def model(self) -> nn.Module:
        """The analysed model."""
        ...

    @property
    def families(self) -> Sequence[Family]:
        """Everything found, prunable or not."""
        ...


@dataclass(frozen=True)
class GroupedTensor:
    """A tensor and the groups of its rows.

    name:   canonical name. `tensor`: the stored tensor. `dims`: its zeroed dimensions, ascending.
    groups: per entry of `dims` an int64 tensor [size of that dimension] of global group ids; G where no group owns the row.
    """

    name: str
    tensor: Tensor
    dims: tuple[int, ...]
    groups: tuple[Tensor, ...]

    @property
    def trained(self) -> bool:
        """False for buffers; they are zeroed with their group but are not part of x_g."""
        return isinstance(self.tensor, nn.Parameter)

    def along(self, position: int, rows: Tensor) -> Tensor:
        """View `rows`, one value per row of `dims[position]`, so that it broadcasts against the tensor."""
        shape = [1] * self.tensor.dim()
        shape[self.dims[position]] = -1
        return rows.view(shape)

    def row_flags(self, flags_G: Tensor) -> list[Tensor]:
        """Per zeroed dimension: which rows belong to a flagged group (bool [size])."""
        padded = torch.cat([flags_G, flags_G.new_zeros(1)]).to(self.tensor.device)
        return [padded[groups] for groups in self.groups]

    def element_mask(self, flags_G: Tensor) -> Tensor:
        """True where an element belongs to any flagged group; broadcasts against the tensor."""
        mask = torch.zeros([1] * self.tensor.dim(), dtype=torch.bool, device=self.tensor.device)
        for position, flags in enumerate(self.row_flags(flags_G)):
            mask = mask | self.along(position, flags)
        return mask


class GroupIndex:
    """Index maps of all groups of the prunable families of `graph`, in the order of its families.

    graph: anything with `.model` and `.families`.
    skip:  ids of tensors that are never zeroed (quantizer parameters, whose domain excludes zero).

    Raises BadModelError when the graph doesn't fit its model (tensor missing, index outside, a row in two groups).
    """

    def __init__(self, graph: Graph, *, skip: Collection[int] = ()) -> None:
        self.notes: list[str] = []
        self.families = self._usable(graph, skip)
        self.sizes = [family.size for family in self.families]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)]).astype(np.int64)
        self.num_groups = int(self.starts[-1])
        tensors = self._compile(graph.model, skip)
        self.parameters = [entry for entry in tensors if entry.trained]
        self.buffers = [entry for entry in tensors if not entry.trained]
        self.device = self.parameters[0].tensor.device if self.parameters else torch.device("cpu")
        self.dtype = _accumulator(entry.tensor for entry in self.parameters)
        self._compile_rows()

    def per_group(self, rows_R: Tensor) -> Tensor:
        """Sum over the rows of each group: [R] -> [G]."""
        out = rows_R.new_zeros(self.num_groups + 1)
        return out.index_add_(0, self.row_group_R, rows_R)[: self.num_groups]

    def per_pair(self, rows: Tensor, pairs: Tensor) -> Tensor:
        """Sum of `rows` [C, r] over the rows of each pair [C, N]; `pairs` [r] are the pairs that these rows belong to."""
        out = rows.new_zeros(rows.shape[0], self.num_pairs + 1)
        return out.index_add_(1, pairs, rows)[:, : self.num_pairs]

    def reduce_rows(self, per_tensor: Iterable[Sequence[Tensor]]) -> Tensor:
        """Concatenate row vectors (per parameter, per zeroed dimension) into one [R] or [C, R]."""
        parts = [part.to(self.device) for parts in per_tensor for part in parts]
        return torch.cat(parts, dim=-1)

    def flags(self, chosen: np.ndarray) -> Tensor:
        """A host array of G booleans as a tensor beside the parameters."""
        return torch.from_numpy(np.ascontiguousarray(chosen)).to(self.device)

    def selection(self, flags_G: Tensor) -> dict[str, Tensor]:
        """Flags of all groups as {family name: BoolTensor[n]}, on the host."""
        host = flags_G.detach().cpu()
        return {family.name: host[start : start + family.size] for family, start in zip(self.families, self.starts, strict=False)}

    def zero_groups(self) -> Tensor:
        """Which groups are exactly zero in every zeroed parameter and buffer now (bool [G]). Synchronises nothing."""
        live = torch.zeros(self.num_groups + 1, dtype=torch.bool, device=self.device)
        for entry in [*self.parameters, *self.buffers]:
            nonzero = entry.tensor.detach() != 0
            for dim, groups in zip(entry.dims, entry.groups, strict=True):
                rows = nonzero.movedim(dim, 0).flatten(1).any(dim=1) if nonzero.dim() > 1 else nonzero
                live[groups[rows].to(self.device)] = True
        return ~live[: self.num_groups]

    def _usable(self, graph: Graph, skip: Collection[int]) -> list[Family]:
        usable = []
        for family in graph.families:
            if not family.prunable:
                continue
            if any(id(find_tensor(graph.model, member.param)) not in skip for member in family.zeroed):
                usable.append(family)
            else:
                self.notes.append(f"family '{family.name}' is left out: removing its {family.unit} requires no tensor to be zero")
        return usable

    def _compile(self, model: nn.Module, skip: Collection[int]) -> list[GroupedTensor]:
        maps: dict[int, tuple[str, Tensor, dict[int, np.ndarray]]] = {}
        for family, start in zip(self.families, self.starts, strict=False):
            for member in family.zeroed:
                tensor = find_tensor(model, member.param)
                if id(tensor) not in skip:
                    _, _, dims = maps.setdefault(id(tensor), (member.param, tensor, {}))
                    self._claim(dims, member, tensor, int(start))
        return [
            GroupedTensor(name, tensor, tuple(sorted(dims)), tuple(torch.from_numpy(dims[dim]).to(tensor.device) for dim in sorted(dims)))
            for name, tensor, dims in maps.values()
        ]

    def _claim(self, dims: dict[int, np.ndarray], member: Member, tensor: Tensor, start: int) -> None:
        """Write the group ids of one member's rows; the same tensor may come under several (tied) names."""
        index = member.index.cpu().numpy()
        size = tensor.shape[member.dim] if member.dim < tensor.dim() else 0
        if index.size and (index.min() < 0 or index.max() >= size):
            raise BadModelError(
                f"'{member.param}' has shape {tuple(tensor.shape)}, but the graph speaks of index {int(index.max())} along its "
                f"dimension {member.dim}: the graph was made from another model, make it again from this one"
            )
        row_group = dims.setdefault(member.dim, np.full(size, self.num_groups, dtype=np.int64))
        groups = np.broadcast_to(start + np.arange(index.shape[0])[:, None], index.shape)
        taken = row_group[index]
        if ((taken != self.num_groups) & (taken != groups)).any():
            raise BadModelError(f"an index of dimension {member.dim} of '{member.param}' belongs to two groups: the graph is inconsistent")
        row_group[index] = groups

    def _compile_rows(self) -> None:
        family_of_G = np.repeat(np.arange(len(self.families)), self.sizes)
        family_of_G = np.append(family_of_G, -1)
        row_groups = [groups.cpu().numpy() for entry in self.parameters for groups in entry.groups]
        owners = [np.full(groups.shape, i) for i, entry in enumerate(self.parameters) for groups in map(np.asarray, _host(entry))]
        row_group = np.concatenate([np.zeros(0, np.int64), *row_groups]).astype(np.int64)
        owner = np.concatenate([np.zeros(0, np.int64), *owners]).astype(np.int64)
        family = family_of_G[row_group]
        code = np.where(family >= 0, owner * max(len(self.families), 1) + family, np.iinfo(np.int64).max)
        pairs, row_pair = np.unique(code, return_inverse=True)
        pairs = pairs[pairs != np.iinfo(np.int64).max]
        self.num_pairs = len(pairs)
        self.row_group_R = torch.from_numpy(row_group).to(self.device)
        pair_of_row = iter(torch.split(torch.from_numpy(row_pair.astype(np.int64)).to(self.device), [len(groups) for groups in row_groups]))
        self.row_pairs = [[next(pair_of_row) for _ in entry.groups] for entry in self.parameters]
        self.pair_parameter = pairs // max(len(self.families), 1)
        self.pair_family_N = torch.from_numpy(pairs % max(len(self.families), 1)).to(self.device)
        self.family_of_G = torch.from_numpy(family_of_G[:-1].copy()).to(self.device)


def row_sums(entry: GroupedTensor, values: Tensor) -> list[Tensor]:
    """Per zeroed dimension of `entry`: the sum of `values` (of the tensor's shape) over all other dimensions."""
    return [values.sum(dim=[d for d in range(values.dim()) if d != dim]) if values.dim() > 1 else values for dim in entry.dims]


def exclusive_row_sums(entry: GroupedTensor, values: Tensor, flags: Sequence[Tensor]) -> list[Tensor]:
    """Per zeroed dimension the sums over flagged rows [C, rows], every element counted once: in the first dimension that flags it.

    values: [C, *shape], several quantities of the same tensor stacked.
    """
    others = [d + 1 for d in range(values.dim() - 1) if d not in entry.dims]
    rest = values.sum(dim=others) if others else values
    sums = []
    for position, flag in enumerate(flags, start=1):
        along = [d for d in range(1, rest.dim()) if d != position]
        total = rest.sum(dim=along) if along else rest
        sums.append(total * flag)
        if position < len(flags):
            shape = [1] * rest.dim()
            shape[position] = -1
            rest = rest * (~flag).view(shape)
    return sums


def _host(entry: GroupedTensor) -> list[np.ndarray]:
    return [groups.cpu().numpy() for groups in entry.groups]


def _accumulator(tensors: Iterable[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
