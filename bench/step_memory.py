"""Peak memory of training steps, each candidate of `bench.step_overhead` in a process of its own: `python -m bench.step_memory`."""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import step_candidates
from bench.step_nets import TASKS, Task

METHOD = (
    "the largest resident set during three steps in a process of its own, less what that process held before the network was made "
    "(imports, buffers of libraries); the first step of a joint period is among them"
)
_STEPS = 3
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_WHOLE_PAGES = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Freed tensors go back to the system at once; otherwise the resident set shows what was once needed."""


def peaks(task: Task, names: Sequence[str], share: float, threads: int) -> dict[str, int]:
    """Bytes by candidate; empty where the system doesn't tell."""
    if not _CLEAR.exists():
        return {}
    found = {}
    for name in names:
        command = [sys.executable, "-m", "bench.step_memory", task.name, name, "--share", str(share), "--threads", str(threads)]
        done = subprocess.run(  # noqa: S603 - our own module
            command, env={**os.environ, **_WHOLE_PAGES}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"no memory of {task.name}, {name}: {done.stderr.strip()[-2000:]}")
        found[name] = int(done.stdout.split()[-1])
    return found


def status(field: str, text: str) -> int:
    """A field of /proc/self/status in bytes."""
    line = next(line for line in text.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def peak(task: Task, name: str, share: float) -> int:
    """Bytes that the candidate's training takes at most, in this process."""
    small = TASKS["vgg7" if task.convolutional else "bert"]
    for first in ("geta wa, warm-up", name):  # whatever is imported or allocated once
        step_candidates.build(first, small, 0.05)
    _tidy()
    before = status("VmRSS", _STATUS.read_text())
    whole = step_candidates.build(name, task, share, settle=False).whole
    _tidy()
    _CLEAR.write_text("5")  # resets the peak
    for _ in range(_STEPS):
        whole()
    return status("VmHWM", _STATUS.read_text()) - before


def _tidy() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main() -> None:
    """Print the number of bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("name")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(peak(TASKS[options.task], options.name, options.share))


if __name__ == "__main__":
    main()
