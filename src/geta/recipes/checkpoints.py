"""Resumable states of a run on disk: whole or not at all, told from damaged ones, at most two.

checkpoint/STEP-NAME/state.pt       tensors and plain data, `torch.save`, read with `weights_only=True`: no code is ever run
checkpoint/STEP-NAME/digest.json    {"format": 1, "sha256": ..., "bytes": ...}
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from geta.errors import CheckpointError, GetaError
from geta.recipes.run_folder import resume_command

_FORMAT, _KEPT = 1, 2
_STATE, _DIGEST, _PARTIAL = "state.pt", "digest.json", ".partial-"
TRAINED = "trained"


class Checkpoints:
    """The checkpoints of one run. go_on: how to, once there is room on the disk. notes: what was found damaged, in words."""

    def __init__(self, folder: Path, *, go_on: str = "") -> None:
        self.folder = folder
        self._go_on = go_on or f"go on: {resume_command(folder.parent)}"
        self.notes: list[str] = []

    def save(self, leg: int, step: int, state: Mapping[str, Any]) -> None:
        """Write the state after `step` steps of training number `leg`, then remove all but the newest two.

        Raises GetaError when it can't be written; those that were there before stay.
        """
        self._write(f"{leg}-{step:09d}", state)
        for old in self._names()[:-_KEPT]:
            shutil.rmtree(self.folder / old)

    def save_trained(self, state: Mapping[str, Any]) -> None:
        """Write what the rest of the run needs of the trained dense network; it stays beside the checkpoints."""
        self._write(TRAINED, state)

    def newest(self) -> dict[str, Any] | None:
        """The newest state that is whole; None without any. `notes` names those that are damaged.

        Raises CheckpointError when there are some and none is whole.
        """
        names = self._names()
        for name in reversed(names):
            try:
                return self._read(name)
            except CheckpointError as error:
                self.notes.append(f"{error}; the one before it is used" if name != names[0] else str(error))
        if names:
            raise CheckpointError(f"no checkpoint in '{self.folder}' is whole: {'; '.join(self.notes)}. Remove the folder and start again")
        return None

    def has_trained(self) -> bool:
        """Whether `save_trained` has written something."""
        return (self.folder / TRAINED).is_dir()

    def trained(self) -> dict[str, Any]:
        """What `save_trained` wrote. Raises CheckpointError when it is missing or damaged."""
        return self._read(TRAINED)

    def remove(self) -> None:
        """Remove all of them: the run is done."""
        if self.folder.is_dir():
            for path in [*map(self.folder.joinpath, [*self._names(), TRAINED]), *self.folder.glob(f"{_PARTIAL}*")]:
                shutil.rmtree(path, ignore_errors=True)
            self.folder.rmdir()

    def _names(self) -> list[str]:
        """From the oldest to the newest."""
        if not self.folder.is_dir():
            return []
        found = [path.name.partition("-") for path in self.folder.iterdir() if path.is_dir()]
        return ["-".join((leg, step)) for leg, _, step in sorted(found) if leg.isdecimal() and step.isdecimal()]

    def _write(self, name: str, state: Mapping[str, Any]) -> None:
        partial, final = self.folder / f"{_PARTIAL}{name}", self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            with (partial / _STATE).open("wb") as stream:
                torch.save(dict(state), stream)
                stream.flush()
                os.fsync(stream.fileno())
            digest = {"format": _FORMAT, "sha256": _sha256(partial / _STATE), "bytes": (partial / _STATE).stat().st_size}
            with (partial / _DIGEST).open("w", encoding="utf-8") as text:
                json.dump(digest, text)
                text.flush()
                os.fsync(text.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        except (OSError, RuntimeError) as error:  # torch's writer turns some of the system's errors into RuntimeError
            shutil.rmtree(partial, ignore_errors=True)
            before = self._names()
            kept = f"the checkpoint before it ({before[-1]}) is whole" if before else "there is none before it"
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            raise GetaError(
                f"the checkpoint '{final}' can't be written ({reason}); {kept}. Is the disk full? Make room, then {self._go_on}"
            ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            digest = json.loads((path / _DIGEST).read_text(encoding="utf-8"))
            if not isinstance(digest, dict) or digest.get("format") != _FORMAT:
                raise CheckpointError(f"the checkpoint '{path}' has a format that this geta doesn't read")
            if (path / _STATE).stat().st_size != digest.get("bytes") or _sha256(path / _STATE) != digest.get("sha256"):
                raise CheckpointError(f"the checkpoint '{path}' is damaged: {_STATE} is not what was written")
            state: dict[str, Any] = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a damaged file makes of its readers
            raise CheckpointError(f"the checkpoint '{path}' can't be read: {error}") from error
        return state


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
