"""How many entries of a tensor's dimension go with each group, read off the labels of an analysis."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from geta.errors import BadModelError
from geta.graph.dependency import Analysis, DependencyGraph
from geta.graph.labels import Value, compress, squeezed, varying
from geta.graph.solver import canonical

Slopes = tuple[tuple[int, int], ...]
"""(family, entries that go with each of its groups) for every family that a size depends on."""


class Shrinkage:
    """Sizes of one capture as functions of how many groups go; families are numbered as in `graph.prunable_families`.

    Raises BadModelError when the capture couples the groups in another way than the graph.
    """

    def __init__(self, graph: DependencyGraph, analysis: Analysis) -> None:
        self.analysis = analysis
        self._starts = np.concatenate([[0], np.cumsum([family.size for family in graph.prunable_families])]).astype(np.int64)
        self._group_of_root = self._groups(graph)

    def slopes(self, node: fx.Node, dim: int) -> tuple[Slopes, bool]:
        """What dimension `dim` of a node loses, and whether that is exact; if not, it loses at least that much."""
        value = self.analysis.propagation.values.get(node)
        lines, clear = self._lines(value, dim) if isinstance(value, Value) else ([], True)
        if not lines:
            return (), clear
        owners = lines[0][lines[0] >= 0]
        entries = np.bincount(owners, minlength=int(self._starts[-1]))
        exact, slopes = clear and len(lines) == 1, []
        for family in np.unique(np.searchsorted(self._starts, owners, side="right") - 1).tolist():
            mine = entries[self._starts[family] : self._starts[family + 1]]
            exact = exact and bool(mine.min() == mine.max())
            if mine.min():
                slopes.append((family, int(mine.min())))
        return tuple(slopes), exact

    def _groups(self, graph: DependencyGraph) -> np.ndarray:
        """Class of labels -> number of the group that it belongs to; -1 for what always stays."""
        partition = self.analysis.partition
        starts = {(owner.tensor, owner.dim): owner.start for owner in self.analysis.propagation.space.owners if owner.tensor}
        group_of = np.full(len(partition.root), -1, dtype=np.int64)
        for family, start in zip(graph.prunable_families, self._starts.tolist(), strict=False):
            for member in family.members if not family.is_layer else ():
                first = starts.get((member.param, member.dim))
                if first is None:
                    continue  # this capture doesn't read it
                roots = partition.root[first + member.index.numpy()]
                groups = np.broadcast_to(start + np.arange(family.size)[:, None], roots.shape)
                stuck = next((partition.frozen[root] for root in np.unique(roots).tolist() if root in partition.frozen), None)
                if stuck is not None or ((group_of[roots] != -1) & (group_of[roots] != groups)).any():
                    raise BadModelError(
                        f"family '{family.name}' is coupled differently than when the graph was made{f': it {stuck}' if stuck else ''}; "
                        "analyze the model again as it is now"
                    )
                group_of[roots] = groups
        return group_of

    def _lines(self, value: Value, dim: int) -> tuple[list[np.ndarray], bool]:
        """The group that each entry of a dimension goes with (-1: it stays), and whether that is all there is to say.

        Several lists when an entry goes with any of several groups.
        """
        lines: list[np.ndarray] = []
        clear = True
        for track in value.tracks:
            code = canonical(self.analysis.partition.root, track.labels)
            if not varying(code):
                continue  # it belongs to an axis that was bound, so it says nothing
            groups = compress(torch.from_numpy(self._group_of_root[squeezed(code).numpy()]).expand(code.shape))
            dims = varying(groups)
            if not bool((squeezed(groups) >= 0).any()):
                continue
            if len(dims) != 1:
                clear = False
            elif dims[0] == dim:
                _add(lines, squeezed(groups).reshape(-1).numpy())
        return lines, clear


def _add(lines: list[np.ndarray], line: np.ndarray) -> None:
    """Join a line with one that it doesn't contradict."""
    for place, other in enumerate(lines):
        if ((other < 0) | (line < 0) | (other == line)).all():
            lines[place] = np.maximum(other, line)
            return
    lines.append(line)
