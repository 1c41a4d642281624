"""The pruning half of QASSO's joint stage: marks redundant groups, forgets them, keeps removed ones at zero.

Legend: `G` groups, `R` rows, `F` families, `L` quantized weights, `N` pairs (parameter, family).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from geta import ranks
from geta.errors import ConfigError
from geta.optim.bank import QuantizerBank, Steps
from geta.optim.forget import Forgetting, PairMap, PairSums, forget
from geta.optim.groups import GroupedTensor, GroupIndex, exclusive_row_sums
from geta.optim.observe import Observation
from geta.optim.rehearsal import can_rehearse, chunks, rehearsed
from geta.optim.rows import Chosen, RedundantRows, RemovedRows, covered, forgettable
from geta.optim.saliency import RowStatistics, Saliency, group_statistics
from geta.optim.selection import Selector

_ROWS = -1
"""Where in a snapshot the rows are that the compiled kernels forget; parameters have their positions."""


@dataclass(frozen=True)
class _Active:
    """A parameter that holds redundant elements in this period.

    With one zeroed dimension (the usual case) only its redundant rows are looked at; everything below is about these.

    position: in `index.parameters`. layer: its quantizer in the bank, or -1. rows: the redundant rows of the single zeroed
    dimension, or None = all. flags: redundant rows per zeroed dimension. families, pairs: family id and pair of each row per
    zeroed dimension (F, N where none). mask: redundant elements of the whole tensor, broadcasting.
    """

    position: int
    layer: int
    entry: GroupedTensor
    rows: Tensor | None
    flags: list[Tensor]
    families: list[Tensor]
    pairs: list[Tensor]
    mask: Tensor

    def take(self, tensor: Tensor) -> Tensor:
        """The rows looked at, of the parameter or of anything that broadcasts against it; may be `tensor` itself."""
        dim = self.entry.dims[0]
        if self.rows is None or tensor.dim() != self.entry.tensor.dim() or tensor.shape[dim] == 1 != self.entry.tensor.shape[dim]:
            return tensor
        return tensor.index_select(dim, self.rows)

    def take_setting(self, tensor: Tensor) -> Tensor:
        """The same of a quantizer's parameter, which broadcasts against the whole parameter and is not sharded with it."""
        return self.take(self.entry.part_of(tensor))

    def ones(self, dtype: torch.dtype) -> Tensor:
        """As many ones as elements are looked at, without their memory."""
        shape = list(self.entry.tensor.shape)
        if self.rows is not None:
            shape[self.entry.dims[0]] = len(self.rows)
        return torch.ones((), dtype=dtype, device=self.entry.tensor.device).expand(shape)


class Pruner:
    """Drives exactly `selector.target` groups of `index` to zero.

    bank:        the quantizers, whose weights are forgotten through their quantized value.
    layers:      id of a quantized parameter -> its position in the bank.
    forgetting:  the rule of `geta.optim.forget`.
    observation: what the saliency's criteria observe over time; None = nothing.
    redundant, pruned: bool [G] on the host; redundant groups are on their way to zero, pruned ones are there.
    owner_L, waiting_L: quantized layers that hold redundant elements, and those of them in which all wait for the last step.
    """

    def __init__(
        self,
        index: GroupIndex,
        selector: Selector,
        *,
        saliency: Saliency,
        bank: QuantizerBank,
        layers: Mapping[int, int],
        forgetting: Forgetting,
        observation: Observation | None = None,
    ) -> None:
        self.index, self.selector, self.saliency, self.bank, self.forgetting = index, selector, saliency, bank, forgetting
        self.observation = observation or Observation({})
        self.redundant = np.zeros(index.num_groups, dtype=bool)
        self.pruned = np.zeros(index.num_groups, dtype=bool)
        self._layers = [layers.get(id(entry.stored), -1) for entry in index.parameters]
        layer_of_pair = [self._layers[parameter] for parameter in index.pair_parameter]
        layer_N = torch.tensor([layer if layer >= 0 else len(bank) for layer in layer_of_pair], dtype=torch.int64, device=index.device)
        self._pairs = PairMap(index.pair_family_N, layer_N, len(index.families), len(bank))
        # the published rule moves every row of a redundant group
        self._gated = frozenset() if forgetting == "descent" else frozenset().union(*(family.gated for family in index.families))
        self._zeroed: list[tuple[GroupedTensor, Tensor]] = []
        self._removed: RemovedRows | None = None
        self._active: list[_Active] = []
        self._slow = self._active
        self._fast: RedundantRows | None = None
        self._fast_positions: list[int] = []
        self._pairs_of_rows = torch.zeros(0, dtype=torch.int64, device=index.device)
        self._count_N = torch.zeros(index.num_pairs, device=index.device)
        self.owner_L = torch.zeros(len(bank), dtype=torch.bool, device=index.device)
        self.waiting_L = torch.zeros_like(self.owner_L)

    def snapshot(self, *, everything: bool) -> dict[int, Tensor]:
        """Copies of what the coming step needs: all grouped parameters to score, else the rows being forgotten."""
        if everything:
            return {position: entry.tensor.detach().clone() for position, entry in enumerate(self.index.parameters)}
        copies = {active.position: _copied(active, active.entry.tensor.detach()) for active in self._slow}
        return copies if self._fast is None else {**copies, _ROWS: self._fast.copied()}

    def scores(self, before: Mapping[int, Tensor]) -> Tensor:
        """Score of every group [G] from the step that the base optimizer has just proposed, the same on all ranks; waits for nothing.

        before: `snapshot(everything=True)`.
        """
        old = [before[position] for position in range(len(self.index.parameters))]
        new = [entry.tensor.detach() for entry in self.index.parameters]
        return ranks.of_first(self.saliency.score(group_statistics(self.index, old, new, self.observation.read())))

    def can_rehearse(self, base: Optimizer) -> bool:
        """Whether `rehearsed_scores` gives what `scores` would: observers but Fisher's may look at weights after the step."""
        return can_rehearse(base) and set(self.saliency.observers) <= {"fisher"}

    def rehearsed_scores(self, base: Optimizer) -> Tensor:
        """`scores` of the step that `base` would take now, a few parameters at a time, which are what they were afterwards."""
        rows, pruned = RowStatistics(self.index), self.index.flags(self.pruned)
        for entries in chunks(self.index.parameters):
            with rehearsed(base, entries) as before:
                for entry, old in zip(entries, before, strict=True):
                    new = entry.tensor.detach()
                    if self.pruned.any():
                        new.masked_fill_(entry.element_mask(pruned), 0)  # what `enforce_` does after a real step
                    rows.add(entry, old, new)
        return ranks.of_first(self.saliency.score(rows.groups(self.observation.read())))

    def mark(self, scores: Callable[[], Tensor], total: int) -> None:
        """Mark the least important groups as redundant, up to `total` in all. scores: gives all groups' when they are needed."""
        if total > int(self.pruned.sum()):
            self.redundant = self.selector.mark(on_host(scores()), self.pruned, total)
            self.observation.restart()
        self.refresh()

    def part_of(self, everything: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """What `snapshot(everything=False)` would have taken when `snapshot(everything=True)` took this."""
        copies = {active.position: active.take(everything[active.position]) for active in self._slow}
        return copies if self._fast is None else {**copies, _ROWS: self._fast.copied([everything[p] for p in self._fast_positions])}

    def refresh(self) -> None:
        """Derive everything that follows from `redundant` and `pruned`; call after changing either."""
        index, family_count = self.index, len(self.index.families)
        pruned, redundant = index.flags(self.pruned), index.flags(self.redundant)
        self._zeroed = []
        removed = []
        if self.pruned.any():
            for entry in [*index.parameters, *index.buffers]:
                mask = entry.element_mask(pruned)
                if bool(mask.any()):
                    if covered(entry):
                        removed.append((entry, mask.flatten().nonzero().flatten()))
                    else:
                        self._zeroed.append((entry, mask))
        self._removed = RemovedRows(removed) if removed else None
        self._active = self._slow = []
        if self.redundant.any():
            family_of = torch.cat([index.family_of_G, index.family_of_G.new_full((1,), family_count)])
            for position, entry in enumerate(index.parameters):
                flags = entry.row_flags(redundant)
                if any(bool(flag.any()) for flag in flags):
                    families = [family_of[groups.to(index.device)].to(groups.device) for groups in entry.groups]
                    pairs = index.row_pairs[position]
                    rows = None
                    if len(flags) == 1:
                        rows = flags[0].nonzero().flatten()
                        flags, families, pairs = [flags[0][rows]], [families[0][rows]], [pairs[0][rows.to(index.device)]]
                    mask = entry.element_mask(redundant)
                    self._active.append(_Active(position, self._layers[position], entry, rows, flags, families, pairs, mask))
        self._pairs_of_rows = self._pairs_of(self._active)
        self._slow = self._active
        self.owner_L = self._pairs.per_layer(self._elements()) > 0
        self._active = self._slow = [active for active in self._active if active.entry.name not in self._gated]
        self._pairs_of_rows = self._pairs_of(self._active)
        self._count_N = self._elements()
        self.waiting_L = self.owner_L & (self._pairs.per_layer(self._count_N) == 0)
        self._split()

    def _pairs_of(self, chosen: Sequence[_Active]) -> Tensor:
        nothing = torch.zeros(0, dtype=torch.int64, device=self.index.device)
        return torch.cat([nothing, *(pairs for active in chosen for pairs in active.pairs)])

    def _elements(self) -> Tensor:
        """How many redundant elements each pair has [N], of the parameters looked at now."""
        return self._pair_sums([active.ones(self.index.dtype)[None] for active in self._slow], 1)[0]

    def _split(self) -> None:
        """Leave to the compiled kernels what they can do."""
        index = self.index
        fast = [a for a in self._active if index.shards is None and forgettable(a.entry, a.layer, self.bank, index.dtype)]
        self._fast_positions = [active.position for active in fast]
        self._fast = None
        if not fast:
            return
        done = set(self._fast_positions)
        self._slow = [active for active in self._active if active.position not in done]
        self._pairs_of_rows = self._pairs_of(self._slow)
        chosen = [Chosen(a.entry, a.rows, a.families[0], a.pairs[0], a.layer) for a in fast if a.rows is not None]
        self._fast = RedundantRows(chosen, self.bank, index.num_pairs)

    def enforce_(self) -> None:
        """Set every pruned slice to exactly zero, whatever the base optimizer proposed."""
        for entry, mask in self._zeroed:
            entry.tensor.masked_fill_(mask, 0)
        if self._removed is not None:
            self._removed.zero_()

    def forget_(self, before: Mapping[int, Tensor], steps: Steps | None, position: tuple[int, int]) -> Tensor:
        """Apply `x_R <- x_R + delta_R - gamma [x_Q]_R` and return d / d(b_l) per quantizer [L] (meaningful for owners).

        before: parameters before the base optimizer's step, which already added delta. steps: the bank before it.
        position: (k, K_p). In the period's last step R becomes exactly zero, whatever gamma is.
        """
        shaped: list[tuple[Tensor, Tensor | None]] = []
        low_E = None if steps is None else self.bank.step_size_of(self.bank.lower_L, steps)

        def terms() -> Iterator[Tensor]:
            for active in self._slow:
                x = before[active.position].to(self.index.dtype)
                step = x - active.take(active.entry.tensor.detach())
                c, v = x, None
                if active.layer >= 0:
                    assert steps is not None
                    assert low_E is not None
                    rows = (x, active.entry.stored.shape, active.take_setting)
                    c, v = self.bank.split(active.layer, rows, steps, low_E)
                shaped.append((c, v))
                yield self._terms(step, c, v)

        found = self._pair_sums(terms(), 4)
        if self._fast is not None:
            found = found + self._fast.sums(before[_ROWS], steps, low_E)
        step_sq, step_shaped, shaped_abs, step_residual = found.unbind()
        sums = PairSums(step_sq, step_shaped, shaped_abs, step_residual, self._count_N)
        smallest = self._smallest_ratio(sums.count.dtype)
        gamma_F, ratio_L = forget(self.forgetting, sums, self._pairs, smallest, position)
        last = position[0] == position[1] - 1
        for active, (c, v) in zip(self._slow, shaped, strict=True):
            quantized = c if v is None else c + ratio_L[active.layer].to(c.device) * v
            self._move_(active, quantized, gamma_F, last=last)
        if self._fast is not None and last:
            self._fast.zero_()
        elif self._fast is not None:
            self._fast.move_(before[_ROWS], steps, low_E, (gamma_F, ratio_L))
        return ratio_L

    def decay_(self, position: tuple[int, int]) -> None:
        """HESSO's path: `x_R <- x_R (K_p - k - 1) / (K_p - k)` after the base optimizer's step; exactly zero in the last one."""
        k, length = position
        kept = (length - k - 1) / (length - k)
        if self._fast is not None and kept == 0.0:
            self._fast.zero_()
        elif self._fast is not None:
            self._fast.scale_(kept)
        for active in self._slow:
            tensor = active.entry.tensor
            if kept == 0.0:
                tensor.masked_fill_(active.mask, 0)
            elif active.rows is not None:
                tensor.index_copy_(active.entry.dims[0], active.rows, active.take(tensor) * kept)
            else:
                tensor.copy_(torch.where(active.mask, tensor * kept, tensor))

    def finish_period_(self) -> None:
        """The redundant groups are zero now: they are pruned from here on, buffers included."""
        self.pruned = self.pruned | self.redundant
        self.redundant = np.zeros_like(self.redundant)
        self.refresh()
        self.enforce_()

    def _terms(self, step: Tensor, c: Tensor, v: Tensor | None) -> Tensor:
        """The four summands of PairSums [4, *shape]; those that a fixed path doesn't look at stay zero."""
        terms = step.new_zeros(4, *step.shape)
        follows_rule = self.forgetting in ("descent", "blend")
        if follows_rule or v is not None:
            torch.mul(step, step, out=terms[0])
        if follows_rule:
            torch.mul(step, c, out=terms[1])
            torch.abs(c, out=terms[2])
        if v is not None:
            torch.mul(step, v, out=terms[3])
        return terms

    def _pair_sums(self, terms: Iterable[Tensor], kinds: int) -> Tensor:
        """[kinds, N]: sums over redundant elements, every element counted once; `terms` runs parallel to the active parameters.

        They are `kinds` times as large as the parameters, so each is summed before the next is asked for.
        """
        rows = [exclusive_row_sums(active.entry, values, active.flags) for active, values in zip(self._slow, terms, strict=True)]
        counted = [
            part if active.entry.counted else torch.zeros_like(part)
            for active, parts in zip(self._slow, rows, strict=True)
            for part in parts
        ]
        nothing = torch.zeros(kinds, 0, dtype=self.index.dtype, device=self.index.device)
        return self.index.per_pair(self.index.reduce_rows([[nothing, *counted]]), self._pairs_of_rows)

    def _smallest_ratio(self, dtype: torch.dtype) -> Tensor:
        """d(b_u) / d(b_l) per quantizer, from the bounds alone."""
        sign = self.bank.signed_L.to(dtype)
        return (torch.exp2(self.bank.lower_L.to(dtype) - sign) - 1.0) / (torch.exp2(self.bank.upper_L.to(dtype) - sign) - 1.0)

    def _move_(self, active: _Active, quantized: Tensor, gamma_F: Tensor, *, last: bool) -> None:
        tensor = active.entry.tensor
        if last:
            tensor.masked_fill_(active.mask, 0)
            return
        padded = torch.cat([gamma_F, gamma_F.new_zeros(1)]).to(tensor.device)
        rates = [active.entry.along(position, padded[families]) for position, families in enumerate(active.families)]
        if active.rows is not None:
            moved = active.take(tensor) - (rates[0] * quantized).to(tensor.dtype)
            tensor.index_copy_(active.entry.dims[0], active.rows, moved)
            return
        rate = padded.new_zeros(())
        covered = torch.zeros((), dtype=torch.bool, device=tensor.device)
        for position, flags in enumerate(active.flags):
            mine = active.entry.along(position, flags)
            rate = torch.where(mine & ~covered, rates[position], rate)
            covered = covered | mine
        tensor.sub_((rate * quantized).to(tensor.dtype))


def on_host(scores_G: Tensor) -> np.ndarray:
    """Scores as a float64 array; waits for the device. Raises ConfigError when one isn't finite."""
    scores: np.ndarray = scores_G.double().cpu().numpy()
    if not np.isfinite(scores).all():
        raise ConfigError("saliency: a score is not a finite number; check the custom criterion, or the learning rate")
    return scores


def _copied(active: _Active, tensor: Tensor) -> Tensor:
    return tensor.clone() if active.rows is None else active.take(tensor)
