"""A folder on a disk without space, for tests of what is left when a write fails.

As root it is a tmpfs of 64 KiB with all of it taken. Where none can be mounted, files of this process may not grow (RLIMIT_FSIZE): the
system refuses the same writes, with "File too large" in place of "No space left on device".
"""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REFUSALS = ("No space left on device", "File too large")
_SIZE, _PAGE = 1 << 16, 4096


@contextmanager
def full_disk(folder: Path, old: dict[str, bytes], *, free_pages: int = 0) -> Iterator[None]:
    """`folder` with these files and no space beside `free_pages` pages of 4 KiB, for as long as the block runs."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        with _files_that_cannot_grow(folder, old, free_pages * _PAGE):
            yield
        return
    try:
        for name, content in old.items():
            (folder / name).write_bytes(content)
        with open(folder / "filler", "wb", buffering=0) as filler:
            taken = 0
            try:
                while filler.write(bytes(_PAGE)):
                    taken += 1
            except OSError:
                filler.truncate((taken - free_pages) * _PAGE)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # noqa: S607 - where it lies differs


@contextmanager
def _files_that_cannot_grow(folder: Path, old: dict[str, bytes], most: int) -> Iterator[None]:
    for name, content in old.items():
        (folder / name).write_bytes(content)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
