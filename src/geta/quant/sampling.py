"""A few values of a tensor, spread over all of it, for statistics of activations where looking at all of them would take too long."""

from __future__ import annotations

import torch
from torch import Tensor

_PER_ROW = 256
_JITTER = 7919
"""A prime, so that the places don't follow any dimension of the tensor."""


def is_sampled(x: Tensor) -> bool:
    """Whether a forward pass with this tensor is one of training, rather than a validation or somebody's trace."""
    return type(x) is Tensor and torch.is_grad_enabled() and not torch.compiler.is_exporting()


@torch.no_grad()
def sample_of(x: Tensor) -> Tensor:
    """Up to 256 values of every x[i], one of each of as many equal stretches; float32 or wider, flat. No randomness.

    The same places everywhere in the batch: so micro-batches and ranks together show what the whole batch shows.
    """
    rows = len(x) if x.dim() > 1 else 1
    size = x.numel() // max(rows, 1)
    values = x.detach().reshape(rows, size)
    count = min(size, _PER_ROW)
    place = torch.arange(count, device=x.device)
    within = (place * _JITTER) % max(size // max(count, 1), 1)
    return values[:, (place * size) // max(count, 1) + within].flatten().to(torch.promote_types(x.dtype, torch.float32))
