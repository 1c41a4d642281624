"""Parameters that `torch.distributed.fsdp.fully_shard` has spread over the ranks: which part of a tensor lies here.

A sharded parameter is a DTensor, cut along one dimension into equal chunks (the last ones may be shorter, or empty). Optimizers work
on the chunk that is here, in place, and add up sums over the ranks that hold the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geta import ranks
from geta.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """The indices `start .. start + size - 1` of dimension `dim` are here; `whole` is how many there are in all.

    group: the ranks that hold the parts.
    """

    dim: int
    start: int
    size: int
    whole: int
    group: Any

    def of(self, tensor: Tensor) -> Tensor:
        """The same part of a tensor that isn't sharded, such as per-channel step sizes; itself where it doesn't vary along `dim`."""
        return tensor.narrow(self.dim, self.start, self.size) if tensor.dim() > self.dim and tensor.shape[self.dim] != 1 else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; torch's module for them is loaded only where one was made."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What of the tensor lies on this rank, sharing its memory; any tensor that isn't sharded, itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        here: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return here


def whole(tensor: Tensor) -> Tensor:
    """All of the tensor, on every rank (a collective operation for sharded ones)."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        complete: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return complete


def largest_magnitude(name: str, tensor: Tensor, dims: list[int]) -> Tensor:
    """max |x| over `dims`, which stay with size 1; the same on every rank (a collective operation for sharded tensors)."""
    part, here = part_of(name, tensor), local(tensor).detach().abs()
    if part is None:
        return here.amax(dim=dims, keepdim=True)
    others = [dim for dim in dims if dim != part.dim]
    rows = here.amax(dim=others, keepdim=True) if others else here  # first, so that nothing as large as the whole tensor is made
    padded = _padded(rows, part)
    return ranks.largest(padded.amax(dim=part.dim, keepdim=True) if part.dim in dims else padded, part.group)


def largest_by(name: str, tensor: Tensor, largest: Callable[[Tensor], Tensor]) -> Tensor:
    """`largest(|x|)`, some maxima over x; the same on every rank (a collective operation for sharded tensors)."""
    part, here = part_of(name, tensor), local(tensor).detach().abs()
    return largest(here) if part is None else ranks.largest(largest(_padded(here, part)).contiguous(), part.group)


def _padded(here: Tensor, part: Part) -> Tensor:
    """As long as the whole along the sharded dimension, zeros where other ranks have entries."""
    padded = here.new_zeros(*here.shape[: part.dim], part.whole, *here.shape[part.dim + 1 :])
    padded.narrow(part.dim, part.start, part.size).copy_(here)
    return padded


def part_of(name: str, tensor: Tensor) -> Part | None:
    """Which part of a tensor is here; None = all of it.

    Raises ConfigError for a tensor that is sharded in more than one way, or not in equal chunks.
    """
    if not is_sharded(tensor):
        return None
    placements, mesh = tensor.placements, tensor.device_mesh  # type: ignore[attr-defined]
    cut = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    if not cut:
        return None
    axis = cut[0]
    if len(cut) == 1 and type(placements[axis]).__name__ == "Shard":
        dim: int = placements[axis].dim
        whole_size = tensor.shape[dim]
        chunk = -(-whole_size // mesh.size(axis))
        start = min(mesh.get_local_rank(axis) * chunk, whole_size)
        size = min(chunk, whole_size - start)
        if local(tensor).shape[dim] == size:
            return Part(dim, start, size, whole_size, mesh.get_group(axis))
    raise ConfigError(
        f"parameter '{name}' is sharded as {tuple(placements)} over {mesh}: only a single Shard(dim) in equal chunks, as fully_shard "
        f"makes it, can be pruned; use fully_shard alone, or DistributedDataParallel"
    )


def common_group(parts: Iterable[Part | None]) -> Any:
    """The ranks that hold the parts, None when nothing is sharded. Raises ConfigError when tensors are sharded over different ranks."""
    found = None
    for part in parts:
        if part is not None and found is not None and part.group != found:
            raise ConfigError("the parameters are sharded over different groups of ranks: call fully_shard with the same mesh everywhere")
        found = found if part is None else part.group
    return found


def is_first(group: Any) -> bool:
    """Whether this rank is the first of `group`: the one that counts what every rank has."""
    return bool(dist.get_rank(group) == 0)


def reshard(model: nn.Module) -> None:
    """Let the parameters of a model be sharded again, should a forward pass without a backward one have left them whole."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()
