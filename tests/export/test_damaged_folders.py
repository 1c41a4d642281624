"""2,000 damaged copies of a saved model: each is refused with a CheckpointError, or loads; nothing else happens and nothing is written.

GETA_FUZZ_EXAMPLES sets how many copies are tried in all (default 2,000; `make fuzz` uses more).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import geta
from geta.errors import CheckpointError
from geta.export.files import DOCUMENT, MANIFEST, TENSORS, read_folder, write_folder

TRIES = int(os.environ.get("GETA_FUZZ_EXAMPLES", "2000"))
CHUNKS = 8
SECONDS = 30
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.system",
    "subprocess.Popen",
}
_forbidden: list[list[str]] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook can't be taken away, so it watches only while `_forbidden` holds a list."""
    if not _forbidden:
        return
    opened = event == "open" and isinstance(args[2], int) and args[2] & _WRITING
    if opened or event in _CHANGES:
        _forbidden[-1].append(f"{event} {args}")


sys.addaudithook(_audit)


@contextmanager
def nothing_is_written_and_nothing_hangs() -> Iterator[None]:
    found: list[str] = []

    def too_long(*_: object) -> None:
        raise AssertionError(f"loading took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    _forbidden.append(found)
    try:
        yield
    finally:
        _forbidden.pop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not found


def test_the_watch_sees_a_written_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), nothing_is_written_and_nothing_hangs():
        (tmp_path / "file").write_text("x")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 1, 4, 4)
    graph = geta.analyze(model, (x,))
    geta.quantize(model, weights=(4, 8), activations=(8, 8), calibration=[x], exclude=(), initial_bits=8)
    folder = tmp_path_factory.mktemp("whole") / "model"
    geta.compact(model, graph, graph.random_selection(0.5, seed=0)).save(folder)
    return folder


def bytes_changed(content: bytes, draw: random.Random) -> bytes:
    """The bytes with some flipped, cut out, doubled, moved, zeroed or added."""
    data = bytearray(content)
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.choice([1, 2, 8, 64, 1024]))
    kind = draw.randrange(7)
    if kind == 0:
        data[start] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[start:end]
    elif kind == 2:
        data[start:start] = data[start:end]
    elif kind == 3:
        data[start:end] = bytes(end - start)
    elif kind == 4:
        data[start:end] = draw.randbytes(end - start)
    elif kind == 5:
        data += draw.randbytes(draw.choice([1, 100]))
    else:
        data = data[end:] + data[start:end]
    return bytes(data)


def damaged_files(saved: Path, folder: Path, draw: random.Random) -> bool:
    """A copy that was altered without any care; whether it differs from what was saved."""
    files = {name: (saved / name).read_bytes() for name in (MANIFEST, DOCUMENT, TENSORS)}
    whole = dict(files)
    for _ in range(draw.choice([1, 1, 1, 3])):
        name = draw.choice(sorted(files))
        files[name] = bytes_changed(files[name] or b"\0", draw)
    if not draw.randrange(20):
        one, other = draw.sample(sorted(files), 2)
        files[one], files[other] = files[other], files[one]
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files != whole


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    keys = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in keys:
        found.append((value, key))
        places(inner, found)
    return found


STRANGE: list[Callable[[random.Random], Any]] = [
    lambda _: None,
    lambda _: True,
    lambda draw: draw.choice([0, 1, -1, 2, 7, 63, 64, 2**31, -(2**63), 2**64, 10**30]),
    lambda draw: draw.choice([0.5, -1.0, 1e308, 1e-320]),
    lambda draw: draw.choice(
        ["", "x", "../../x", "/etc/passwd", "os.system", "aten.from_file.default", "torch.load", "a'b", "\u0000", "x" * 5000]
    ),
    lambda draw: draw.choice([[], {}, [[]], [{}], {"": []}]),
    lambda draw: [1] * draw.choice([1, 3, 1000]),
]


def forged(document: bytes, draw: random.Random) -> bytes:
    """The description with entries replaced, exchanged, doubled, renamed or missing, but still JSON."""
    data = json.loads(document)
    for _ in range(draw.choice([1, 1, 2, 5])):
        container, key = draw.choice(places(data, []))
        other, where = draw.choice(places(data, []))
        kind = draw.randrange(6)
        if kind <= 1:
            container[key] = draw.choice(STRANGE)(draw)
        elif kind == 2:
            container[key] = json.loads(json.dumps(other[where]))
        elif kind == 3:
            del container[key]
        elif kind == 4 and isinstance(container, list):
            container.insert(draw.randrange(len(container) + 1), json.loads(json.dumps(other[where])))
        elif isinstance(container, dict):
            container[draw.choice(["x", "1.weight", "../x", f"{key}_"])] = container.pop(key)
        else:
            draw.shuffle(container)
        if not places(data, []):
            break
    return json.dumps(data).encode()


def forged_folder(saved: Path, folder: Path, draw: random.Random) -> bool:
    """A copy whose checksums are right, written by somebody who means harm; it may be a model that can be loaded."""
    document, tensors = read_folder(saved)
    if draw.randrange(4):
        document = forged(document, draw)
    else:
        tensors = bytes_changed(tensors, draw)
    write_folder(folder, document, tensors)
    return False


@pytest.mark.fuzz
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("damage", [damaged_files, forged_folder])
def test_damage_is_refused_or_harmless(saved: Path, tmp_path: Path, damage: Callable[..., bool], chunk: int) -> None:
    refused = 0
    for number in range(chunk, TRIES // 2, CHUNKS):
        folder = tmp_path / str(number)
        must_fail = damage(saved, folder, random.Random(f"{damage.__name__}-{number}"))
        with nothing_is_written_and_nothing_hangs():
            try:
                loaded = geta.load(folder)
            except CheckpointError:
                refused += 1
                continue
        assert not must_fail, number
        assert isinstance(loaded, geta.CompactModel)
    assert refused > TRIES // 2 // CHUNKS // 2
