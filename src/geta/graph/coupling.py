"""From solved labels to families: which groups exist, what they are called, and why some can't be removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import nn

from geta.graph.context import INTERNAL
from geta.graph.families import Family, Member, Role
from geta.graph.labels import FIXED, Owner, Value, squeezed
from geta.graph.names import canonical_module, find_tensor
from geta.graph.propagate import Propagation
from geta.graph.solver import Partition

ONLY_ONE = "is a single group: removing it would remove the whole layer"
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Part:
    """One family's share of one owner: rows[n, m] of the owner's dimension."""

    number: int
    owner: Owner
    rows: torch.Tensor


def build_families(found: Propagation, partition: Partition, model: nn.Module) -> list[Family]:
    """Group the partition's classes by what they touch; parameters decide the names and the order."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)} | set(found.capture.constants)
    signature = _signatures(found, partition)
    owners = [(number, owner) for number, owner in enumerate(found.space.owners) if owner.tensor]
    if not owners:
        return []
    labels = np.concatenate([np.arange(owner.start, owner.start + owner.size) for owner in _in_order(owners, model)])
    roots, first = np.unique(partition.root[labels], return_index=True)
    order = np.argsort(first, kind="stable")
    families: dict[tuple[int, str], list[int]] = {}
    reasons: dict[tuple[int, str], str] = {}
    for root in roots[order].tolist():
        reason = partition.frozen.get(root, "")
        # what touches the same stays together, whichever of several reasons a part of it quotes
        key = int(signature[root]), reason if reason.startswith(INTERNAL) else "stays" if reason else ""
        reasons.setdefault(key, reason)
        families.setdefault(key, []).append(root)
    parts = _parts(owners, partition, families)
    demanded = _demanded(found, partition)
    built = []
    for key, members in families.items():
        mine, reason = parts[key], reasons[key]
        if all(part.owner.tensor in buffers for part in mine) or reason.startswith(INTERNAL):
            continue
        built.append(_family(found, partition, (members, reason), mine, (buffers, demanded, model)))
    return _unique_names(built)


def _in_order(owners: list[tuple[int, Owner]], model: nn.Module) -> list[Owner]:
    """By module, weights first. Attaching quantizers moves a weight behind its bias; names must not depend on that."""
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}

    def key(owner: Owner) -> tuple[int, bool]:
        path, _, leaf = owner.tensor.rpartition(".")
        return order.get(path, len(order)), leaf != "weight"

    return sorted((owner for _, owner in owners), key=key)


def _signatures(found: Propagation, partition: Partition) -> np.ndarray:
    """A hash per class of everything it touches: how many rows of which parameter dimension, and which tensors of the graph.

    The second part keeps families apart that some tensor sees without the others, so that no tensor is ever emptied.
    """
    signature = np.zeros(len(partition.root), dtype=np.uint64)

    def touch(roots: np.ndarray, mark: int) -> None:
        classes, counts = np.unique(roots, return_counts=True)
        with np.errstate(over="ignore"):
            mixed = (np.uint64(mark + 1) * _MIX) ^ (counts.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F))
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            signature[classes] += mixed ^ (mixed >> np.uint64(32))

    for number, owner in enumerate(found.space.owners):
        if owner.tensor:
            touch(partition.root[owner.start : owner.start + owner.size], number)
    mark = len(found.space.owners)
    known: set[bytes] = set()  # a tensor that touches what another one touches keeps nothing apart that isn't yet
    seen: set[bytes] = set()  # most tensors have the very labels of another one; told before anything is sorted
    for value in found.values.values():
        for leaf in value if isinstance(value, (tuple, list)) else (value,):
            for track in leaf.tracks if isinstance(leaf, Value) else ():
                roots = partition.root[squeezed(track.labels).numpy()]
                if (content := roots.tobytes()) in seen:
                    continue
                seen.add(content)
                classes = np.unique(roots)
                if len(classes) > 1 and classes.tobytes() not in known:
                    known.add(classes.tobytes())
                    mark += 1
                    touch(classes, mark)
    return signature


def _parts(
    owners: list[tuple[int, Owner]], partition: Partition, families: Mapping[tuple[int, str], list[int]]
) -> dict[tuple[int, str], list[Part]]:
    """Index maps of every family in every owner, made by sorting, not by searching."""
    family_of = np.full(len(partition.root), -1, dtype=np.int64)
    place_of = np.zeros(len(partition.root), dtype=np.int64)
    keys = list(families)
    for number, key in enumerate(keys):
        family_of[families[key]] = number
        place_of[families[key]] = np.arange(len(families[key]))
    parts: dict[tuple[int, str], list[Part]] = {key: [] for key in keys}
    for number, owner in owners:
        roots = partition.root[owner.start : owner.start + owner.size]
        family, place = family_of[roots], place_of[roots]
        for which in np.unique(family).tolist():
            rows = np.flatnonzero(family == which)
            rows = rows[np.argsort(place[rows], kind="stable")]
            count = len(families[keys[which]])
            parts[keys[which]].append(Part(number, owner, torch.from_numpy(rows.reshape(count, -1).copy())))
    return parts


def _demanded(found: Propagation, partition: Partition) -> dict[int, set[int]]:
    """Owner -> classes that must be zero there because a consumer would see something else."""
    wanted: dict[int, set[int]] = {}
    for origins, labels in found.ledger.demands:
        classes = partition.root[labels.numpy()[labels.numpy() != FIXED]]
        for owner in sorted(origins):
            wanted.setdefault(owner, set()).update(np.unique(classes).tolist())
    return wanted


def _family(
    found: Propagation,
    partition: Partition,
    what: tuple[list[int], str],
    parts: list[Part],
    context: tuple[set[str], Mapping[int, set[int]], nn.Module],
) -> Family:
    roots, reason = what
    buffers, demanded, _ = context
    mine = set(roots)
    members = []
    for part in parts:
        produces = part.number in found.ledger.producers
        role: Role = "buffer" if part.owner.tensor in buffers else ("producer" if produces else "consumer")
        zero = produces or bool(mine & demanded.get(part.number, set()))
        members.append(Member(part.owner.tensor, part.owner.dim, part.rows, role, zero))
    if not any(member.zero for member in members):  # nothing makes these units, so whoever reads them is their substance
        members = [Member(m.param, m.dim, m.index, m.role, m.role != "buffer") for m in members]
    if not reason and len(roots) == 1:
        reason = ONLY_ONE
    unit = _unit(members, [partition.units[root] for root in roots[:1] if root in partition.units], context[2])
    return Family(_name(members, unit), unit, len(roots), not reason, reason, tuple(members), _inexact(partition, roots))


def _inexact(partition: Partition, roots: list[int]) -> str:
    return next((partition.inexact[root] for root in roots if root in partition.inexact), "")


def _unit(members: list[Member], hints: list[str], model: nn.Module) -> str:
    """What one group is, in words."""
    producers = [member for member in members if member.role == "producer"] or [member for member in members if member.role != "buffer"]
    if hints and hints[0] == "heads":
        # A bias for each head has one row per group and says nothing; where projections differ, several queries share a key.
        sizes = {rows for member in producers if (rows := int(member.index.shape[1])) > 1}
        return "heads" if len(sizes) <= 1 else "key-value groups"
    if hints:
        return hints[0]
    ranks = [(find_tensor(model, member.param).dim(), member.dim) for member in producers]
    if any(rank > 1 and dim == rank - 1 and member.role == "producer" for (rank, dim), member in zip(ranks, producers, strict=True)):
        return "features"
    if any(rank >= 3 and dim <= 1 for rank, dim in ranks):
        return "channels"
    return "neurons" if (2, 0) in ranks else "entries"


def _name(members: list[Member], unit: str) -> str:
    """The module that makes the units; the module around all of them when several make heads together."""
    makers = [member for member in members if member.role == "producer" and member.zero] or list(members)
    modules = list(dict.fromkeys(canonical_module(member.param.rpartition(".")[0]) for member in makers))
    if all(member.role == "consumer" for member in members):
        return f"{modules[0] or members[0].param} (inputs)"
    together = _around(modules) if unit in ("heads", "key-value groups", "head dims") and len(modules) > 1 else ""
    return together or modules[0] or members[0].param


def _around(modules: list[str]) -> str:
    """The innermost module that contains all of these, "" for the model itself."""
    paths = [module.split(".")[:-1] for module in modules]
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in common)


def _unique_names(families: list[Family]) -> list[Family]:
    seen: dict[str, int] = {}
    named = []
    for family in families:
        count = seen[family.name] = seen.get(family.name, 0) + 1
        name = family.name if count == 1 else f"{family.name}#{count}"
        named.append(Family(name, family.unit, family.size, family.prunable, family.reason, family.members, family.inexact))
    return named
