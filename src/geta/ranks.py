"""Training on several processes: what their ranks have to agree on.

Each function is the identity (or does nothing) unless `torch.distributed` is initialised with more than one rank; then it is a
collective operation, so that every rank of the default process group has to take part, in the same order.

What data shows differs between ranks and is summed or averaged here. What follows from parameters and gradients is the same on
all ranks up to the order in which a device adds numbers; rank 0's result counts, so that close decisions can't come out differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geta.errors import GetaError


def count() -> int:
    """How many ranks train together; 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of `tensor` over the ranks (of `group`); `tensor` itself isn't changed."""
    return tensor if count() == 1 else _everywhere(tensor, lambda moved: dist.all_reduce(moved, dist.ReduceOp.SUM, group=group), group)


def largest(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The elementwise maximum of `tensor` over the ranks (of `group`)."""
    return tensor if count() == 1 else _everywhere(tensor, lambda moved: dist.all_reduce(moved, dist.ReduceOp.MAX, group=group), group)


def mean(tensor: Tensor) -> Tensor:
    """The mean of a floating-point `tensor` over the ranks."""
    return total(tensor) / count()


def of_first(tensor: Tensor) -> Tensor:
    """Rank 0's `tensor`; all ranks must bring the same shape and type."""
    return tensor if count() == 1 else _everywhere(tensor, lambda moved: dist.broadcast(moved, src=0))


def gathered(tensor: Tensor) -> Tensor:
    """Every rank's `tensor`, stacked along a new first dimension; all must bring the same shape and type."""
    places = torch.zeros(count(), *tensor.shape, dtype=tensor.dtype, device=tensor.device)
    places[dist.get_rank() if count() > 1 else 0] = tensor.detach()
    return total(places)


def share_gradients_(parameters: Sequence[Tensor]) -> None:
    """Replace the gradients of replicated parameters by their mean over the ranks, in one operation.

    A rank without a gradient counts as zero; where no rank has one, there is none afterwards.
    """
    if count() == 1 or not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    here = [p.grad is not None for p in parameters]
    flat = torch.cat([gradient.detach().reshape(-1).to(torch.float64) for gradient in gradients])
    present = torch.tensor(here, dtype=torch.float64).to(flat.device, non_blocking=True)
    flat, seen = total(torch.cat([flat / count(), present])).split([flat.numel(), len(parameters)])
    anywhere = here if all(here) else seen.tolist()  # waits for the device only where something is missing
    parts = torch.split(flat, [p.numel() for p in parameters])
    for parameter, part, seen_somewhere in zip(parameters, parts, anywhere, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype) if seen_somewhere else None


def require_same(decided: Iterable[bytes], what: str, device: torch.device) -> None:
    """Raise GetaError on every rank, naming those that differ from rank 0, unless `decided` is the same on all of them."""
    if count() == 1:
        return
    digest = hashlib.blake2b(digest_size=7)  # fits into a signed 64-bit integer
    for part in decided:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    found = gathered(torch.tensor(int.from_bytes(digest.digest(), "little"), device=device)).tolist()
    other = [rank for rank, value in enumerate(found) if value != found[0]]
    if other:
        raise GetaError(
            f"rank{'s' if len(other) > 1 else ''} {', '.join(map(str, other))} decided otherwise than rank 0 about {what}: all ranks "
            f"need the same settings, equal parameters at the start (DistributedDataParallel sees to that) and reduced gradients"
        )


def _everywhere(tensor: Tensor, operation: Callable[[Tensor], Any], group: dist.ProcessGroup | None = None) -> Tensor:
    """The result of a collective operation on a copy, which is where the backend can reach it."""
    reachable = tensor.detach().clone()
    if reachable.dtype == torch.bool:
        reachable = reachable.to(torch.uint8)
    if reachable.device.type == "cpu" and dist.get_backend(group) == "nccl":
        reachable = reachable.to("cuda")
    reachable = reachable.contiguous()
    operation(reachable)
    return reachable.to(tensor.device, tensor.dtype)
