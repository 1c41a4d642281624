"""Tensors laid out in memory at random."""

from __future__ import annotations

import random

import torch
from torch import Tensor


def laid_out(rng: random.Random) -> Tensor:
    """A tensor of 1 to 5 dimensions: contiguous, permuted, sliced, expanded or with sizes of one."""
    sizes = [rng.choice((2, 3, 4))] + [rng.choice((1, 2, 3, 4, 6)) for _ in range(rng.randint(0, 4))]
    x = torch.randn(sizes, dtype=rng.choice((torch.float32, torch.float64)))
    for _ in range(rng.randint(0, 2)):
        kind = rng.choice(("permute", "slice", "expand", "select", "channels"))
        if kind == "permute" and x.dim() > 2:
            x = x.permute(0, *rng.sample(range(1, x.dim()), x.dim() - 1))
        elif kind == "slice":
            dim = rng.randrange(x.dim())
            x = x.narrow(dim, x.shape[dim] // 3, max(1, x.shape[dim] - x.shape[dim] // 3))
        elif kind == "expand" and x.dim() > 1:
            x = x.unsqueeze(1).expand(x.shape[0], rng.randint(1, 3), *x.shape[1:])
        elif kind == "select" and x.dim() > 2:
            x = x.select(rng.randrange(1, x.dim()), 0)
        elif kind == "channels" and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
    return x
