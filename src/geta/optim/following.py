"""Ranges of activations that go with the network: what calibration found before training need not hold after it.

A range q_m learns by its gradient, in steps of the quantizers' learning rate. That is for fine adjustments: where a network trains from
scratch, the input of a layer grows a hundredfold while its range moves by a few hundredths, and most of the values end up clipped. So
in each of the first hundred steps, when values grow fastest, and in every eighth step later, each activation quantizer leaves a sample x
of its inputs. Of the range that calibration would find in it, parts of that, and the one that holds all of it, that with the smallest
error is q_new:

    q_m <- q_new,  d <- d (q_new / q_m)^t      where  E(q_m) > 2 E(q_new)  and  E(q_m) > 0.01 mean x^2

    E(q) = mean (x - x_q)^2,  x_q = x clipped to q and rounded

at the same bit width: ranges that fit, and those that were learned to clip a little, stay as they are. (At 2 bits the best range clips
every fifth value, so a rule about clipped values would undo what was learned; the error doesn't.)

Measured: without it a small Llama that trained from scratch had 70 to 90 % of the inputs of its last products clipped, and ended 0.1 bits
per character higher. The numbers above were chosen there, on one seed: with looks at every eighth step alone it ended as without any.

Legend: `A` activation quantizers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from geta import ranks
from geta.quant.ops import Q_M_DOMAIN
from geta.quant.quantizer import Quantizer

FIRST, EVERY = 100, 8
"""So many steps at the start are looked at, and then one of so many."""
_ONE_IN = 1000
"""So many values, and one is beyond a new range: `geta.quantize`'s percentile."""
_SHARED = 128
"""Values that each rank shows the others."""
_PARTS = (1.0, 0.7, 0.5, 0.35)
"""Of few bits the best range clips more: at 2 bits, of normal values, everything beyond half of what calibration finds."""
_WORSE = 2.0
_FELT = 0.01
"""Below this share of the values' power, an error is no reason to change anything: the largest of few values is a matter of chance."""


class RangeFollower:
    """Follows the inputs of those `quantizers` that quantize activations with one range per tensor.

    times: how often each range was set anew, int64 [A], on the quantizers' device.
    """

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        self._followed = [q for q in quantizers if q.kind == "activation" and q.q_m.numel() == 1]
        device = self._followed[0].q_m.device if self._followed else torch.device("cpu")
        self.times = torch.zeros(len(self._followed), dtype=torch.int64, device=device)
        self._watching = False

    def watch(self, step: int) -> None:
        """Let the forward passes of this step leave samples, if it is one of those."""
        wanted = bool(self._followed) and step > 0 and (step < FIRST or step % EVERY == 0)
        if wanted or self._watching:
            for quantizer in self._followed:
                quantizer.sample = torch.zeros(0, device=quantizer.q_m.device) if wanted else None
        self._watching = wanted

    @torch.no_grad()
    def follow_(self) -> bool:
        """If this step was watched, set ranges anew that fit no longer; says whether it was. All ranks do the same, without waiting."""
        if not self._watching:
            return False
        device = self._followed[0].q_m.device
        samples = [torch.zeros(0, device=device) if q.sample is None else q.sample for q in self._followed]
        counts = torch.tensor([len(sample) for sample in samples]).to(device, non_blocking=True)
        signed = torch.tensor([q.signed for q in self._followed]).to(device, non_blocking=True)
        q_m, d, t = (torch.stack([getattr(q, name).detach().reshape(()) for q in self._followed]) for name in ("q_m", "d", "t"))
        x = pad_sequence(samples, batch_first=True).to(q_m.dtype)  # zeros change neither the largest values nor the sum of errors
        usual, largest = _ranges(x.abs(), counts)
        tried = torch.stack([largest, *(usual * part for part in _PARTS)])
        levels = q_m.pow(t) / d
        errors = [_squared_error(x, q, levels, signed) for q in (q_m, *tried)]
        now, *others, power = ranks.total(torch.stack([*errors, x.square().sum(dim=1)]))
        new, place = torch.stack(others).min(dim=0)
        found = tried.gather(0, place[None])[0]
        anew = (now > _WORSE * new) & (now > _FELT * power) & (found > 0)
        self.times += anew.to(self.times.device)
        ratio = torch.where(anew, found / q_m, 1.0)
        for name, factor in (("d", ratio.pow(t)), ("q_m", ratio)):
            parameters = [getattr(q, name) for q in self._followed]
            torch._foreach_mul_(parameters, [one.view_as(p) for one, p in zip(factor, parameters, strict=True)])
        return True

    def load(self, times: Tensor | None) -> None:
        """Go on counting from there; checkpoints of before have no counts."""
        if times is not None and times.shape == self.times.shape:
            self.times = times.to(self.times.device).clone()

    def lines(self) -> list[str]:
        """What happened, in words. Waits for the device."""
        times = self.times.tolist()
        count = sum(time > 0 for time in times)
        if not count:
            return []
        return [f"ranges of {count} of {len(times)} activations were set anew, {sum(times)} times in all: values had outgrown them"]


def _ranges(magnitudes_AN: Tensor, counts_A: Tensor) -> Tensor:
    """What `geta.quantize` would take, the value that a thousandth of all ranks' values exceeds (the largest if that is zero), and the
    largest [2, A]; 0 where nothing was seen. With several ranks exact for up to 128,000 values, a little above for more."""
    beyond, most = counts_A // _ONE_IN, magnitudes_AN.shape[1]
    looked_at = most // _ONE_IN + 1
    if ranks.count() > 1:
        beyond = (ranks.total(counts_A) // _ONE_IN).clamp_max(_SHARED - 1)
        mine = torch.zeros(len(counts_A), _SHARED).to(magnitudes_AN)
        mine[:, : min(most, _SHARED)] = magnitudes_AN.topk(min(most, _SHARED), dim=1).values
        magnitudes_AN, looked_at = ranks.gathered(mine).transpose(0, 1).flatten(1), _SHARED
    elif not most:
        return torch.zeros(2, len(counts_A)).to(magnitudes_AN)
    top = magnitudes_AN.topk(looked_at, dim=1).values
    found = top.gather(1, beyond[:, None])[:, 0]
    return torch.stack([torch.where(found > 0, found, top[:, 0]), top[:, 0]]).clamp_max(Q_M_DOMAIN[1])


def _squared_error(x_AN: Tensor, q_A: Tensor, levels_A: Tensor, signed_A: Tensor) -> Tensor:
    """Sum of squared errors [A] of rounding to so many levels below q and clipping there."""
    q = q_A[:, None]
    step = q / levels_A[:, None]
    clipped = torch.minimum(torch.maximum(x_AN, torch.where(signed_A[:, None], -q, 0.0)), q)
    return (x_AN - torch.round(clipped / step) * step).square().sum(dim=1)
