"""The folder of a saved model: written completely or not at all, and read only if every byte is the one that was written."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import secrets
import shutil
import stat
import zlib
from pathlib import Path
from typing import Any

import torch

import geta
from geta.errors import CheckpointError, ConfigError

FORMAT = "geta-compact-model"
VERSION = 2
READABLE = (1, 2)
"""Version 1 had no bundles of small tensors (`geta.export.bundles`), which is all that tells it apart."""
MANIFEST, DOCUMENT, TENSORS = "manifest.json", "model.json.gz", "model.safetensors"
_NAMES = (MANIFEST, DOCUMENT, TENSORS)
_LARGEST_MANIFEST = 1 << 16  # bytes
_LARGEST_DOCUMENT = 1 << 28  # bytes, uncompressed


def write_folder(path: str | Path, document: bytes, tensors: bytes) -> None:
    """Write a model's folder in place of whatever saved model is there; equal contents give equal bytes.

    The files are written beside `path` and the folder is swapped in by renaming: a failure or a crash at any moment leaves
    the old model or the new one, never a mixture. Raises ConfigError when `path` can't be written or holds other files.
    """
    target = Path(path)
    packed = gzip.compress(document, compresslevel=9, mtime=0)
    files = {DOCUMENT: packed, TENSORS: tensors}
    manifest = _manifest(files, len(document))
    try:
        target = target.resolve()
        _check_target(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _swap_in(target, {MANIFEST: manifest, **files})
    except OSError as error:
        raise ConfigError(
            f"the model can't be saved to '{path}': {error.strerror or error}; nothing there was changed. Choose a writable folder"
        ) from error


def read_folder(path: str | Path) -> tuple[bytes, bytes]:
    """Return (document, tensors) of a saved model's folder.

    Raises CheckpointError when a file is missing, too many, truncated, altered, a link, or of an unknown version.
    """
    folder = Path(path)
    contents = {name: _read_file(folder, name) for name in _listed(folder)}
    described = _checked_manifest(folder, contents[MANIFEST])
    for name in (DOCUMENT, TENSORS):
        size, digest = described[name]["bytes"], described[name]["sha256"]
        if len(contents[name]) != size or hashlib.sha256(contents[name]).hexdigest() != digest:
            raise CheckpointError(
                f"'{folder / name}' was truncated or altered: its checksum is not the one in {MANIFEST}; get another copy"
            )
    return _unzipped(folder, contents[DOCUMENT], described[DOCUMENT]["unpacked_bytes"]), contents[TENSORS]


def _manifest(files: dict[str, bytes], unpacked: int) -> bytes:
    described: dict[str, dict[str, Any]] = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    described[DOCUMENT]["unpacked_bytes"] = unpacked
    versions = {"geta": geta.__version__, "torch": torch.__version__.partition("+")[0]}
    return _sealed({"format": FORMAT, "version": VERSION, "written_by": versions, "files": described})


def _sealed(data: dict[str, Any]) -> bytes:
    """The manifest's bytes, with a checksum over all the rest of it."""
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**data, "sha256": digest}, indent=1) + "\n").encode()


def _checked_manifest(folder: Path, content: bytes) -> dict[str, dict[str, Any]]:
    damaged = CheckpointError(f"'{folder / MANIFEST}' was truncated or altered; get another copy of the folder")
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"'{folder}' is not a compact model that geta saved: its {MANIFEST} doesn't say so")
    if data.get("version") not in READABLE:
        raise CheckpointError(
            f"'{folder}' has format version {data.get('version')!r}, this geta ({geta.__version__}) reads up to version {VERSION}: "
            "use the geta that wrote it, or save it again"
        )
    data.pop("sha256", None)
    files = data.get("files")
    if _sealed(data) != content or not isinstance(files, dict) or sorted(files) != [DOCUMENT, TENSORS]:
        raise damaged
    numbers = {DOCUMENT: ("bytes", "sha256", "unpacked_bytes"), TENSORS: ("bytes", "sha256")}
    if any(not isinstance(files[name], dict) or tuple(files[name]) != keys for name, keys in numbers.items()):
        raise damaged
    return files


def _listed(folder: Path) -> tuple[str, ...]:
    try:
        found = sorted(os.listdir(folder))
    except FileNotFoundError:
        raise CheckpointError(f"there is no folder '{folder}'{_left_behind(folder)}") from None
    except OSError as error:
        raise CheckpointError(f"'{folder}' can't be read as a folder: {error.strerror}; pass the folder that `save` made") from None
    missing, extra = [name for name in _NAMES if name not in found], [name for name in found if name not in _NAMES]
    if missing:
        raise CheckpointError(f"'{folder}' is not a whole saved model: {', '.join(missing)} missing")
    if extra:
        raise CheckpointError(
            f"'{folder}' holds files that don't belong to a saved model: {', '.join(extra[:5])}; remove them if they are yours"
        )
    return _NAMES


def _left_behind(folder: Path) -> str:
    """A crash between the two renames of `write_folder` leaves the old model under a name of its own: tell where."""
    beside = sorted(folder.parent.glob(f".{folder.name}.replaced-*")) if folder.name else []
    return f"; a save was interrupted, the model from before it is in '{beside[-1]}'" if beside else ""


def _read_file(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"'{path}' is not an ordinary file; links and the like are not followed")
        if name == MANIFEST and status.st_size > _LARGEST_MANIFEST:
            raise CheckpointError(f"'{path}' has {status.st_size} bytes, more than a manifest can have")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"'{path}' can't be read: {error.strerror}") from error


def _unzipped(folder: Path, packed: bytes, unpacked: Any) -> bytes:
    damaged = CheckpointError(f"'{folder / DOCUMENT}' can't be decompressed; get another copy of the folder")
    if not isinstance(unpacked, int) or not 0 <= unpacked <= _LARGEST_DOCUMENT:
        raise damaged
    machine = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: the gzip container
    try:
        document = machine.decompress(packed, unpacked + 1)
    except zlib.error:
        raise damaged from None
    if len(document) != unpacked or not machine.eof or machine.unused_data:
        raise damaged
    return document


def _check_target(target: Path) -> None:
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise ConfigError(f"the model can't be saved to '{target}': '{parent}' is a file; choose another folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"the model can't be saved to '{target}': it is a file; choose a folder")
    others = sorted(set(os.listdir(target)) - set(_NAMES))
    if others:
        raise ConfigError(
            f"the model can't be saved to '{target}': it holds other files ({', '.join(others[:5])}); choose an empty or new folder"
        )


def _swap_in(target: Path, files: dict[str, bytes]) -> None:
    token = secrets.token_hex(4)
    staging = target.parent / f".{target.name}.saving-{token}"
    replaced = target.parent / f".{target.name}.replaced-{token}"
    try:
        staging.mkdir()
        for name, content in files.items():
            with open(staging / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if not target.exists():
            os.replace(staging, target)
            return
        os.replace(target, replaced)
        try:
            os.replace(staging, target)
        except OSError:
            os.replace(replaced, target)
            raise
        shutil.rmtree(replaced)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
