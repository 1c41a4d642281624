"""The files of a report: one name with several suffixes, each written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from geta.errors import GetaError
from geta.report.files import prepare_folder, write_atomically


def write_together(target: Path, contents: Mapping[str, str]) -> list[Path]:
    """Write texts as `target` with each suffix; returns the paths. Raises GetaError when the folder can't be written."""
    paths = [target.with_suffix(suffix) for suffix in contents]
    try:
        prepare_folder(target.parent)
        for path, text in zip(paths, contents.values(), strict=True):
            write_atomically(path, text.encode())
    except OSError as error:
        raise GetaError(
            f"the report can't be written to '{target.parent}': {error.strerror or error}; choose another place with --out"
        ) from error
    return paths
