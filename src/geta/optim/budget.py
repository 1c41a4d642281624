"""Targets in costs: the user says what the compact model may cost, and groups and bits are chosen so that it does.

Legend: `F` families, `L` quantizers of the bank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geta.cost.derive import cost_model
from geta.cost.latency import LatencyTable
from geta.cost.model import KINDS, LATENCY, CostModel
from geta.cost.record import Cost
from geta.errors import ConfigError, GetaError
from geta.graph.dependency import DependencyGraph
from geta.graph.names import find_tensor
from geta.optim.groups import Graph, GroupIndex
from geta.optim.plan import Coordinate, smallest_costs, solve
from geta.optim.selection import Selector
from geta.optim.shards import is_sharded, whole
from geta.quant import Bits, Quantizer, quantizers

_UNITS = {"macs": "MACs", "bops": "BOPs", "params": "parameters", "bytes": "bytes", LATENCY: "milliseconds (predicted)"}
_WHOLE = {LATENCY: "uncut"}
"""What a kind of cost is compared with, where it isn't the dense float network."""


@dataclass(frozen=True)
class Budget:
    """What the compact model may cost at most, as `geta.cost` counts it; every limit that is given holds.

    bops, macs, params, bytes: a float in (0, 1] is a share of the dense network's cost on the same inputs (32 bits on both sides of
        every product, tensors in their own dtype); an int above 1 is an absolute number (bytes: of parameters, buffers and scales).
    latency_ms: milliseconds of one call, above 0, as `latency` predicts them (`geta.measure_layers`, docs/latency.md): a prediction for
        the machine, runtime and batch size of that table, which `geta.report.latency_table.check_prediction` compares with a measurement.
    bit_weight: how much the error of quantization counts against the importance of groups, see `BudgetTarget`; 0 = only groups count.

    Raises ConfigError for anything else, and when no limit is given.
    """

    bops: float | int | None = None
    macs: float | int | None = None
    params: float | int | None = None
    bytes: float | int | None = None
    latency_ms: float | None = None
    latency: LatencyTable | None = field(default=None, repr=False)
    bit_weight: float = 1.0
    _bound: CostModel | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind) is not None}
        if not given and self.latency_ms is None and self.latency is None:
            raise ConfigError(
                "Budget() limits nothing: give at least one of bops, macs, params, bytes and latency_ms, e.g. Budget(bops=0.03)"
            )
        _check_latency(self.latency_ms, self.latency)
        for kind, value in given.items():
            share = type(value) is float and 0.0 < value <= 1.0
            if not share and not (type(value) is int and value > 1):
                raise ConfigError(
                    f"Budget({kind}={value!r}): give a float above 0 and up to 1, a share of the dense network's {_UNITS[kind]}, "
                    "or an int above 1, an absolute number"
                )
        weight = self.bit_weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight < float("inf"):
            raise ConfigError(f"Budget(bit_weight={weight!r}): it must be finite and not negative")

    def bind(self, graph: DependencyGraph) -> Budget:
        """The same budget that knows the costs of this graph's model already, for models that `fully_shard` then takes apart.

        Call it after `geta.quantize` and before `fully_shard`. Otherwise the optimizer derives the costs itself.
        """
        return replace(self, _bound=cost_model(graph, self.latency))

    def model_of(self, graph: DependencyGraph) -> CostModel:
        """The costs of the graph's model. Raises ConfigError when they can't be derived any more, or are those of another model."""
        if self._bound is not None:
            other = sorted(set(self._bound.quantizers) - set(quantizers(graph.model)))
            other += [family.name for family in graph.families if family.prunable and family.name not in self._bound.families]
            if other:
                raise ConfigError(f"the budget was bound to another model, which has '{other[0]}': bind it to this graph")
            return self._bound
        sharded = [name for name, parameter in graph.model.named_parameters() if is_sharded(parameter)]
        if sharded:
            raise ConfigError(
                f"the model is sharded (first: '{sharded[0]}'), so that its costs can't be derived any more: use "
                f"target=budget.bind(graph) with a budget that was bound before fully_shard"
            )
        return cost_model(graph, self.latency)

    def limits(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Absolute limits, given the costs of the dense network by kind."""
        given = {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind) is not None}
        limits = {kind: value * dense[kind] if isinstance(value, float) else float(value) for kind, value in given.items()}
        return limits if self.latency_ms is None else {**limits, LATENCY: float(self.latency_ms)}

    def to_dict(self) -> dict[str, float | str | None]:
        """Plain data, for checkpoints."""
        counted = {**{kind: getattr(self, kind) for kind in KINDS}, "bit_weight": float(self.bit_weight)}
        return counted if self.latency is None else {**counted, LATENCY: self.latency_ms, "latency": self.latency.fingerprint}


@dataclass(frozen=True)
class Plan:
    """How many groups each family loses [F] and how many bits each quantizer has [L] in the end."""

    removed: tuple[int, ...]
    bits: tuple[int, ...]


class BudgetTarget:
    """A budget on its way to being met in one run. Plans once, from the scores of the first marking:

        min  sum over families of damage / sum of all scores  +  bit_weight * mean over quantizers of noise(b)
        s.t. costs of the compact model <= limits;  counts aligned, equal in each tie, no family emptied;  b in [b_l, b_u]

        damage   = -S log(1 - R / S)                       S = sum of a family's scores, R = of its removed groups
        noise(b) = q_m^(2t) / (12 levels(b)^2 E[x^2])      error of rounding relative to what is rounded; levels = q_m^t / d(b)

    Scores say what one group is worth while the others are there, so damage is R as long as little is gone. With half of the family
    removed, each group left does twice the work: dR counts as dR S / (S - R). (The plain sum of scores left one channel of 64 where
    these were dear, and nothing else could make up for it.)
    A whole residual branch is worth its score times the rows that make it, or what all groups inside it are worth if that is more. Its
    damage is that of its worth R in its set (`geta.graph.families.layer_units`), of which the branch worth most always stays. Branches
    that go together (`uniform=True`) are one, worth their sum.
    Of an activation, which is not at hand, E[x^2] counts as (q_m^t / 3)^2. Within a family the lowest scores are removed.

    budget, graph: as given to the optimizer. index, selector: its groups. quantizers: of the bank, with their final bounds `bits`.

    Raises ConfigError when even the smallest network that these settings allow is above a limit.
    """

    def __init__(
        self, budget: Budget, graph: Graph, index: GroupIndex, selector: Selector, *, quantizers: Sequence[Quantizer], bits: Sequence[Bits]
    ) -> None:
        if not isinstance(graph, DependencyGraph):
            raise ConfigError(f"target=Budget(...) needs the graph that geta.analyze returns, not a {type(graph).__name__}")
        self.budget = budget
        self.model = budget.model_of(graph)
        self.limits = budget.limits(self.model.dense)
        self.plan: Plan | None = None
        self._network = graph.model
        self._index, self._options, self._quantizers, self._bits = index, selector.options, list(quantizers), list(bits)
        numbers = {name: number for number, name in enumerate(self.model.families)}
        self._family = [numbers[family.name] for family in index.families]
        self._ties = sorted(selector.ties)
        self._by_tie = self.model.with_families([[self._family[family] for family in tie] for tie in self._ties])
        self._place = {name: number for number, name in enumerate(self.model.quantizers)}
        self._units = {min(unit): list(unit) for together in selector.units for unit in together}
        self._layers = [[min(unit) for unit in together] for together in selector.units]
        self._inside = self._groups_inside()
        self._cheapest = self._cheapest_to_keep()
        self._check_feasible(selector.largest)

    def make(self, scores_G: np.ndarray) -> Plan:
        """Plan from the scores of all groups and the weights as they are now."""
        noise = [self._noise(place) for place in range(len(self._quantizers))]
        coordinates = self._coordinates(scores_G, noise, self._dearest(scores_G))
        if not self._within(coordinates):
            coordinates = self._coordinates(scores_G, noise, self._cheapest)
        chosen = solve(self._by_tie, coordinates, self.limits)
        removed, bits = [0] * len(self._family), [bounds.upper for bounds in self._bits]
        positions = iter(chosen)
        for one, tie in zip(coordinates, self._ties, strict=False):
            count = int(one.values[next(positions)])
            for family in tie:
                removed[family] = count
        for place in self._modelled():
            bits[place] = self._bits[place].widths[-1 - next(positions)]
        plan = Plan(tuple(removed), tuple(bits))
        reached = self.costs(plan.removed, plan.bits)
        assert all(reached[kind] <= limit for kind, limit in self.limits.items()), (reached, self.limits)
        return plan

    def follow(self, index: GroupIndex) -> None:
        """Take the same groups in the tensors that the model has now, so that those it had can go."""
        self._index = index

    def costs(self, removed: Sequence[int] | np.ndarray, bits: Sequence[float]) -> dict[str, float]:
        """Costs of the compact model for counts [F] of the index's families and bits [L] of the bank."""
        counts, widths = np.zeros(len(self.model.families), dtype=np.int64), np.zeros(len(self.model.quantizers))
        counts[self._family] = removed
        for place in self._modelled():
            widths[self._place[self._quantizers[place].name]] = bits[place]
        return self.model.evaluate(counts, widths)

    def check(self, reached: Mapping[str, float]) -> None:
        """Raise GetaError with the numbers when a cost is above its limit; a counted cost has no latency, a planned one has."""
        over = [self._words(kind, reached[kind]) for kind, limit in self.limits.items() if kind in reached and not reached[kind] <= limit]
        if over:
            raise GetaError(f"the budget is missed: {'; '.join(over)}: were parameters or quantizers changed outside the optimizer?")

    def lines(self, reached: Mapping[str, float] | None) -> list[str]:
        """Budget and what was reached, in words, one line per limit."""
        lines = [f"budget of {self._words(kind, None if reached is None else reached[kind])}" for kind in self.limits]
        table = self.budget.latency
        how = [] if table is None else [f"budget: latency is a prediction for {table.words}"]
        return [*lines, *how, *(f"budget: {note}" for note in self.model.notes)]

    def narrowed(self, uppers: Sequence[float], share: float) -> list[float]:
        """Upper bounds [L] on their way from `uppers` to the plan, of which they have gone `share`."""
        assert self.plan is not None
        return [bits + (upper - bits) * (1.0 - share) for upper, bits in zip(uppers, self.plan.bits, strict=True)]

    def state(self) -> dict[str, Tensor]:
        """The plan for a checkpoint; empty tensors when there is none yet."""
        removed, bits = ((), ()) if self.plan is None else (self.plan.removed, self.plan.bits)
        return {"removed": torch.tensor(removed, dtype=torch.int64), "bits": torch.tensor(bits, dtype=torch.int64)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        removed, bits = (tuple(state[key].tolist()) for key in ("removed", "bits"))
        self.plan = Plan(removed, bits) if removed or bits else None

    def _modelled(self) -> list[int]:
        """Quantizers of the bank that the network uses."""
        return [place for place, quantizer in enumerate(self._quantizers) if quantizer.name in self._place]

    def _groups_inside(self) -> dict[int, np.ndarray]:
        """Residual branch -> the groups of which nothing lies outside of it."""
        families, found = self._index.families, {}
        for number in sorted(family for unit in self._units.values() for family in unit):
            own = set(families[number].removes)
            inside = [
                np.arange(start, start + family.size)
                for family, start in zip(families, self._index.starts.tolist(), strict=False)
                if not family.is_layer and all(member.param in own for member in family.members if member.role != "buffer")
            ]
            found[number] = np.concatenate([np.zeros(0, np.int64), *inside])
        return found

    def _worth(self, first: int, scores: np.ndarray) -> float:
        """What the residual branches that go with this one are worth, in scores of groups."""
        total = 0.0
        for family in self._units[first]:
            own = float(scores[self._index.starts[family]]) * self._index.rows_of(family)
            total += max(own, float(scores[self._inside[family]].sum()))
        return total

    def _dearest(self, scores_G: np.ndarray) -> set[int]:
        """Of each set of residual branches that go together those that are worth most: they stay."""
        scores = _scaled(scores_G)
        return {max(together, key=lambda family: self._worth(family, scores)) for together in self._layers}

    def _cheapest_to_keep(self) -> set[int]:
        """Of each set of residual branches the one that leaves most room when it stays and all else goes."""
        nothing, flat = np.zeros(self._index.num_groups), [np.zeros(len(bounds.widths)) for bounds in self._bits]
        kept: set[int] = set()
        for together in self._layers:
            used = [
                max(costs[kind] / limit for kind, limit in self.limits.items())
                for costs in (smallest_costs(self._by_tie, self._coordinates(nothing, flat, kept | {family})) for family in together)
            ]
            kept.add(together[int(np.argmin(used))])
        return kept

    def _within(self, coordinates: Sequence[Coordinate]) -> bool:
        """Whether there is a plan within the limits."""
        smallest = smallest_costs(self._by_tie, coordinates)
        return all(smallest[kind] <= limit for kind, limit in self.limits.items())

    def _coordinates(self, scores_G: np.ndarray, noise: Sequence[np.ndarray], kept: set[int]) -> list[Coordinate]:
        """kept: residual branches that stay, the first of those that go together."""
        scores = _scaled(scores_G)
        worth = {first: self._worth(first, scores) for first in self._units}
        whole = {family: sum(worth[other] for other in together) for together in self._layers for family in together}
        coordinates = []
        for number, tie in enumerate(self._ties):
            options = np.array(self._options[tie[0]], dtype=np.int64)
            if tie[0] in self._units:
                options = options[:1] if tie[0] in kept else options
                lost = _damage(np.array([worth[tie[0]], max(whole[tie[0]] - worth[tie[0]], 0.0)]))[: len(options)]
                coordinates.append(Coordinate(number, False, options, lost))
                continue
            ranked = (np.sort(scores[self._index.starts[family] : self._index.starts[family + 1]]) for family in tie)
            losses = sum(_damage(mine)[options] for mine in ranked)
            coordinates.append(Coordinate(number, False, options, np.asarray(losses)))
        used = self._modelled()
        for place in used:
            bits = np.array(self._bits[place].widths[::-1])
            losses = self.budget.bit_weight * (noise[place] - noise[place].min()) / len(used)
            coordinates.append(Coordinate(self._place[self._quantizers[place].name], True, bits, losses))
        return coordinates

    @torch.no_grad()
    def _noise(self, place: int) -> np.ndarray:
        quantizer, bounds = self._quantizers[place], self._bits[place]
        bits = np.array(bounds.widths[::-1], dtype=np.float64)
        levels = np.exp2(bits - quantizer.signed) - 1.0
        top_sq = float(quantizer.q_m.double().pow(2.0 * quantizer.t.double()).mean())
        power = top_sq / 9.0
        if quantizer.kind == "weight":
            power = float(quantizer(whole(find_tensor(self._network, quantizer.name))).double().square().mean())
        return top_sq / (12.0 * levels**2 * power) if power > 0 else np.zeros_like(levels)

    def _check_feasible(self, multiple_of: int) -> None:
        groups = np.zeros(self._index.num_groups)
        flat = [np.zeros(len(bounds.widths)) for bounds in self._bits]
        smallest = smallest_costs(self._by_tie, self._coordinates(groups, flat, self._cheapest))
        missed = [kind for kind, limit in self.limits.items() if not smallest[kind] <= limit]
        if not missed:
            return
        words = "; ".join(
            f"{kind}: at most {_amount(kind, self.limits[kind])} {_UNITS[kind]} are allowed, but the smallest reachable is "
            f"{_amount(kind, smallest[kind])} ({smallest[kind] / self.model.dense[kind]:.3g} of the {_WHOLE.get(kind, 'dense')} network)"
            for kind in missed
        )
        causes = ["raise the budget", "let more families be pruned (graph.families says why some can't be)"]
        if multiple_of > 1:
            causes.append(f"use a smaller multiple_of than {multiple_of}")
        if missed == [LATENCY]:  # which doesn't depend on bits
            raise ConfigError(f"the budget can't be met. {words}. What helps: {', '.join(causes)}")
        lowest = f"lower the smallest bit width (now {min(b.lower for b in self._bits)})" if self._bits else "quantize the model"
        causes.append(f"{lowest} or quantize more tensors" if self._bits else f"{lowest} (geta.quantize) and use QASSO")
        raise ConfigError(f"the budget can't be met. {words}. What helps: {', '.join(causes)}")

    def _words(self, kind: str, reached: float | None) -> str:
        dense, limit = self.model.dense[kind], self.limits[kind]
        planned = "nothing planned yet" if reached is None else f"reached {_amount(kind, reached)} ({100 * reached / dense:.4g} %)"
        whole = _WHOLE.get(kind, "dense")
        return f"{_UNITS[kind]}: at most {_amount(kind, limit)} ({100 * limit / dense:.4g} % of {whole}), {planned}"


def _damage(ranked_N: np.ndarray) -> np.ndarray:
    """-S log(1 - R / S) for 0 to N removed groups of a family, lowest scores first; infinite where only groups without a score are left."""
    left = np.concatenate([np.cumsum(ranked_N[::-1])[::-1], [0.0]])
    if not left[0] > 0.0:
        return np.zeros_like(left)
    with np.errstate(divide="ignore"):
        return np.asarray(-left[0] * np.log(left / left[0]))


def _scaled(scores_G: np.ndarray) -> np.ndarray:
    """Scores from 0 that sum up to 1."""
    scores = scores_G - min(0.0, float(scores_G.min(initial=0.0)))
    total = float(scores.sum())
    return scores / total if total > 0 else np.full_like(scores, 1.0 / max(len(scores), 1))


def _amount(kind: str, value: float) -> str:
    return f"{value:.4g}" if kind == LATENCY else f"{value:,.0f}"


def _check_latency(limit: object, table: object) -> None:
    if limit is None and table is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0.0 < limit < float("inf"):
        raise ConfigError(f"Budget(latency_ms={limit!r}): give milliseconds above 0; the latency of a network is no share of anything")
    if not isinstance(table, LatencyTable):
        raise ConfigError(
            f"Budget(latency_ms={limit!r}, latency={table!r}): give the table that predicts it as well, e.g. "
            "latency=geta.measure_layers(graph) or geta.LatencyTable.load(path)"
        )


def costs_by_kind(cost: Cost) -> dict[str, float]:
    """A counted cost by the kinds of `Budget`."""
    return {"macs": cost.macs, "bops": cost.bops, "params": cost.params, "bytes": cost.weight_bytes}


def sparsity_or_budget(sparsity: float | None, target: Budget | None) -> float:
    """The share of groups to remove, 0.5 if nothing is said and 0 with a budget; ConfigError when both are given."""
    if target is None:
        return 0.5 if sparsity is None else sparsity
    if not isinstance(target, Budget):
        raise ConfigError(f"target is {target!r}: give a geta.Budget(...), or sparsity= for a share of the groups")
    if sparsity is not None:
        raise ConfigError(f"both sparsity = {sparsity} and target = {target} are given: the budget decides how many groups go; drop one")
    return 0.0
