"""From constraints between labels to groups: edges, bindings, freezes, and the rectangularity pass.

The order in which constraints arrive does not matter: each is re-read under the present partition until nothing changes.
Legend: a *letter* is an axis of the small index space that the operands of one operator share (einsum's letters).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from geta.graph.labels import FIXED, compress, squeezed, varying


@dataclass(frozen=True)
class Aligned:
    """Operands over common letters: where two span the same letter, they must keep the same indices of it.

    tracks:  (operand number, labels laid out over the letters, size 1 where they don't vary).
    spans:   per operand, the letters that it really has (size > 1, not broadcast).
    bound:   letters that are summed over; a track that varies along one of them and along a letter of `batch` is bound
             along the summed one, because a sum over part of a slice per batch entry would be ragged (heads).
    keep:    what the user wants of a track that varies along a letter of `batch` and along another one: "head" = whole
             batch entries, "head_dim" = the same positions in all of them, "" = whatever leaves most.
    """

    tracks: tuple[tuple[int, torch.Tensor], ...]
    spans: tuple[tuple[int, ...], ...]
    bound: tuple[int, ...]
    batch: tuple[int, ...]
    reason: str
    keep: str = ""


@dataclass(frozen=True)
class Freeze:
    """The dimensions `dims` of a track must stay whole.

    soft: allowed when `exact=False` (it only makes removal inexact).
    only: if given, just these labels stay, provided that the track varies along `dims`.
    """

    labels: torch.Tensor
    dims: tuple[int, ...]
    reason: str
    soft: bool = False
    only: torch.Tensor | None = None


@dataclass
class Constraints:
    """Everything that propagation has learnt, in the order of the graph."""

    aligned: list[Aligned] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    edges: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    fixed: list[tuple[np.ndarray, str]] = field(default_factory=list)
    ragged: list[torch.Tensor] = field(default_factory=list)
    units: list[tuple[np.ndarray, str]] = field(default_factory=list)  # labels and what one group of them is called
    wishes: list[tuple[np.ndarray, str]] = field(default_factory=list)  # as fixed, but any other reason is told first

    def counts(self) -> tuple[int, int, int]:
        """How many freezes, fixed runs and alignments are known by now; tells later which operator brought which."""
        return len(self.freezes), len(self.fixed), len(self.aligned)


@dataclass(frozen=True)
class Partition:
    """root[label] = group id; frozen / inexact: group id -> reason; firm: the frozen ids that `exact=False` would not free.

    swayed: whether a reason that `exact=False` overrides decided how a ragged tensor was bound, so that `firm` is not sure.
    """

    root: np.ndarray
    frozen: dict[int, str]
    inexact: dict[int, str]
    units: dict[int, str]
    firm: frozenset[int] = frozenset()
    swayed: bool = False


class Solver:
    """Finds the finest partition of labels that keeps every tensor of the graph rectangular."""

    def __init__(self, size: int, constraints: Constraints, *, exact: bool) -> None:
        self._constraints = constraints
        self._exact = exact
        self._units = list(constraints.units)
        self._root = np.arange(size, dtype=np.int64)
        self._sources: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._texts: list[str] = [""]
        self._reason = np.zeros(size, dtype=np.int32)  # label -> number of its reason to stay; 0 = none
        self._firm = np.zeros(size, dtype=bool)  # label -> one of its reasons stays under exact=False
        self._swayed = False
        self._yields = np.zeros(size, dtype=bool)  # label -> its reason is a mere wish
        self._stays: tuple[np.ndarray, np.ndarray] | None = None
        self._numbers: dict[tuple[Any, ...], tuple[int, torch.Tensor]] = {}  # by memory: number of the content, and who owns the memory
        self._contents: dict[tuple[Any, ...], int] = {}
        self._canonical: dict[int, torch.Tensor] = {}  # by number of the content, under the present partition
        self._removable: dict[int, tuple[np.ndarray, torch.Tensor]] = {}  # the same without what stays; and the staying it was found for
        self._soft = np.zeros(size, dtype=np.int32)  # the same for reasons that exact=False overrides

    def solve(self) -> Partition:
        for left, right in self._constraints.edges:
            self._join(left, right, "")
        for wished, reason in self._constraints.wishes:
            self._freeze(wished, reason)
            self._yields[wished] = True
        for fixed, reason in self._constraints.fixed:
            self._freeze(fixed, reason)
        self._merge()
        # What the user wants is bound before anything else is joined: a score per head must not be taken for a head's first channel.
        for item in self._constraints.aligned:
            for _, labels in item.tracks if item.keep else ():
                self._obey(item, self._canonical_removable(labels))
        self._merge()
        open_aligned = list(self._constraints.aligned)
        while True:
            while True:
                open_aligned = [item for item in open_aligned if not self._align(item)]
                if not self._merge():
                    break
            self._apply_freezes()
            if not self._straighten() or not self._merge():
                break
        for item in open_aligned:  # still ragged, so all of it stays; then whatever it is aligned with stays too
            for _, labels in item.tracks:
                self._freeze(squeezed(labels), item.reason)
        self._apply_freezes()
        units = {int(root): unit for labels, unit in self._units for root in np.unique(self._root[labels])}
        firm = frozenset(np.unique(self._root[np.flatnonzero(self._firm)]).tolist())
        return Partition(self._root, self._by_root(self._reason), self._by_root(self._soft), units, firm, self._swayed)

    def _by_root(self, reason: np.ndarray) -> dict[int, str]:
        labels = np.flatnonzero(reason)
        labels = labels[np.argsort(self._yields[labels], kind="stable")]
        roots, first = np.unique(self._root[labels], return_index=True)
        return {int(root): self._texts[reason[labels[at]]] for root, at in zip(roots, first, strict=True)}

    def canonical(self, labels: torch.Tensor) -> torch.Tensor:
        """The track under the present partition, compressed."""
        number = self._number(labels)
        known = self._canonical.get(number)
        if known is None:
            known = self._canonical[number] = canonical(self._root, labels)
        return known

    def _number(self, labels: torch.Tensor) -> int:
        """The same for tracks with the same labels: most operators hand theirs on."""
        place = labels.data_ptr(), labels.shape, labels.stride()
        known = self._numbers.get(place)
        if known is None:
            small = squeezed(labels)
            content = labels.shape, small.shape, small.numpy().tobytes()
            known = self._numbers[place] = self._contents.setdefault(content, len(self._contents)), labels  # which keeps its memory
        return known[0]

    def _join(self, left: np.ndarray, right: np.ndarray, reason: str) -> None:
        """One edge per pair; a pair with FIXED freezes its partner instead."""
        differ = left != right
        left, right = left[differ], right[differ]
        loose = (left != FIXED) & (right != FIXED)
        self._sources.append(left[loose])
        self._targets.append(right[loose])
        self._freeze(np.concatenate([right[left == FIXED], left[right == FIXED]]), reason)

    def _freeze(self, labels: np.ndarray | torch.Tensor, reason: str, *, soft: bool = False, firm: bool = True) -> None:
        """Mark labels that must stay; the first reason given to a label is kept."""
        flat = np.asarray(labels).reshape(-1)
        if firm:
            self._firm[flat[flat != FIXED]] = True
        marks = self._soft if soft else self._reason
        flat = flat[(flat != FIXED) & ((marks[flat] == 0) | (self._yields[flat] & (not soft)))]
        if flat.size:
            self._yields[flat] &= soft
            self._texts.append(reason)
            marks[flat] = len(self._texts) - 1
            self._stays = None

    def _merge(self) -> bool:
        """Take the collected edges into the partition; False when they change nothing."""
        if not self._sources:
            return False
        source, target = np.concatenate(self._sources), np.concatenate(self._targets)
        self._sources, self._targets = [], []
        source, target = self._root[source], self._root[target]
        differ = source != target
        if not differ.any():
            return False
        size = len(self._root)
        matrix = coo_matrix((np.ones(int(differ.sum()), dtype=np.int8), (source[differ], target[differ])), shape=(size, size))
        _, component = connected_components(matrix, directed=False)
        first = np.full(int(component.max()) + 1, size, dtype=np.int64)
        np.minimum.at(first, component, np.arange(size))
        self._root = first[component[self._root]]
        self._stays = None
        self._canonical.clear()
        return True

    def _align(self, item: Aligned) -> bool:
        """Join what must keep the same indices; True when every track has settled on at most one letter."""
        views = [(operand, self._canonical_removable(labels)) for operand, labels in item.tracks]
        settled = True
        # A factor that varies along a batch letter alone (attention weights per head) decides for the other factor.
        decided = {dims[0] for _, code in views if len(dims := varying(code)) == 1 and dims[0] in item.batch}
        by_dims: dict[tuple[int, ...], torch.Tensor] = {}
        for _operand, code in views:
            dims = varying(code)
            if len(dims) > 1:
                settled = False
                self._choose(item, code, decided)
            if not dims:
                continue
            if dims in by_dims:
                left, right = torch.broadcast_tensors(squeezed(by_dims[dims]), squeezed(code))
                self._join(left.reshape(-1).numpy(), right.reshape(-1).numpy(), item.reason)
            else:
                by_dims[dims] = code
        if settled:
            self._check_spans(item, views)
        return settled

    def _choose(self, item: Aligned, code: torch.Tensor, decided: set[int]) -> None:
        """Bind a track that varies along several letters, where the operator or the user says along which."""
        if self._obey(item, code):
            return
        dims = varying(code)
        for letter in item.bound:
            if letter in dims and any(other in dims for other in item.batch):
                self._bind(code, (letter,))
                self._units.append((np.unique(squeezed(code)), "heads"))
        for letter in sorted(decided & set(dims)):
            self._bind(code, tuple(dim for dim in dims if dim != letter))

    def _obey(self, item: Aligned, code: torch.Tensor) -> bool:
        """Bind a track as the user wants it; False where the user's wish says nothing about it."""
        dims = varying(code)
        outer = tuple(dim for dim in dims if dim in item.batch)
        inner = tuple(dim for dim in dims if dim not in item.batch)
        if not (item.keep and outer and inner):
            return False
        whole = item.keep == "head"
        self._bind(code, inner if whole else outer)
        self._units.append((np.unique(squeezed(code)), "heads" if whole else "head dims"))
        return True

    def _canonical_removable(self, labels: torch.Tensor) -> torch.Tensor:
        """The canonical track; where it is ragged, what must stay anyway counts as FIXED: only the rest could become ragged."""
        code = self.canonical(labels)
        if len(varying(code)) < 2:
            return code
        stays, firm = self._staying()
        number = self._number(labels)
        known = self._removable.get(number)
        if known is not None and known[0] is stays:
            return known[1]
        small = squeezed(code)
        self._swayed |= bool((stays & ~firm)[small.numpy()].any())
        found = compress(torch.where(torch.from_numpy(stays[small.numpy()]), FIXED, small).expand(code.shape))
        self._removable[number] = stays, found
        return found

    def _staying(self) -> tuple[np.ndarray, np.ndarray]:
        """Groups with a reason to stay, and those with a firm one; counted anew after every merge and every round of freezes."""
        if self._stays is None:
            stays, firm = np.zeros(len(self._root), dtype=bool), np.zeros(len(self._root), dtype=bool)
            stays[self._root[np.flatnonzero(self._reason)]] = True
            firm[self._root[np.flatnonzero(self._firm)]] = True
            self._stays = stays, firm
        return self._stays

    def _check_spans(self, item: Aligned, views: list[tuple[int, torch.Tensor]]) -> None:
        """Where one operand may lose indices and another that spans the letter can't, the first must stay."""
        varies = [(operand, code, varying(code)) for operand, code in views]
        for letter in dict.fromkeys(letter for _, _, dims in varies for letter in dims):
            able = {operand for operand, _, dims in varies if letter in dims}
            if any(letter in span and operand not in able for operand, span in enumerate(item.spans)):
                for _, code, dims in varies:
                    if letter in dims:
                        self._freeze(squeezed(code), item.reason)

    def _bind(self, code: torch.Tensor, dims: tuple[int, ...]) -> None:
        code = squeezed(code)
        first = code
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        left, right = torch.broadcast_tensors(first, code)
        self._join(left.reshape(-1).numpy(), right.reshape(-1).numpy(), "shares a slice with entries that must stay")

    def _apply_freezes(self) -> None:
        """Freeze until nothing changes: entries that stay anyway may be all that made a track vary in another way."""
        before = -1
        while before != (before := int(np.count_nonzero(self._reason))):
            self._apply_freezes_once()

    def _apply_freezes_once(self) -> None:
        known = self._staying()
        for freeze in self._constraints.freezes:
            self._stays = known  # what this round freezes counts in the next one
            code = self._canonical_removable(freeze.labels)
            dims = varying(code)
            if len(dims) == 1 and dims[0] in freeze.dims:
                stays = squeezed(code) if freeze.only is None else freeze.only
                self._freeze(stays, freeze.reason, soft=freeze.soft and not self._exact, firm=not freeze.soft)
        self._stays = None

    def _straighten(self) -> bool:
        """Bind ragged tracks along all dimensions but the one that leaves most removable groups; True if any was bound."""
        touched: set[int] = set()
        found = False
        tracks = self._constraints.ragged + [labels for item in self._constraints.aligned for _, labels in item.tracks]
        frozen = set(np.unique(self._root[np.flatnonzero(self._reason)]).tolist())
        freezes: list[tuple[Freeze, set[int]]] | None = None
        for labels in tracks:
            code = self._canonical_removable(labels)
            dims = varying(code)
            if len(dims) < 2:
                continue
            freezes = self._open_freezes() if freezes is None else freezes
            roots = set(torch.unique(squeezed(code)).tolist()) - {FIXED}
            if roots <= frozen or roots & touched:
                found = found or bool(roots & touched)
                continue
            left = [(self._groups_left(code, dim, freezes), -dim) for dim in dims]
            keep = dims[left.index(max(left))]
            self._bind(code, tuple(dim for dim in dims if dim != keep))
            touched |= roots
            found = True
        return found

    def _open_freezes(self) -> list[tuple[Freeze, set[int]]]:
        """Freezes that have not struck because their track is ragged, with the groups they would concern."""
        found = []
        for freeze in self._constraints.freezes:
            if freeze.soft and not self._exact:
                continue
            code = self.canonical(freeze.labels)
            if len(varying(code)) > 1:
                found.append((freeze, set(torch.unique(squeezed(code)).tolist())))
        return found

    def _groups_left(self, code: torch.Tensor, keep: int, freezes: list[tuple[Freeze, set[int]]]) -> int:
        """How many removable groups a ragged track leaves when it may vary along `keep` alone."""
        small = squeezed(code)
        rows = small.movedim(keep, 0).reshape(small.shape[keep], -1).numpy()
        involved, local = np.unique(rows, return_inverse=True)
        local = local.reshape(rows.shape)
        edges = (np.repeat(local[:, 0], rows.shape[1] - 1), local[:, 1:].reshape(-1))
        matrix = coo_matrix((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(len(involved),) * 2)
        _, component = connected_components(matrix, directed=False)
        trial = self._root.copy()
        mapping = np.arange(len(trial))
        mapping[involved] = involved[np.unique(component, return_index=True)[1][component]]
        trial = mapping[trial]
        stuck = {*mapping[self._root[np.flatnonzero(self._reason)]].tolist(), int(mapping[FIXED])}
        mine = set(involved.tolist())
        for freeze, concerned in freezes:
            if not mine & concerned:
                continue
            self._swayed |= freeze.soft
            after = canonical(trial, freeze.labels)
            if any(dim in freeze.dims for dim in varying(after)):
                stuck |= set(torch.unique(squeezed(after)).tolist())
        return len(set(mapping[involved].tolist()) - stuck)


def canonical(root: np.ndarray, labels: torch.Tensor) -> torch.Tensor:
    """Labels replaced by their groups, compressed; `labels` may have stride-0 dimensions."""
    small = squeezed(labels)
    mapped = torch.from_numpy(root[small.numpy()]).reshape(small.shape)
    return compress(mapped.expand(labels.shape))
