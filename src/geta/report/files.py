"""Files of a run: written whole or not at all, into a folder that was tried before any work began."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geta.errors import GetaError


def prepare_folder(folder: Path, option: str = "--out") -> None:
    """Create `folder` and prove that files can be written there, before hours of training depend on it.

    option: what the user chose the folder with, for the message.
    Raises GetaError that names the folder and the system's reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"geta")
    except OSError as error:
        raise GetaError(
            f"the output folder '{folder}' can't be written ({error.strerror or error}); nothing was started: choose another with {option}"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that the file is either the old one or the whole new one, never a part of it.

    Raises OSError when the system refuses; its `filename` is `path`.
    """
    try:
        _replace(path, content)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # the system names the temporary file, or none
        raise


def _replace(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as readable JSON, atomically; refuses NaN and infinities, which JSON has no word for."""
    write_atomically(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def folder_bytes(folder: Path) -> int:
    """Add up the sizes of all files under `folder`, in bytes."""
    return sum(path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
