"""Processes for the zoo, forked from one that has imported the big libraries once: importing them again for each of 400 models
would take longer than the checks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Target = Callable[[Connection, str, int], None]
"""(pipe for the record, name of the model, threads) -> None; a function of a module, run in the forked process."""
_PRELOAD = ["bench.zoo.preload"]


def forked(name: str, *, threads: int, limit: float, target: Target | None = None) -> tuple[int | None, dict[str, Any] | None]:
    """Check one model in a forked process: (exit code, record); no record if it died, no code if it ran out of time.

    target: what the process does; None = the checks of the zoo.
    """
    for variable, value in {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ.setdefault(variable, value)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target or _check, args=(theirs, name, threads))
    process.start()
    theirs.close()
    answer: dict[str, Any] | None = None
    try:
        late = not ours.poll(limit)
        if not late:
            answer = ours.recv()
    except EOFError:
        late = False
    if late:
        process.kill()
    process.join()
    return (None if late else process.exitcode), answer


def _check(pipe: Connection, name: str, threads: int) -> None:
    import torch

    from .catalogue import find
    from .check import check

    torch.set_num_threads(threads)
    pipe.send(check(find(name)))
