"""Several processes that train one network (`torchrun`): who this one is, and what only the first one does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import nn

from geta.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where this process computes, and which of how many it is."""

    device: torch.device
    rank: int = 0
    ranks: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def move(self, tree: Any) -> Any:
        """Batches or inputs of a model on this process's device."""
        return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device, non_blocking=True), tree)

    def outer(self, model: nn.Module) -> nn.Module:
        """What to call in training: the model, in DistributedDataParallel where there are several processes."""
        if self.ranks == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)


@contextmanager
def joined(device: Literal["auto", "cpu", "cuda"], threads: int | None) -> Iterator[Place]:
    """This process's place: alone, or among those that `torchrun` started, which meet here.

    threads: of PyTorch while the block runs. Raises ConfigError when a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda': PyTorch finds no GPU here; write auto or cpu")
    gpu = device != "cpu" and torch.cuda.is_available()
    local, ranks = int(os.environ.get("LOCAL_RANK", "0")), _count(os.environ)
    chosen = torch.device("cuda", local) if gpu else torch.device("cpu")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    ours = ranks > 1 and not dist.is_initialized()
    try:
        if gpu:
            torch.cuda.set_device(chosen)
        if ours:
            dist.init_process_group("nccl" if gpu else "gloo")
        yield Place(chosen, dist.get_rank() if ranks > 1 else 0, ranks)
    finally:
        if ours:
            leave()
        torch.set_num_threads(before)


def leave() -> None:
    """From here on every process is on its own: what is left to do, the first one does."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _count(environment: Mapping[str, str]) -> int:
    return int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1
