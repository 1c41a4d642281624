"""All quantizers of a model as three flat vectors, so that projection and rounding are a few operations whatever their number.

Bit widths and step sizes are related by `geta.quant` (DJPQ's quantizer, arXiv 2007.10463; GETA, arXiv 2502.16638, section 3):

    b = log2(q_m^t / d + 1) + 1        d(b) = q_m^t / (2^(b-1) - 1)        (unsigned: without the "+ 1" and "- 1" on b)

Legend: `L` quantizers (layers), `E` scalars of one parameter over all of them (E > L with per-channel quantizers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from geta.graph.names import find_tensor
from geta.optim.shards import largest_by, largest_magnitude
from geta.optim.stacked import Stacked
from geta.quant.bits import Bits, allowed_widths, nearest
from geta.quant.blocks import Cutting, expanded
from geta.quant.ops import Q_M_DOMAIN, T_DOMAIN, bit_width, step_size
from geta.quant.quantizer import Quantizer

LARGEST_FACTOR = 2.0
"""By which a range may grow or shrink in one step."""


class Steps(NamedTuple):
    """Copies of the parameters of all quantizers, each flat [E]."""

    d: Tensor
    q_m: Tensor
    t: Tensor


class QuantizerBank:
    """Stacked view of `quantizers` (weights and activations alike); bounds are read from each quantizer's `bits`."""

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        self.quantizers = list(quantizers)
        self._d: list[Tensor] = [quantizer.d for quantizer in self.quantizers]
        self._q_m: list[Tensor] = [quantizer.q_m for quantizer in self.quantizers]
        self._t: list[Tensor] = [quantizer.t for quantizer in self.quantizers]
        self._stacks = [Stacked(group) for group in (self._d, self._q_m, self._t)]
        self._free_t = Stacked([quantizer.t for quantizer in self.quantizers if not quantizer.linear])
        self._numels = [parameter.numel() for parameter in self._d]
        self.device = self._d[0].device if self._d else torch.device("cpu")
        layers = torch.arange(len(self._d), device=self.device)
        self.layer_E = layers.repeat_interleave(torch.tensor(self._numels, dtype=torch.int64, device=self.device))
        self.read_settings()

    def read_settings(self) -> None:
        """Read signedness and bounds from the quantizers again (loading a model's state may have changed the former)."""
        self._levels: list[tuple[Tensor, Tensor]] = []
        self._fixed_t = None if self._free_t.tensors or not self._t else self._stacks[2].read()
        self.signed_L = self._host_vector([quantizer.signed for quantizer in self.quantizers], torch.bool)
        self.signed_E = self.signed_L[self.layer_E]
        self.lower_L = self._host_vector([quantizer.bits.lower for quantizer in self.quantizers])
        self.upper_L = self._host_vector([quantizer.bits.upper for quantizer in self.quantizers])
        self._allow([quantizer.bits for quantizer in self.quantizers])

    def fix(self, bits: Sequence[int]) -> None:
        """Let each quantizer's bounds be a single bit width, until `read_settings` restores its range."""
        self.lower_L = self._host_vector(list(bits))
        self.upper_L = self.lower_L.clone()
        self._allow([Bits(width, width) for width in bits])

    def _allow(self, bits: Sequence[Bits]) -> None:
        self._allowed = allowed_widths(bits, self.device)
        gaps = [one.only is not None for one in bits]
        self._gaps_E = self._host_vector(gaps, torch.bool)[self.layer_E] if any(gaps) else None

    def __len__(self) -> int:
        return len(self.quantizers)

    def weights_of(self, model: nn.Module) -> dict[int, int]:
        """{id of a quantized parameter of `model`: position of its quantizer}."""
        return {id(find_tensor(model, q.name)): i for i, q in enumerate(self.quantizers) if q.kind == "weight"}

    def read(self) -> Steps:
        """The current parameters, copied."""
        d, q_m, t = self._stacks
        return Steps(d.read(), q_m.read(), t.read() if self._fixed_t is None else self._fixed_t)

    def of(self, flat_E: Tensor, layer: int) -> Tensor:
        """One quantizer's part of a flat vector, in the parameter's own shape."""
        start = sum(self._numels[:layer])
        return flat_E[start : start + self._numels[layer]].view_as(self._d[layer])

    def spread(self, flat_E: Tensor, layer: int, shape: Sequence[int]) -> Tensor:
        """`of`, as a tensor that broadcasts against the weight, which has this shape."""
        return expanded(self.of(flat_E, layer), shape, self.quantizers[layer].blocks)

    def ranges(self) -> Tensor:
        """q_m, copied [E]."""
        return self._stacks[1].read() if self.quantizers else torch.zeros(0)

    def guard_(self, before_E: Tensor) -> None:
        """Clamp q_m and t into the domain in which values and gradients are finite; in one step q_m at most doubles or halves.

        before_E: q_m before the step. Without the second rule a single steep gradient takes a range of 0.05 to nothing; the norm behind
        the layer then amplifies what is left of it, and the gradients a million times.
        """
        stack = self._stacks[1]
        q_m = torch.minimum(torch.maximum(stack.read(), before_E / LARGEST_FACTOR), before_E * LARGEST_FACTOR)
        stack.write_(q_m.clamp_(*Q_M_DOMAIN))
        self._free_t.clamp_(*T_DOMAIN)

    def constrain_(self, before_E: Tensor, upper_L: Tensor) -> None:
        """`guard_`, then `projected`, stored: what follows a step in which nothing rules the step sizes."""
        d, q_m, _ = self._stacks
        if self._fixed_t is not None:
            levels = self._levels_of(upper_L), self._levels_of(self.lower_L)
            if d.constrain_(q_m, before_E, levels, LARGEST_FACTOR, Q_M_DOMAIN):
                return
        self.guard_(before_E)
        self.write_d_(self.projected(upper_L, self.read()))

    def tighten_(self, weights: Mapping[int, Tensor]) -> None:
        """Shrink each range to the largest magnitude it holds, at the same bit width: q_m <- min(q_m, max|x|), d alike.

        weights: position of a quantizer -> the tensor it quantizes. c(x) doesn't change, since nothing was clipped above max|x|.
        """
        for layer, tensor in weights.items():
            quantizer = self.quantizers[layer]
            q_m, d = quantizer.q_m, quantizer.d
            largest = _largest_of(quantizer, tensor).to(q_m.dtype)
            smaller = torch.where(largest > 0, torch.minimum(q_m, largest), q_m).clamp_min(Q_M_DOMAIN[0])
            d.mul_((smaller / q_m).pow(quantizer.t))
            q_m.copy_(smaller)

    def step_size_of(self, bits_L: Tensor, now: Steps) -> Tensor:
        """d(b) for one bit width per quantizer: [L] -> [E]."""
        if self._fixed_t is None:
            return step_size(bits_L[self.layer_E], now.q_m, now.t, self.signed_E)
        return now.q_m.clamp(*Q_M_DOMAIN) / self._levels_of(bits_L)

    def _levels_of(self, bits_L: Tensor) -> Tensor:
        """q_m / d(b) of linear quantizers: [L] -> [E]; those of the last few tensors are kept."""
        for bits, levels in self._levels:
            if bits is bits_L:
                return levels
        dtype = self._d[0].dtype
        levels = torch.exp2(bits_L[self.layer_E].to(dtype) - self.signed_E.to(dtype)) - 1.0
        self._levels = [*self._levels[-3:], (bits_L, levels)]
        return levels

    def projected(self, upper_L: Tensor, now: Steps) -> Tensor:
        """d after PPSG's partial projection onto `[d(upper), d(b_l)]` [E]; q_m and t stay (GETA, section 5)."""
        low, high = self.step_size_of(upper_L, now), self.step_size_of(self.lower_L, now)
        return torch.minimum(torch.maximum(now.d, low), high)

    def settled(self, now: Steps, left: int) -> Tensor:
        """d of quantizers with gaps between their bit widths on its way to the nearest of them, where it is in `left` steps [E]."""
        if self._gaps_E is None:
            return now.d
        there = self.step_size_of(self.rounded_bits(now), now)
        return torch.where(self._gaps_E, now.d * (there / now.d).pow(1.0 / left), now.d)

    def kept(self, before: Steps, now: Steps) -> Tensor:
        """d that gives the present ranges the bit widths of `before` [E]."""
        if self._fixed_t is None:
            return before.d * now.q_m.pow(now.t) / before.q_m.pow(before.t)
        return before.d * now.q_m / before.q_m

    def write_d_(self, flat_E: Tensor) -> None:
        """Store step sizes."""
        self._stacks[0].write_(flat_E)

    def bit_widths(self, now: Steps | None = None) -> Tensor:
        """Bits of each quantizer [L], of those stored unless `now` is given; the mean over the channels of a per-channel one."""
        now = now or self.read()
        bits_E = bit_width(now.d, now.q_m, now.t, self.signed_E)
        sums = bits_E.new_zeros(len(self)).index_add_(0, self.layer_E, bits_E)
        return sums / bits_E.new_zeros(len(self)).index_add_(0, self.layer_E, torch.ones_like(bits_E))

    def rounded_bits(self, now: Steps | None = None) -> Tensor:
        """The allowed width nearest to each quantizer's bit width [L]."""
        return nearest(self.bit_widths(now), self._allowed)

    def split(
        self, layer: int, rows: tuple[Tensor, Sequence[int], Callable[[Tensor], Tensor]], now: Steps, unit_E: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`x_Q = c + ratio * v` when d is `ratio * unit`: c(x), and v = unit * (round(u) - u) with the current u = c(x) / d.

        rows: x, rows of the layer's weight in the computing type; the shape of the whole weight; what picks the same rows of a tensor
        that broadcasts against it. unit_E: reference step sizes, e.g. d(b_l).
        """
        x, shape, take = rows
        quantizer = self.quantizers[layer]
        d, q_m, t, unit = (take(self.spread(flat, layer, shape)).to(x.dtype) for flat in (*now, unit_E))
        shaped = torch.minimum(torch.maximum(x, -q_m if quantizer.signed else torch.zeros_like(q_m)), q_m)
        if not quantizer.linear:
            shaped = shaped.abs().pow(t).copysign(shaped)
        u = shaped / d
        return shaped, (u.round() - u) * unit

    def _host_vector(self, values: list[int] | list[bool], dtype: torch.dtype | None = None) -> Tensor:
        kind = dtype or (self._d[0].dtype if self._d else torch.float32)
        return torch.tensor(values, dtype=kind, device=self.device)


def _largest_of(quantizer: Quantizer, tensor: Tensor) -> Tensor:
    """The largest magnitude among the entries that share each number of the quantizer's parameters, of the parameters' shape."""
    like = quantizer.q_m.shape
    if quantizer.blocks:
        cut = Cutting.of(tensor.shape, like, quantizer.blocks)
        return largest_by(quantizer.name, tensor, lambda magnitudes: cut.table(cut.rows(magnitudes).amax(1)))
    shared = [dim for dim in range(tensor.dim()) if not like or like[dim] == 1]
    return largest_magnitude(quantizer.name, tensor, shared).reshape(like)
