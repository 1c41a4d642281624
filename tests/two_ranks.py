"""Run a function on two processes that train together (gloo, CPU)."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def _enter(rank: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    try:
        torch.save(function(rank, *arguments), folder / f"result{rank}.pt")
        if dist.is_initialized():  # a function may leave the group for good
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fork_server() -> BaseContext:
    """Processes that start with the libraries loaded, forked from one that has never run anything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch", "torch.distributed.fsdp", "geta.optim", "geta.graph", "geta.report.files"])
    return context


def on_two_ranks(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on both ranks; what each returned, read back as tensors and plain data.

    The function must be importable by name. An error on either rank is raised here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    fork_server()
    torch.multiprocessing.start_processes(_enter, (function, folder, arguments), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(2)]
