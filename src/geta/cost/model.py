"""The cost of a compact model as a function of how many groups go and how wide every quantizer is, without building it.

With `r_f` groups removed from family f and `b_q` bits of quantizer q, every size of every tensor is affine in r, so that

    size_u   = n_u - sum_f m_uf r_f
    MACs     = sum over products i of  c_i * prod_j size_ij
    BOPs     = sum over products i of  MACs_i * b_left * b_right       (32 where unquantized; the widest of what is joined)
    params   = sum over parameters of  prod_j size_j
    bytes    = sum over tensors of     ceil(numel * b / 8), or numel * itemsize where unquantized
    latency  = predicted from a table of measured layers, when there is one (`geta.cost.latency`)

All but the last are the sums that `geta.cost` takes over the compact model's graph, so `evaluate` gives exactly its numbers. Where a
product can't be followed (`notes` says which), its largest value stands for it: the real cost is never above `evaluate`.

Legend: `F` families, `Q` quantizers, `U` distinct sizes, `P` products, `T` tensors, `C` candidates, `K` kinds of cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from geta.cost.latency import LatencyModel

KINDS = ("macs", "bops", "params", "bytes")
"""What is counted; the order of the kinds of cost in every vector [K]."""
LATENCY = "latency_ms"
"""A last kind, in models that have a latency."""


@dataclass(frozen=True)
class Width:
    """Bits of one operand: the widest of `fixed` and the quantizers (numbers in [0, Q))."""

    fixed: float
    quantizers: tuple[int, ...] = ()

    def bits(self, bits: Sequence[float] | np.ndarray) -> float:
        """The operand's bits when quantizer q has `bits[q]`."""
        return max(self.fixed, *(float(bits[q]) for q in self.quantizers), 0.0)


@dataclass(frozen=True)
class ProductTerm:
    """`factor` times the product of `sizes` (numbers in [0, U)) multiply-accumulates between operands of these widths."""

    factor: int
    sizes: tuple[int, ...]
    left: Width
    right: Width


@dataclass(frozen=True)
class TensorTerm:
    """A stored tensor: its sizes, whether it is a parameter, and its bits per element (8 * itemsize where unquantized)."""

    sizes: tuple[int, ...]
    parameter: bool
    width: Width


@dataclass(frozen=True)
class CostModel:
    """Costs as a function of removed groups and bits; made by `geta.cost.derive.cost_model`.

    families, family_sizes: [F]. quantizers: names [Q]. base: n_u [U]. slope: m_uf [U, F], both int64.
    dense: cost of the uncut float network [K]: 32 bits on both sides of every product, every tensor in its own dtype. (Its latency is
        that of the uncut network in the table's precision.)
    notes: in words, what is bounded from above instead of being exact.
    latency: what predicts the latency, if anything does.
    """

    families: tuple[str, ...]
    family_sizes: tuple[int, ...]
    quantizers: tuple[str, ...]
    base: np.ndarray
    slope: np.ndarray
    products: tuple[ProductTerm, ...]
    tensors: tuple[TensorTerm, ...]
    dense: dict[str, float]
    notes: tuple[str, ...]
    latency: LatencyModel | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of cost that this model knows, in the order of every vector [K]."""
        return KINDS if self.latency is None else (*KINDS, LATENCY)

    def with_families(self, together: Sequence[Sequence[int]]) -> CostModel:
        """The same costs of other coordinates: number i removes equally many groups of every family in `together[i]`."""
        columns = [self.slope[:, list(families)].sum(axis=1) for families in together]
        return replace(
            self,
            families=tuple(self.families[families[0]] for families in together),
            family_sizes=tuple(self.family_sizes[families[0]] for families in together),
            slope=np.stack(columns, axis=1) if columns else self.slope[:, :0],
        )

    def evaluate(self, removed: Sequence[int] | np.ndarray, bits: Sequence[float] | np.ndarray) -> dict[str, float]:
        """The costs: removed [F] groups, bits [Q]. Keys: macs, bops, params, bytes, exactly as `geta.cost` counts them; latency_ms."""
        sizes = [int(size) for size in self.base - self.slope @ np.asarray(removed, dtype=np.int64).reshape(-1)]
        macs = [term.factor * math.prod(sizes[u] for u in term.sizes) for term in self.products]
        bops = math.fsum(count * term.left.bits(bits) * term.right.bits(bits) for count, term in zip(macs, self.products, strict=True))
        params = stored = 0
        for term in self.tensors:
            numel = math.prod(sizes[u] for u in term.sizes)
            params += numel if term.parameter else 0
            stored += math.ceil(numel * term.width.bits(bits) / 8)
        counted = {"macs": sum(macs), "bops": bops, "params": params, "bytes": stored}
        if self.latency is None:
            return counted
        return {**counted, LATENCY: float(self.latency.milliseconds(np.array(sizes, dtype=np.float64)[:, None])[0])}


class CostMoves:
    """A point (removed groups, bits) of a model and what changing one coordinate of it costs, in floats and vectorised.

    model: the cost model. Start: nothing removed, `bits` [Q].
    """

    def __init__(self, model: CostModel, bits: np.ndarray) -> None:
        self.model = model
        self._families = [_Touched.of(model, model.slope[:, f] != 0) for f in range(len(model.families))]
        self._everything = _Touched.of(model, np.ones(len(model.base), dtype=bool))
        latency = model.latency
        self._latency = [] if latency is None else [latency.touched(model.slope[:, f] != 0) for f in range(len(model.families))]
        self._of_quantizer = [_Users.of(model, q) for q in range(len(model.quantizers))]
        self._parameter_T = np.array([term.parameter for term in model.tensors], dtype=np.float64)
        self.move_to(np.zeros(len(model.families), dtype=np.int64), bits)

    def move_to(self, removed: np.ndarray, bits: np.ndarray) -> None:
        """Set the whole point: removed [F], bits [Q]."""
        self.removed, self.bits = removed.astype(np.int64), bits.astype(np.float64)
        self._sizes = (self.model.base - self.model.slope @ self.removed).astype(np.float64)
        macs, numel = self._everything.counts(self._sizes[:, None])
        self._macs_P, self._numel_T = macs[:, 0], numel[:, 0]
        self._operands = np.array([[t.left.bits(self.bits), t.right.bits(self.bits)] for t in self.model.products]).reshape(-1, 2)
        self._width_T = np.array([term.width.bits(self.bits) for term in self.model.tensors])
        totals = self._totals(slice(None), slice(None), self._macs_P[:, None], self._numel_T[:, None])[:, 0]
        latency = self.model.latency
        self.cost = totals if latency is None else np.append(totals, latency.milliseconds(self._sizes[:, None]))

    def set_removed(self, family: int, count: int) -> None:
        """Change the number of groups removed from one family."""
        if count == self.removed[family]:
            return
        touched = self._families[family]
        self.cost = self.cost + self.removal_deltas(family, np.array([count]))[:, 0]
        self._sizes -= self.model.slope[:, family] * (count - self.removed[family])
        self.removed[family] = count
        macs, numel = touched.counts(self._sizes[touched.sizes][:, None])
        self._macs_P[touched.products], self._numel_T[touched.tensors] = macs[:, 0], numel[:, 0]

    def set_bits(self, quantizer: int, bits: float) -> None:
        """Change the bits of one quantizer."""
        if bits == self.bits[quantizer]:
            return
        self.cost = self.cost + self.bits_deltas(quantizer, np.array([bits]))[:, 0]
        self.bits[quantizer] = bits
        users = self._of_quantizer[quantizer]
        for place in users.products.tolist():
            term = self.model.products[place]
            self._operands[place] = term.left.bits(self.bits), term.right.bits(self.bits)
        self._width_T[users.tensors] = [self.model.tensors[place].width.bits(self.bits) for place in users.tensors.tolist()]

    def removal_deltas(self, family: int, counts: np.ndarray) -> np.ndarray:
        """Change of the costs [K, C] if `counts` [C] groups were removed from one family instead of the present number."""
        touched = self._families[family]
        slope = self.model.slope[touched.sizes, family][:, None]
        macs, numel = touched.counts(self._sizes[touched.sizes][:, None] - slope * (counts - self.removed[family]))
        products, tensors = touched.products, touched.tensors
        now = self._totals(products, tensors, self._macs_P[products][:, None], self._numel_T[tensors][:, None])
        change: np.ndarray = self._totals(products, tensors, macs, numel) - now
        if not self._latency:
            return change
        part = self._latency[family]
        sizes = self._sizes[:, None] - self.model.slope[:, family][:, None] * (counts - self.removed[family])
        return np.vstack([change, part.milliseconds(sizes) - part.milliseconds(self._sizes[:, None])])

    def bits_deltas(self, quantizer: int, bits: np.ndarray) -> np.ndarray:
        """Change of the costs [K, C] if one quantizer had `bits` [C] instead of its present bits."""
        users = self._of_quantizer[quantizer]
        products, tensors = users.products, users.tensors
        rest = users.without(self.model, self.bits)
        sides = [
            np.where(reads[:, None], np.maximum(floor[:, None], bits), self._operands[products, side][:, None])
            for side, (reads, floor) in enumerate(((users.left, rest[0]), (users.right, rest[1])))
        ]
        deltas = np.zeros((len(self.model.kinds), len(bits)))
        deltas[1] = self._macs_P[products] @ (sides[0] * sides[1] - self._operands[products].prod(axis=1)[:, None])
        numel = self._numel_T[tensors][:, None]
        stored = np.ceil(numel * np.maximum(rest[2][:, None], bits) / 8) - np.ceil(numel * self._width_T[tensors][:, None] / 8)
        deltas[3] = stored.sum(axis=0)
        return deltas

    def _totals(self, products: slice | np.ndarray, tensors: slice | np.ndarray, macs: np.ndarray, numel: np.ndarray) -> np.ndarray:
        """[K, C] from the MACs [P', C] of some products and the elements [T', C] of some tensors."""
        pairs, width = self._operands[products].prod(axis=1), self._width_T[tensors][:, None]
        stored = np.ceil(numel * width / 8).sum(axis=0)
        return np.stack([macs.sum(axis=0), pairs @ macs, self._parameter_T[tensors] @ numel, stored])


@dataclass(frozen=True)
class _Touched:
    """The products and tensors that change with some sizes; their factors point into `sizes` (and one past it, for 1)."""

    sizes: np.ndarray
    products: np.ndarray
    tensors: np.ndarray
    product_factors: np.ndarray
    tensor_factors: np.ndarray
    constants: np.ndarray

    @classmethod
    def of(cls, model: CostModel, chosen_U: np.ndarray) -> _Touched:
        whole = bool(chosen_U.all())
        products = [i for i, term in enumerate(model.products) if whole or any(chosen_U[u] for u in term.sizes)]
        tensors = [i for i, term in enumerate(model.tensors) if whole or any(chosen_U[u] for u in term.sizes)]
        lists = [model.products[i].sizes for i in products], [model.tensors[i].sizes for i in tensors]
        sizes = list(range(len(model.base))) if whole else sorted({u for part in lists for used in part for u in used})
        place = {u: i for i, u in enumerate(sizes)}
        constants = np.array([model.products[i].factor for i in products], dtype=np.float64)
        indices = [np.array(each, dtype=np.int64) for each in (sizes, products, tensors)]
        return cls(indices[0], indices[1], indices[2], _padded(lists[0], place), _padded(lists[1], place), constants)

    def counts(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """MACs of the products and elements of the tensors for sizes [U', C]."""
        table = np.concatenate([sizes, np.ones((1, sizes.shape[1]))])
        return table[self.product_factors].prod(axis=1) * self.constants[:, None], table[self.tensor_factors].prod(axis=1)


def _padded(lists: list[tuple[int, ...]], place: dict[int, int]) -> np.ndarray:
    longest = max((len(used) for used in lists), default=0)
    padded = np.full((len(lists), longest), len(place), dtype=np.int64)
    for row, used in enumerate(lists):
        padded[row, : len(used)] = [place[u] for u in used]
    return padded


@dataclass(frozen=True)
class _Users:
    """The products and tensors whose bits depend on one quantizer, and on which side of a product it is."""

    quantizer: int
    products: np.ndarray
    tensors: np.ndarray
    left: np.ndarray
    right: np.ndarray
    fixed: tuple[np.ndarray, np.ndarray, np.ndarray] | None

    @classmethod
    def of(cls, model: CostModel, q: int) -> _Users:
        products = [i for i, term in enumerate(model.products) if q in term.left.quantizers or q in term.right.quantizers]
        tensors = [i for i, term in enumerate(model.tensors) if q in term.width.quantizers]
        left, right = (
            np.array([q in width.quantizers for width in side], dtype=bool)
            for side in ([model.products[i].left for i in products], [model.products[i].right for i in products])
        )
        users = cls(q, np.array(products, dtype=np.int64), np.array(tensors, dtype=np.int64), left, right, None)
        widths = [w for i in products for w in (model.products[i].left, model.products[i].right) if q in w.quantizers]
        if any(len(width.quantizers) > 1 for width in [*widths, *(model.tensors[i].width for i in tensors)]):
            return users
        return replace(users, fixed=users.without(model, np.zeros(len(model.quantizers))))

    def without(self, model: CostModel, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bits of the left sides, right sides and tensors as far as other quantizers and unquantized values decide."""
        if self.fixed is not None:
            return self.fixed
        others = bits.copy()
        others[self.quantizer] = 0.0
        terms = [model.products[i] for i in self.products]
        left, right = ([width.bits(others) for width in side] for side in ([t.left for t in terms], [t.right for t in terms]))
        return np.array(left), np.array(right), np.array([model.tensors[i].width.bits(others) for i in self.tensors])
