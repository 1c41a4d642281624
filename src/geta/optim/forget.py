"""How fast redundant groups are forgotten, and with which step size: the joint stage's rule in closed form.

A redundant part R moves by `x_R <- x_R + delta_R - gamma * [x_Q]_R`. With `a = -delta_R` (the proposed descent), the split
`x_Q = c + d r` (`c` = clipped, shaped value, `r = sgn(x) (round(u) - u)`) and cosines taken with `a` on R:

    gamma = 0                                       if mean|c| <= eps
          = 1 / (K_p - k)                           if cos_gamma >= 0            (uniform forgetting)
          = -(1 - eta) ||a|| / (cos_gamma ||c||)    otherwise, at most 1
    d     = d(b_l)                                  if cos_d >= 0 or gamma = 0
          = -xi eta ||a|| / (gamma cos_d ||r||)     otherwise, at most d(b_l)
    while d < d(b_u):  gamma <- beta gamma,  d <- d / beta

so that the whole direction descends: <a, a + gamma (c + d r)> >= eta (1 - xi) ||a||^2. The loop is one power of beta:
`n = ceil(log_{1/beta}(d(b_u) / d))`, gamma beta^n, d beta^-n.

gamma belongs to a family and d to a layer; a layer whose R is owned by several families meets `sum_f gamma_f <a, d r>_f >=
-xi eta ||a||^2`, and a family takes the largest n of its layers. d is handled as `ratio = d / d(b_l)` in [d(b_u)/d(b_l), 1],
which is the same number for all channels of a per-channel quantizer.

Source: GETA (arXiv 2502.16638) section 5 (joint stage, forget rate and step size). The mean is of absolute values.
Deviation: gamma never exceeds 1 (beyond it x would change sign), and "uniform", "cosine" and "blend" are offered beside the
paper's "descent": with the latter alone nearly all of R's norm is cut at once in the period's last step. Measured on a small
residual net (digits, AdamW, late periods), training loss just before and after that step: descent 0.06 to 0.88 and 0.10 to 1.07,
uniform 0.21 to 0.28 and 0.85 to 1.75, cosine 0.20 to 0.20 and 0.89 to 0.89. Hence the default "blend" = descent, at least cosine.
Deviation: except with "descent", d gets to what its rule says along the period, not in its first step (`step_share`). The rule sends
most layers that own redundant groups to b_l, and all of them at once cost a ResNet-20 on digits 17 points in one epoch (bits 4-8).
Where all of a layer's redundant rows wait for the last step, so that the rule says b_l throughout, the base optimizer doesn't move d
meanwhile. Seen once in a VGG7 on digits: half a bit that it had added during a period went within the last steps, while accuracy with
running statistics fell by 25 points for half an epoch. That the one caused the other was not isolated.
Deviation: except with "descent", rows that a batch normalization scales (`geta.graph.gates`) don't move on the way: gamma and beta of
the normalization do, and the rows are zero in the period's last step, when nothing depends on them. Shrunk along, they left running
variances up to five times too large behind, and a ResNet-20 on digits fell to 56 % in evaluation mode for half an epoch while its training
loss stayed near 0.1 and with running statistics made anew it had 97 %. What remains are running statistics some ten steps behind the
network, which at a large learning rate cost a dense network accuracy too; a faster momentum cures that (`bench.joint_stage`).

Legend: `F` families, `L` quantized layers, `N` pairs (parameter, family).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from geta.errors import ConfigError

Forgetting = Literal["descent", "uniform", "cosine", "blend"]

ETA, XI, BETA, EPS = 0.999, 0.9, 0.8, 1e-8


@dataclass(frozen=True)
class PairSums:
    """Sums over the redundant elements of each pair, all [N].

    step_sq: sum a^2. step_shaped: <a, c>. shaped_abs: sum |c|. step_residual: <a, d(b_l) r>, 0 where nothing is quantized.
    count: number of elements.
    """

    step_sq: Tensor
    step_shaped: Tensor
    shaped_abs: Tensor
    step_residual: Tensor
    count: Tensor


@dataclass(frozen=True)
class PairMap:
    """Which family [N] and which layer [N] a pair belongs to (layer = L: not quantized), and how many there are."""

    family: Tensor
    layer: Tensor
    families: int
    layers: int

    def per_family(self, values_N: Tensor) -> Tensor:
        """Sum over the pairs of each family [F]."""
        return values_N.new_zeros(self.families).index_add_(0, self.family, values_N)

    def per_layer(self, values_N: Tensor) -> Tensor:
        """Sum over the pairs of each layer [L]."""
        return values_N.new_zeros(self.layers + 1).index_add_(0, self.layer, values_N)[: self.layers]


def check_forgetting(name: str) -> Forgetting:
    """Return `name` if it is a known rule, else raise ConfigError."""
    known: tuple[Forgetting, ...] = get_args(Forgetting)
    for rule in known:
        if name == rule:
            return rule
    raise ConfigError(f"forgetting is {name!r}: it must be one of {', '.join(known)}")


def path_rate(rule: Forgetting, k: int, length: int) -> float:
    """The rate gamma of step `k` of `length` that a fixed path to zero needs; 0 for "descent".

        uniform         1 / (K_p - k)                            the norm falls along a straight line
        cosine, blend   1 - r(k + 1) / r(k)                      r(j) = (1 + cos(pi j / K_p)) / 2

    Every path ends with rate 1 in the period's last step.
    """
    if rule == "descent":
        return 0.0
    if k == length - 1:
        return 1.0
    if rule == "uniform":
        return 1.0 / (length - k)
    return 1.0 - (1.0 + math.cos(math.pi * (k + 1) / length)) / (1.0 + math.cos(math.pi * k / length))


def step_share(rule: Forgetting, k: int, length: int) -> float:
    """How far d goes in step `k` of `length` from where it is to what its rule says, as a share of the way in bits (in log d).

    1 for "descent", which is at the rule's value in every step; else 1 / (K_p - k), which is there in the period's last step.
    """
    return 1.0 if rule == "descent" else 1.0 / (length - k)


def descent_rate(sums: PairSums, pairs: PairMap, k: int, length: int) -> Tensor:
    """gamma per family [F] before the step size is looked at: the first rule of the module's page."""
    step_sq, inner = pairs.per_family(sums.step_sq), pairs.per_family(sums.step_shaped)
    opposed = inner < 0
    rate = torch.where(opposed, (1.0 - ETA) * step_sq / torch.where(opposed, -inner, 1.0), 1.0 / (length - k))
    mean = pairs.per_family(sums.shaped_abs) / pairs.per_family(sums.count).clamp(min=1.0)
    return torch.where(mean > EPS, rate.clamp(max=1.0), 0.0)


def step_ratio(sums: PairSums, pairs: PairMap, gamma_F: Tensor) -> Tensor:
    """d / d(b_l) per layer [L], at most 1: the second rule of the module's page, before the loop."""
    inner = pairs.per_layer(gamma_F[pairs.family] * sums.step_residual)
    opposed = inner < 0
    ratio = XI * ETA * pairs.per_layer(sums.step_sq) / torch.where(opposed, -inner, 1.0)
    return torch.where(opposed, ratio, 1.0).clamp(min=torch.finfo(ratio.dtype).tiny, max=1.0)


def settle(ratio_L: Tensor, smallest_L: Tensor, gamma_F: Tensor, active_N: Tensor, pairs: PairMap) -> tuple[Tensor, Tensor]:
    """The `while` in closed form: (gamma [F], ratio [L]) with every ratio at least `smallest` = d(b_u) / d(b_l).

    active_N: which pairs hold redundant elements; only those slow their family down.
    """
    power_L = torch.ceil(torch.log(smallest_L / ratio_L) / -math.log(BETA)).clamp(min=0.0)
    power_N = torch.cat([power_L, power_L.new_zeros(1)])[pairs.layer] * active_N
    power_F = power_N.new_zeros(pairs.families).scatter_reduce_(0, pairs.family, power_N, "amax")
    return gamma_F * BETA**power_F, (ratio_L * BETA**-power_L).clamp(max=1.0)


def forget(rule: Forgetting, sums: PairSums, pairs: PairMap, smallest_L: Tensor, position: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """gamma per family [F] and d / d(b_l) per layer [L] for step `k` of a period of `length` steps, `position = (k, length)`.

    "descent": the rule of the module's page. "uniform", "cosine": gamma from the path alone, d from the rule.
    "blend": the rule, but gamma never below what the cosine path needs.
    """
    k, length = position
    floor = path_rate(rule, k, length)
    gamma = torch.full_like(pairs.per_family(sums.count), floor)
    if rule in ("descent", "blend"):
        gamma = torch.maximum(descent_rate(sums, pairs, k, length), gamma)
    ratio = step_ratio(sums, pairs, gamma)
    settled, ratio = settle(ratio, smallest_L, gamma, sums.count > 0, pairs)
    if rule == "descent":
        return settled, ratio
    return settled.clamp(min=floor), ratio
