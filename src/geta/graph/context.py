"""What a rule sees of one operator call, and the vocabulary in which it speaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from geta.graph.labels import LabelSpace, Track, Value, compress, make_value, squeezed
from geta.graph.solver import Aligned, Constraints, Freeze

INTERNAL = "internal: "
"""Prefix of reasons about dimensions that nobody would call a structure (kernel height); the table leaves them out."""


@dataclass
class Ledger:
    """Which owners (parameter dimensions) make units, which only read them, and which were asked to be zero."""

    producers: set[int] = field(default_factory=set)
    consumers: set[int] = field(default_factory=set)
    demands: list[tuple[frozenset[int], torch.Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """An operand of an aligned operation and, per dimension of it, the letter that dimension stands for."""

    value: Value
    letters: tuple[int, ...]


class Context:
    """One operator call under propagation: arguments by name, the module path, and the verbs of coupling."""

    def __init__(
        self,
        node: fx.Node,
        arguments: Mapping[str, Any],
        path: str,
        space: LabelSpace,
        rest: tuple[Constraints, Ledger],
        *,
        granularity: str = "",
    ) -> None:
        self.node = node
        self.arguments = arguments
        self.path = path
        self.space = space
        self.constraints, self.ledger = rest
        self.granularity = granularity

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def op(self) -> str:
        return str(getattr(self.node.target, "_opname", getattr(self.node.target, "__name__", self.node.target)))

    @property
    def where(self) -> str:
        """For messages: the operator and the user's module path."""
        return f"{self.op} at {self.path or 'the model itself'}"

    @property
    def shape(self) -> tuple[int, ...]:
        return concrete_shape(self.node.meta["val"])

    # ---- verbs -------------------------------------------------------------------------------------------------

    def free(self, tracks: Sequence[Track], derived: bool = False) -> Value:
        """The call's result."""
        return make_value(self.shape, tracks, derived)

    def freeze(self, value: Value, dims: Sequence[int], reason: str, *, soft: bool = False) -> None:
        """Keep `dims` of a value whole."""
        dims = tuple(dim % value.rank for dim in dims) if value.rank else ()
        for track in value.tracks:
            self.constraints.freezes.append(Freeze(track.labels, dims, reason, soft))

    def freeze_all(self, values: Sequence[Value], reason: str) -> None:
        for value in values:
            for track in value.tracks:
                self.constraints.fixed.append((squeezed(track.labels).reshape(-1).numpy(), reason))

    def bind(self, code: torch.Tensor, dims: Sequence[int]) -> None:
        """Unconditionally join a track along `dims`."""
        labels = squeezed(code) >> 1
        first = labels
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        left, right = torch.broadcast_tensors(first, labels)
        self.constraints.edges.append((left.reshape(-1).numpy(), right.reshape(-1).numpy()))

    def produce(self, *values: Value) -> None:
        """The rows of these tensors make their units: they are zeroed when the unit is removed."""
        for value in values:
            for track in value.tracks:
                self.ledger.producers |= track.origins

    def align(self, places: Sequence[Place], rank: int, *, bound: Sequence[int] = (), batch: Sequence[int] = ()) -> None:
        """Operands that span the same letter must keep the same indices of it."""
        tracks = []
        for number, place in enumerate(places):
            for track in place.value.tracks:
                tracks.append((number, self.lay(track.labels, place.letters, rank)))
        if not tracks:
            return
        spans = tuple(tuple(letter for dim, letter in enumerate(place.letters) if place.value.shape[dim] > 1) for place in places)
        reason = f"must match a tensor of fixed size, such as a model input, in {self.where}"
        keep = self.granularity if self.granularity in ("head", "head_dim") else ""
        self.constraints.aligned.append(Aligned(tuple(tracks), spans, tuple(bound), tuple(batch), reason, keep))

    @staticmethod
    def lay(code: torch.Tensor, letters: Sequence[int], rank: int) -> torch.Tensor:
        """Lay a track out over `rank` letters: size 1 for the letters that it has not."""
        order = sorted(range(len(letters)), key=lambda dim: letters[dim])
        laid = squeezed(compress(code)).permute(order)
        sizes = dict(zip(sorted(letters), laid.shape, strict=True))
        return laid.reshape([sizes.get(letter, 1) for letter in range(rank)])


def concrete(value: Any) -> Any:
    """A SymInt / SymFloat / SymBool as the number that the example inputs gave it."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint)
    if isinstance(value, torch.SymFloat):
        return float(value.node.hint)
    if isinstance(value, torch.SymBool):
        return bool(value.node.hint)
    return value


def concrete_shape(value: Any) -> tuple[int, ...]:
    """The shape of a fake tensor in the example's numbers."""
    return tuple(int(concrete(size)) for size in value.shape)


def expand_to(code: torch.Tensor, shape: Sequence[int], new_shape: Sequence[int]) -> torch.Tensor:
    """Broadcast a track of `shape` to `new_shape` by the rules of broadcasting."""
    lead = len(new_shape) - len(shape)
    return code.reshape((1,) * lead + tuple(code.shape)).expand(tuple(new_shape)) if lead else code.expand(tuple(new_shape))


def narrow_dims(code: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Index 0 along `dims` (kept as size 1); the zero bit is the conjunction over what is left out."""
    first = code
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    bit = (squeezed(code) & 1).bool()
    for dim in dims:
        if bit.shape[dim] > 1:
            bit = bit.all(dim, keepdim=True)
    return (first >> 1 << 1) | bit.to(torch.int64).expand(first.shape)


Rule = Callable[[Context], Any]
