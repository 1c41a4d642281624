"""The prunable groups of a graph compiled into flat index maps, so that no step ever loops over groups.

A *row* is one index along one zeroed dimension of one tensor: row (conv1.weight, dim 0, 5) is the sixth filter. Each row
belongs to at most one group. Per tensor everything is reduced to its rows; then one `index_add_` over all rows of all tensors
gives one number per group (`reduce_rows`, `GroupIndex.per_group`).

Consumer members with `zero=False` are only cut away: they are not part of x_g and don't appear here.

Where parameters are sharded over ranks (`geta.optim.shards`), rows and masks are those of the part that is here, and sums per group
and per pair are added up over the ranks: a collective operation.

Legend: `G` groups, `F` families, `R` rows of all parameters, `N` pairs (parameter, family).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from geta import ranks
from geta.errors import BadModelError
from geta.graph.families import Family, Member, layer_sets, layer_units
from geta.graph.names import find_tensor, unwrap
from geta.optim.shards import Part, common_group, is_first, local, part_of, reshard

_NO_PAIR = int(np.iinfo(np.int64).max)


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

    name:    canonical name. `stored`: the tensor, as the model has it. `dims`: its zeroed dimensions, ascending; one stands there twice
             where rows belong to a whole residual branch as well, which has a place of its own behind theirs.
    groups:  per entry of `dims` an int64 tensor [size of that dimension here] of global group ids; G where no group owns the row.
    part:    which part of it is on this rank, None = all.
    counted: whether its elements count on this rank; False for what other ranks of a sharded model hold as well.
    """

    name: str
    stored: Tensor
    dims: tuple[int, ...]
    groups: tuple[Tensor, ...]
    part: Part | None = None
    counted: bool = True

    @property
    def tensor(self) -> Tensor:
        """What of it is on this rank, sharing its memory."""
        return local(self.stored)

    @property
    def trained(self) -> bool:
        """False for buffers; they are zeroed with their group but are not part of x_g."""
        return isinstance(self.stored, nn.Parameter)

    def part_of(self, tensor: Tensor) -> Tensor:
        """What of a tensor that broadcasts against the whole stored one goes with the part that is here."""
        if self.part is None or tensor.dim() != self.stored.dim():
            return tensor
        return self.part.of(tensor)

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
    uniform: whole residual branches that are part of no block are left out, and those of a block go together.

    Whole residual branches come last. layers: sets of them, by place of the family, each of which keeps at least one.
    units: what goes together of them, in sets of which at least one stays (`geta.graph.families.layer_units`).
    compared_G: family of each group for comparisons within a family, where the branches of a set are one.

    Raises BadModelError when the graph doesn't fit its model (tensor missing, index outside, a row in two groups).
    """

    def __init__(self, graph: Graph, *, skip: Collection[int] = (), uniform: bool = False) -> None:
        self.notes: list[str] = []
        usable = [family for family in self._usable(graph, skip) if family.block or not (uniform and family.is_layer)]
        self.families = sorted(usable, key=lambda family: family.is_layer)
        self.sizes = [family.size for family in self.families]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)]).astype(np.int64)
        self.num_groups = int(self.starts[-1])
        reshard(unwrap(graph.model))
        tensors = self._compile(graph.model, skip)
        self.shards = common_group(entry.part for entry, _ in tensors)
        if self.shards is not None and not is_first(self.shards):
            tensors = [(replace(entry, counted=entry.part is not None), whole) for entry, whole in tensors]
        trained = [(entry, whole) for entry, whole in tensors if entry.trained]
        self.parameters = [entry for entry, _ in trained]
        self.buffers = [entry for entry, _ in tensors if not entry.trained]
        self.device = _beside(self.parameters[0].tensor) if self.parameters else torch.device("cpu")
        self.dtype = _accumulator(entry.tensor for entry in self.parameters)
        self._compile_rows([whole for _, whole in trained])
        place = {family.name: number for number, family in enumerate(self.families)}
        self.layers = [[place[family.name] for family in together] for together in layer_sets(self.families)]
        sets = layer_units(self.families, uniform=uniform)
        self.units = [[sorted(place[family.name] for family in unit) for unit in together] for together in sets]
        self.compared_G: Tensor = self.family_of_G
        self._parts_G: Tensor | None = None
        if self.layers:
            self._compile_layers()

    def average(self, sums_G: Tensor) -> Tensor:
        """Sums over the elements of each group [G], of whole residual branches divided by the number of rows that make them."""
        return sums_G if self._parts_G is None else sums_G / self._parts_G

    def rows_of(self, family: int) -> int:
        """How many rows make a group of the family that other layers have as groups of their own: of a residual branch all, else one."""
        found = self.families[family]
        return max(member.index.shape[1] for member in found.zeroed) if found.is_layer else 1

    def per_group(self, rows_R: Tensor) -> Tensor:
        """Sum over the rows of each group: [R] -> [G]."""
        out = rows_R.new_zeros(self.num_groups + 1)
        out.index_add_(0, self.row_group_R, rows_R if self._counted_R is None else rows_R * self._counted_R)
        return self.over_shards(out[: self.num_groups])

    def per_pair(self, rows: Tensor, pairs: Tensor) -> Tensor:
        """Sum of `rows` [C, r] over the rows of each pair [C, N]; `pairs` [r] are the pairs that these rows belong to."""
        out = rows.new_zeros(rows.shape[0], self.num_pairs + 1)
        return self.over_shards(out.index_add_(1, pairs, rows)[:, : self.num_pairs])

    def over_shards(self, partial: Tensor) -> Tensor:
        """Sums of what is on this rank as sums over all parts; themselves where nothing is sharded."""
        return partial if self.shards is None else ranks.total(partial, self.shards)

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
        """Which groups are exactly zero in every zeroed parameter and buffer now (bool [G]), looking at all parts of sharded ones."""
        live = torch.zeros(self.num_groups + 1, dtype=torch.bool, device=self.device)
        for entry in [*self.parameters, *self.buffers]:
            nonzero = entry.tensor.detach() != 0
            for dim, groups in zip(entry.dims, entry.groups, strict=True):
                rows = nonzero.movedim(dim, 0).flatten(1).any(dim=1) if nonzero.dim() > 1 else nonzero
                live[groups[rows].to(self.device)] = True
        return self.over_shards(live[: self.num_groups].to(torch.int32)) == 0

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

    def _compile(self, model: nn.Module, skip: Collection[int]) -> list[tuple[GroupedTensor, list[np.ndarray]]]:
        """Every tensor with zeroed dimensions, and the groups of all rows of each, also of those on other ranks."""
        maps: dict[int, tuple[str, Tensor, dict[tuple[int, bool], np.ndarray]]] = {}
        for family, start in zip(self.families, self.starts, strict=False):
            for member in family.zeroed:
                tensor = find_tensor(model, member.param)
                if id(tensor) not in skip:
                    _, _, places = maps.setdefault(id(tensor), (member.param, tensor, {}))
                    size = tensor.shape[member.dim] if member.dim < tensor.dim() else 0
                    rows = places.setdefault((member.dim, family.is_layer), np.full(size, self.num_groups, dtype=np.int64))
                    self._claim(rows, member, tensor, int(start))
        found = []
        for name, tensor, places in maps.values():
            part, order = part_of(name, tensor), sorted(places)
            whole = [places[key] for key in order]
            here = [
                rows if part is None or part.dim != dim else rows[part.start : part.start + part.size]
                for (dim, _), rows in zip(order, whole, strict=True)
            ]
            groups = tuple(torch.from_numpy(rows).to(_beside(tensor)) for rows in here)
            found.append((GroupedTensor(name, tensor, tuple(dim for dim, _ in order), groups, part), whole))
        return found

    def _claim(self, row_group: np.ndarray, member: Member, tensor: Tensor, start: int) -> None:
        """Write the group ids of one member's rows; the same tensor may come under several (tied) names."""
        index, size = member.index.cpu().numpy(), len(row_group)
        if index.size and (index.min() < 0 or index.max() >= size):
            raise BadModelError(
                f"'{member.param}' has shape {tuple(tensor.shape)}, but the graph speaks of index {int(index.max())} along its "
                f"dimension {member.dim}: the graph was made from another model, make it again from this one"
            )
        groups = np.broadcast_to(start + np.arange(index.shape[0])[:, None], index.shape)
        taken = row_group[index]
        if ((taken != self.num_groups) & (taken != groups)).any():
            raise BadModelError(f"an index of dimension {member.dim} of '{member.param}' belongs to two groups: the graph is inconsistent")
        row_group[index] = groups

    def _compile_layers(self) -> None:
        kind = np.arange(len(self.families))
        for together in self.layers:
            kind[together] = together[0]
        rows = np.array([self.rows_of(family) for family in range(len(self.families))], np.int64)
        self.compared_G = torch.from_numpy(np.repeat(kind, self.sizes).astype(np.int64)).to(self.device)
        self._parts_G = torch.from_numpy(np.repeat(rows, self.sizes)).to(self.device)

    def _compile_rows(self, whole: Sequence[Sequence[np.ndarray]]) -> None:
        """Number the pairs from all rows (`whole`, parallel to `parameters`), so that every rank has the same; then map those here."""
        family_of_G = np.append(np.repeat(np.arange(len(self.families)), self.sizes), -1)
        families = max(len(self.families), 1)

        def codes(owner: int, groups: np.ndarray) -> np.ndarray:
            family = family_of_G[groups]
            return np.where(family >= 0, owner * families + family, _NO_PAIR)

        every = [codes(owner, groups) for owner, parts in enumerate(whole) for groups in parts]
        pairs = np.unique(np.concatenate([np.zeros(0, np.int64), *every]).astype(np.int64))
        pairs = pairs[pairs != _NO_PAIR]
        self.num_pairs = len(pairs)
        self.pair_parameter = pairs // families
        self.pair_family_N = torch.from_numpy(pairs % families).to(self.device)
        self.family_of_G = torch.from_numpy(family_of_G[:-1].copy()).to(self.device)
        here = [[groups.cpu().numpy() for groups in entry.groups] for entry in self.parameters]
        self.row_pairs = [
            [torch.from_numpy(np.searchsorted(pairs, codes(owner, groups))).to(self.device) for groups in parts]
            for owner, parts in enumerate(here)
        ]
        rows = [groups for parts in here for groups in parts]
        self.row_group_R = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64)).to(self.device)
        self._counted_R: Tensor | None = None
        if not all(entry.counted for entry in self.parameters):
            counted = [np.full(len(groups), entry.counted) for entry, parts in zip(self.parameters, here, strict=True) for groups in parts]
            self._counted_R = torch.from_numpy(np.concatenate(counted)).to(self.device)


def row_sums(entry: GroupedTensor, values: Tensor) -> list[Tensor]:
    """Per zeroed dimension of `entry`: the sum of `values` (of the tensor's shape) over all other dimensions."""
    return [values.sum(dim=[d for d in range(values.dim()) if d != dim]) if values.dim() > 1 else values for dim in entry.dims]


def exclusive_row_sums(entry: GroupedTensor, values: Tensor, flags: Sequence[Tensor]) -> list[Tensor]:
    """Per zeroed dimension the sums over flagged rows [C, rows], every element counted once: in the first dimension that flags it.

    values: [C, *shape], several quantities of the same tensor stacked.
    """
    others = [d + 1 for d in range(values.dim() - 1) if d not in entry.dims]
    rest = values.sum(dim=others) if others else values
    distinct = sorted(set(entry.dims))
    sums = []
    for number, (dim, flag) in enumerate(zip(entry.dims, flags, strict=True), start=1):
        position = distinct.index(dim) + 1
        along = [d for d in range(1, rest.dim()) if d != position]
        total = rest.sum(dim=along) if along else rest
        sums.append(total * flag)
        if number < len(flags):
            shape = [1] * rest.dim()
            shape[position] = -1
            rest = rest * (~flag).view(shape)
    return sums


def _beside(tensor: Tensor) -> torch.device:
    """Where index maps of a tensor lie; those of a model without weights, which is only planned for, need numbers all the same."""
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _accumulator(tensors: Iterable[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
