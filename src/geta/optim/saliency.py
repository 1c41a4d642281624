"""How important is a group? Criteria, each from a few numbers per group, and their weighted sum.

With x_g the parameters of group g and grad_g the base optimizer's direction (`-delta`, so that plain descent moves along
`-grad_g`), lowest score = most redundant:

    magnitude            ||x_g||
    average magnitude    ||x_g|| / |g|
    cosine               1 - cos(x_g, grad_g)      low when moving x_g towards zero also lowers the loss
    Taylor, 1st order    |<x_g, grad_g>|
    Taylor, 2nd order    <x_g, grad_g>^2 / 2

Each criterion's vector over all groups is divided by its own l2 norm before the weighted sum, or family by family by its root mean
square (`normalise="family"`), so that families of different scale are compared fairly.

Also offered, weight 0 by default: `relative_magnitude` and `relative_taylor` divide by the mean of the group's family. The five
published ones compare absolute sizes across families, and can leave a wide family a single group while others stay whole.
`fisher` and `activation` look at a window of steps before groups are marked (`geta.optim.observe`).

Source: GETA (arXiv 2502.16638) and HESSO (arXiv 2409.09085), saliency score.
Deviation: the public reference uses 1 + cos, which calls a group important when shrinking it helps; ours is 1 - cos. Measured by
`bench.saliency_cosine`: alone ours is better in 51 of 58 comparisons, in the sum of five in 26 of 56.

Legend: `G` groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from geta.errors import ConfigError
from geta.optim import activations  # noqa: F401 - its observer registers itself
from geta.optim.groups import Graph, GroupedTensor, GroupIndex, row_sums
from geta.optim.observe import OBSERVERS, Observation


@dataclass(frozen=True)
class GroupStatistics:
    """What a criterion may look at, one number per group (all [G]).

    norm: ||x_g||. size: |g|, elements. direction: ||grad_g||. inner: <x_g, grad_g>. family: id of the group's family (int64), the
    same for residual branches of a set.
    An element that a group owns along two dimensions of one tensor counts twice, in all of them alike.
    A whole residual branch, a group of thousands of rows, counts as one of its rows does on average: sums over its elements are divided
    by the number of rows, so that it compares with the channels of other layers and doesn't decide how criteria are normalised.
    observed: what the observers of the saliency report, by name; empty without observers.
    """

    norm: Tensor
    size: Tensor
    direction: Tensor
    inner: Tensor
    family: Tensor
    observed: Mapping[str, Tensor] = field(default_factory=dict)

    def seen_by(self, observer: str) -> Tensor:
        """What the observer reports [G]; ConfigError when the saliency has no such observer."""
        if observer not in self.observed:
            raise ConfigError(f"this criterion needs the observer '{observer}': give Saliency(..., observers=['{observer}'])")
        return self.observed[observer]

    def family_mean(self, values: Tensor) -> Tensor:
        """For each group, the mean of `values` over its family [G]."""
        sums = torch.zeros_like(values).index_add_(0, self.family, values)
        counts = torch.zeros_like(values).index_add_(0, self.family, torch.ones_like(values))
        return (sums / counts.clamp(min=1.0))[self.family]


Criterion = Callable[[GroupStatistics], Tensor]
SaliencySpec = str | Criterion | Mapping[str, float] | Sequence[tuple[str | Criterion, float]] | None
Normalise = Literal["global", "family"]

DEFAULT_WINDOW = 20

CRITERIA: dict[str, Criterion] = {}
"""All criteria by name; `register_criterion` adds to it."""

_NEEDS: dict[str, tuple[str, ...]] = {}


def register_criterion(name: str, observers: Sequence[str] = ()) -> Callable[[Criterion], Criterion]:
    """Make a criterion usable by name: `@register_criterion("mine")` over a function GroupStatistics -> Tensor[G].

    observers: names of the observers (`geta.optim.observe`) whose reports it reads with `GroupStatistics.seen_by`.
    """

    def register(criterion: Criterion) -> Criterion:
        if name in CRITERIA:
            raise ConfigError(f"a saliency criterion named '{name}' exists already: choose another name")
        CRITERIA[name] = criterion
        _NEEDS[name] = tuple(observers)
        return criterion

    return register


@register_criterion("magnitude")
def magnitude(groups: GroupStatistics) -> Tensor:
    """||x_g||."""
    return groups.norm


@register_criterion("average_magnitude")
def average_magnitude(groups: GroupStatistics) -> Tensor:
    """||x_g|| / |g|."""
    return groups.norm / groups.size


@register_criterion("cosine")
def cosine(groups: GroupStatistics) -> Tensor:
    """1 - cos(x_g, grad_g); the cosine with a zero vector counts as 0."""
    scale = groups.norm * groups.direction
    return 1.0 - torch.where(scale > 0, groups.inner / torch.where(scale > 0, scale, 1.0), 0.0)


@register_criterion("taylor_first")
def taylor_first(groups: GroupStatistics) -> Tensor:
    """|<x_g, grad_g>|."""
    return groups.inner.abs()


@register_criterion("taylor_second")
def taylor_second(groups: GroupStatistics) -> Tensor:
    """<x_g, grad_g>^2 / 2."""
    return groups.inner.square() / 2.0


@register_criterion("relative_magnitude")
def relative_magnitude(groups: GroupStatistics) -> Tensor:
    """||x_g|| / mean of ||x|| over the family of g; compares families of different width and depth fairly."""
    mean = groups.family_mean(groups.norm)
    return groups.norm / torch.where(mean > 0, mean, 1.0)


@register_criterion("relative_taylor")
def relative_taylor(groups: GroupStatistics) -> Tensor:
    """|<x_g, grad_g>| / mean over the family of g."""
    mean = groups.family_mean(groups.inner.abs())
    return groups.inner.abs() / torch.where(mean > 0, mean, 1.0)


@register_criterion("fisher", observers=["fisher"])
def fisher(groups: GroupStatistics) -> Tensor:
    """Mean over the window's steps of <x_g, dL/dx_g>^2, with the gradient itself instead of the base optimizer's direction."""
    return groups.seen_by("fisher")


@register_criterion("activation", observers=["activation"])
def activation(groups: GroupStatistics) -> Tensor:
    """Sum of |w_ij| a_j over the layers that read the group, a_j = root mean square of input j over the window.

    A family that can't be observed (the observer's notes name it) counts as average: its relative magnitudes times the mean of
    all groups that were observed.
    """
    seen = groups.seen_by("activation")
    known = seen >= 0
    mean = torch.where(known, seen, 0.0).sum() / known.sum().clamp(min=1)
    return torch.where(known, seen, relative_magnitude(groups) * mean)


DEFAULT_WEIGHTS: dict[str, float] = {
    "magnitude": 0.2,
    "average_magnitude": 0.2,
    "cosine": 0.2,
    "taylor_first": 0.2,
    "taylor_second": 0.2,
}


class Saliency:
    """A weighted sum of criteria: `score(stats) = sum_i w_i n(v_i)`.

    spec:      None (the five criteria, weight 0.2 each), a name, a callable, {name: weight}, or a list of (name or callable, weight).
    normalise: "global": n(v) = v / ||v||. "family": n(v)_g = v_g / (rms of v over the family of g * sqrt(G)), so that every family
               has the same mean square; ||n(v)|| = 1 in both cases.
    observers: further observers that callables of yours read with `GroupStatistics.seen_by`; named criteria bring theirs.
    window:    how many steps, up to and with the one in which groups are marked, observers look at; None = 20. A window never
               reaches back beyond the previous marking.

    It holds no state of a run, so that one instance can serve several optimizers.

    Raises ConfigError for an unknown name, an empty or all-zero list, a weight that isn't a finite number, a window without
    observers, or (when scoring) a criterion whose result isn't a floating-point vector with one number per group.
    """

    def __init__(
        self, spec: SaliencySpec = None, *, normalise: Normalise = "global", observers: Sequence[str] = (), window: int | None = None
    ) -> None:
        terms = [(name, _resolve(name), _weight(name, weight)) for name, weight in _pairs(spec)]
        self._terms = [term for term in terms if term[2]]
        if not self._terms:
            raise ConfigError("saliency: no criterion has a weight other than zero; give at least one")
        if normalise not in get_args(Normalise):
            raise ConfigError(f"saliency: normalise is {normalise!r}; it must be one of {', '.join(get_args(Normalise))}")
        self.normalise = normalise
        needed = [*observers, *(observer for name, _, _ in self._terms if isinstance(name, str) for observer in _NEEDS.get(name, ()))]
        unknown = [name for name in needed if name not in OBSERVERS]
        if unknown:
            raise ConfigError(f"saliency: there is no observer named '{unknown[0]}'; known are {', '.join(sorted(OBSERVERS))}")
        self.observers = tuple(sorted(set(needed)))
        self.window = _window(window, self.observers)

    @classmethod
    def of(cls, value: Saliency | SaliencySpec) -> Saliency:
        """`value` itself if it is a Saliency, else one made from it as `spec`."""
        return value if isinstance(value, Saliency) else cls(value)

    def observation(self, index: GroupIndex, graph: Graph) -> Observation:
        """New observers for one run over the groups of `index`; closed."""
        return Observation({name: OBSERVERS[name](index, graph) for name in self.observers})

    def score(self, groups: GroupStatistics) -> Tensor:
        """Scores [G]; lowest = most redundant."""
        total = torch.zeros_like(groups.norm)
        for name, criterion, weight in self._terms:
            vector = criterion(groups)
            if not isinstance(vector, Tensor) or vector.shape != total.shape or not vector.is_floating_point():
                found = f"{vector.dtype} {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
                raise ConfigError(f"saliency criterion {name!r} returned {found}: it must be a float tensor of shape {tuple(total.shape)}")
            scale = self._scale(vector, groups)
            total = total + weight * torch.where(scale > 0, vector / torch.where(scale > 0, scale, 1.0), 0.0)
        return total

    def _scale(self, vector: Tensor, groups: GroupStatistics) -> Tensor:
        if self.normalise == "global":
            norm: Tensor = torch.linalg.vector_norm(vector)
            return norm
        return groups.family_mean(vector.square()).sqrt() * math.sqrt(vector.numel())


SaliencyLike = Saliency | SaliencySpec


class RowStatistics:
    """Sums over the rows of one parameter after another, which no copy of a parameter outlives."""

    def __init__(self, index: GroupIndex) -> None:
        self._index = index
        self._x: list[list[Tensor]] = []
        self._grad: list[list[Tensor]] = []
        self._inner: list[list[Tensor]] = []
        self._size: list[list[Tensor]] = []

    def add(self, entry: GroupedTensor, old: Tensor, new: Tensor) -> None:
        """Look at the next parameter of the index before and after the proposed step."""
        x = old.to(self._index.dtype)
        grad = x - new.to(self._index.dtype)
        self._x.append(row_sums(entry, x.square()))
        self._grad.append(row_sums(entry, grad.square()))
        self._inner.append(row_sums(entry, x * grad))
        self._size.append([groups.new_full(groups.shape, x.numel() // max(groups.numel(), 1)) for groups in entry.groups])

    def groups(self, observed: Mapping[str, Tensor] | None = None) -> GroupStatistics:
        """Statistics of all groups, once all parameters were looked at. observed: what observers report, by name."""
        index = self._index
        x_G, grad_G, inner_G = (index.average(index.per_group(index.reduce_rows(rows))) for rows in (self._x, self._grad, self._inner))
        size_G = index.average(index.per_group(index.reduce_rows(self._size)).to(index.dtype))
        return GroupStatistics(
            norm=x_G.sqrt(), size=size_G, direction=grad_G.sqrt(), inner=inner_G, family=index.compared_G, observed=observed or {}
        )


def group_statistics(
    index: GroupIndex, before: Sequence[Tensor], after: Sequence[Tensor], observed: Mapping[str, Tensor] | None = None
) -> GroupStatistics:
    """Statistics of all groups from each parameter's value before and after the proposed step (`grad = before - after`).

    `before` and `after` run parallel to `index.parameters`. observed: what observers report, by name.
    """
    rows = RowStatistics(index)
    for entry, old, new in zip(index.parameters, before, after, strict=True):
        rows.add(entry, old, new)
    return rows.groups(observed)


def _pairs(spec: SaliencySpec) -> list[tuple[str | Criterion, float]]:
    if spec is None:
        return list(DEFAULT_WEIGHTS.items())
    if isinstance(spec, str) or callable(spec):
        return [(spec, 1.0)]
    if isinstance(spec, Mapping):
        return list(spec.items())
    try:
        return [(name, weight) for name, weight in spec]
    except (TypeError, ValueError):
        raise ConfigError(f"saliency is {spec!r}: give a name, a callable, {{name: weight}} or a list of (criterion, weight)") from None


def _resolve(name: str | Criterion) -> Criterion:
    if not isinstance(name, str):
        if not callable(name):
            raise ConfigError(f"saliency: {name!r} is neither a criterion's name nor a callable")
        return name
    if name not in CRITERIA:
        raise ConfigError(f"saliency: there is no criterion named '{name}'; known are {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]


def _weight(name: str | Criterion, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
        raise ConfigError(f"saliency: the weight of {name!r} is {weight!r}; it must be a finite number")
    return float(weight)


def _window(window: int | None, observers: Sequence[str]) -> int:
    if window is None:
        return DEFAULT_WINDOW
    if not observers:
        raise ConfigError(
            f"saliency: window = {window} has no effect, because no criterion observes; use 'fisher' or 'activation', or drop it"
        )
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ConfigError(f"saliency: window is {window!r}; it must be a whole number of steps, at least 1")
    return window
